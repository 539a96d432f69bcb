"""What a rule is and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from eamdeploy.artifacts.records import Record
from eamdeploy.engines.trt.versions import Capabilities
from eamdeploy.lint.view import GraphView

Severity = Literal["error", "warning"]


class Finding(Record):
    """A place in a model that breaks a rule.

    Attributes:
        rule: the rule's id.
        severity: an `error` stops TensorRT, a `warning` costs speed or memory.
        node: name of the node, or of the tensor where no node is to blame.
        message: what is wrong there, expected and got.
        remedy: what to do about it.
    """

    rule: str
    severity: Severity
    node: str
    message: str
    remedy: str


@dataclass(frozen=True)
class Place:
    """Where a check failed, and how: node and message of a `Finding`."""

    node: str
    message: str


Check = Callable[[GraphView, Capabilities], Iterator[Place]]


@dataclass(frozen=True)
class Rule:
    """One demand of TensorRT.

    Attributes:
        id: kebab-case name.
        check: yields the places that break it.
        applies: versions it applies to, for people; `check` asks the capabilities.
        remedy: what to do about any of its findings.
    """

    id: str
    check: Check
    applies: str
    remedy: str
    severity: Severity = "error"
