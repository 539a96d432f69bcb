"""A place that a match looked at and refused, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class Skip:
    """A place that looked right at first and was left alone.

    Attributes:
        reason: which condition failed.
        node: name of the node at which it failed.
    """

    reason: str
    node: str


class Refused(Exception):
    """Raised inside a match where a condition fails; becomes a `Skip`."""

    def __init__(self, reason: str, node: gs.Node) -> None:
        super().__init__(reason)
        self.skip = Skip(reason, node.name or node.op)
