"""A place that a match looked at and refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import onnx_graphsurgeon as gs

PlaceT = TypeVar("PlaceT")
MatchT = TypeVar("MatchT")


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


def collect(
    places: Iterable[PlaceT | Skip],
    match: Callable[[PlaceT], MatchT],
) -> list[MatchT | Skip]:
    """What `match` makes of every place, in their order; a `Skip` for a place that it refuses.

    Args:
        places: a `Skip` among the places stays as it is.
    """
    found: list[MatchT | Skip] = []
    for place in places:
        try:
            found.append(place if isinstance(place, Skip) else match(place))
        except Refused as refused:
            found.append(refused.skip)
    return found
