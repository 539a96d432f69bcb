"""Scores of attention heads by layer, with what of each head is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from eamdeploy.artifacts.card import Freezing
from eamdeploy.eam.analysis import Analysis
from eamdeploy.reporting.records.scale import layer_names


@dataclass(frozen=True)
class Head:
    """One attention head.

    Attributes:
        score: None where none is recorded.
        frozen: how much of it is, or would be, frozen.
        share: the frozen share of its entries, in [0, 1]; None where some of it is frozen and no record says how much.
    """

    score: float | None
    frozen: Literal["nothing", "part", "whole"]
    share: float | None


@dataclass(frozen=True)
class HeatMap:
    """The heads of every layer; layers may have different numbers of them.

    Attributes:
        score: what the scores are.
        planned: the marked heads would be frozen, by an analysis.
        layers: by name, in the model's order.
    """

    title: str
    score: str
    planned: bool
    layers: tuple[tuple[str, tuple[Head, ...]], ...]

    @property
    def heads(self) -> list[Head]:
        return [head for _, heads in self.layers for head in heads]

    @property
    def mark(self) -> str:
        """What a snowflake means, in words."""
        if any(head.frozen == "part" and head.share is None for head in self.heads):
            return "frozen in part; how much is not recorded"
        return "would be frozen" if self.planned else "frozen"

    @property
    def shows_shares(self) -> bool:
        """Whether heads are marked with how much of them is frozen."""
        return any(head.frozen == "part" and head.share is not None for head in self.heads)


def of_freezing(
    title: str, freezing: Freezing, heads: Mapping[str, int], shares: Mapping[str, Sequence[float | None]] | None
) -> HeatMap:
    """The heads of a model with what is frozen in it.

    Args:
        heads: how many every attention module has, by its path, in the model's order.
        shares: for each frozen head of a module the share of its entries; None where that is not recorded.
    """
    unknown = 1.0 if freezing.granularity == "head" else None
    if shares is None:
        shares = {path: [unknown] * len(frozen) for path, frozen in freezing.heads.items()}
    known = _by_head(freezing.heads, shares)
    return HeatMap(title, freezing.score, planned=False, layers=_layers(heads, freezing.scores, known))


def of_analysis(analysis: Analysis) -> list[HeatMap]:
    """A map for every score that was measured, the one that decided what would be frozen first."""
    heads = {path: shape.heads for path, shape in analysis.attention.items()}
    known = _by_head(analysis.frozen, analysis.shares)
    names = sorted(analysis.scores, key=lambda name: name != analysis.score)
    return [
        HeatMap(analysis.timm_model, name, planned=True, layers=_layers(heads, analysis.scores[name], known))
        for name in names
    ]


def _by_head(
    frozen: Mapping[str, Sequence[int]], shares: Mapping[str, Sequence[float | None]]
) -> dict[str, dict[int, float | None]]:
    return {path: dict(zip(heads, shares[path], strict=True)) for path, heads in frozen.items()}


def _layers(
    heads: Mapping[str, int], scores: Mapping[str, Sequence[float]], shares: Mapping[str, Mapping[int, float | None]]
) -> tuple[tuple[str, tuple[Head, ...]], ...]:
    rows = []
    for name, (path, n_heads) in zip(layer_names(heads), heads.items(), strict=True):
        values, frozen = scores.get(path), shares.get(path, {})
        cells = [_head(None if values is None else values[head], frozen.get(head, 0.0)) for head in range(n_heads)]
        rows.append((name, tuple(cells)))
    return tuple(rows)


def _head(score: float | None, share: float | None) -> Head:
    return Head(score, "nothing" if share == 0 else "whole" if share == 1 else "part", share)
