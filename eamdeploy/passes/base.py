"""The frame around every pass: match first, then rewrite, then check; a failure names the pass and those before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import onnx_graphsurgeon as gs

from eamdeploy.errors import EamDeployError, UnsupportedGraph
from eamdeploy.graph.invariants import check_invariants
from eamdeploy.graph.skip import Skip

MatchT = TypeVar("MatchT")


class Pass(Protocol[MatchT]):
    """One rewrite. `match` only looks and `rewrite` only edits; nothing else passes between them."""

    @property
    def name(self) -> str:
        """The pass's name in `--without`, in metadata and in errors: its effect."""
        ...

    def match(self, graph: gs.Graph) -> list[MatchT | Skip]:
        """Every place in `graph` that this pass is about, in topological order."""
        ...

    def rewrite(self, graph: gs.Graph, match: MatchT) -> None:
        """`graph` computes the same with `match` replaced; dead nodes may stay behind."""
        ...


@dataclass(frozen=True)
class PlannedPass(Generic[MatchT]):
    """A pass and how many places it must change in the model at hand; None where that is the exporter's choice."""

    rewrite_pass: Pass[MatchT]
    expected: int | None


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        rewritten: places changed.
        skipped: places looked at and left alone, with the reason.
        nodes_before, nodes_after: node counts of the whole graph.
    """

    name: str
    rewritten: int
    skipped: tuple[Skip, ...]
    nodes_before: int
    nodes_after: int


def run_passes(graph: gs.Graph, plan: Sequence[PlannedPass[Any]]) -> list[PassResult]:
    """`graph` is rewritten by every pass of `plan`, cleaned, sorted and checked after each.

    Raises:
        UnsupportedGraph: a pass found more or fewer places than expected, or left a broken graph.
    """
    results: list[PassResult] = []
    for planned in plan:
        try:
            results.append(_run_pass(graph, planned))
        except EamDeployError as err:
            done = ", ".join(result.name for result in results) or "none"
            raise UnsupportedGraph(
                f"pass {planned.rewrite_pass.name} failed (passes before it: {done}): {err}"
            ) from err
    return results


def _run_pass(graph: gs.Graph, planned: PlannedPass[MatchT]) -> PassResult:
    rewrite_pass, before = planned.rewrite_pass, len(graph.nodes)
    found = rewrite_pass.match(graph)
    skipped = tuple(item for item in found if isinstance(item, Skip))
    matches = [item for item in found if not isinstance(item, Skip)]
    if planned.expected is not None and len(matches) != planned.expected:
        reasons = "; ".join(f"{skip.node}: {skip.reason}" for skip in skipped) or "nothing was skipped"
        raise UnsupportedGraph(
            "the graph does not have the structure this pass was planned for",
            expected=f"{planned.expected} places",
            got=f"{len(matches)} ({reasons})",
        )
    for match in matches:
        rewrite_pass.rewrite(graph, match)
    graph.cleanup().toposort()
    check_invariants(graph)
    return PassResult(rewrite_pass.name, len(matches), skipped, before, len(graph.nodes))
