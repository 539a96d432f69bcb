"""Scores of attention heads by layer, with what of each head is frozen: what a heat map shows, however it is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from eamdeploy.artifacts.card import Freezing
from eamdeploy.eam.analysis import Analysis
from eamdeploy.eam.records import CheckpointHeader
from eamdeploy.errors import ConfigError
from eamdeploy.reporting.records.score_scale import ColourScale, colour_scale, exponent, layer_names, short_number, unit


@dataclass(frozen=True)
class Head:
    """One attention head.

    Attributes:
        score: None where none is recorded.
        frozen: how much of it is, or would be, frozen.
        share: the frozen share of its entries, in [0, 1]; None where some of it is frozen and no record says how much.
        rank: of a head that is frozen to factors; None for every other head.
    """

    score: float | None
    frozen: Literal["nothing", "part", "whole"]
    share: float | None
    rank: int | None = None

    @property
    def mark(self) -> Literal["nothing", "snowflake", "bar"]:
        """What the picture puts on the head: a bar is as long as the frozen share."""
        if self.frozen == "nothing":
            return "nothing"
        return "snowflake" if self.frozen == "whole" or self.share is None else "bar"

    @property
    def kind(self) -> str:
        """The rank as a cell shows it, such as r4; empty where there is none."""
        return "" if self.rank is None else f"r{self.rank}"


@dataclass(frozen=True)
class HeatMap:
    """The heads of every layer; layers may have different numbers of them.

    Attributes:
        score: what the scores are.
        planned: the marked heads would be frozen, by an analysis.
        layers: by name, in the model's order; at least one of them has heads.
    """

    title: str
    score: str
    planned: bool
    layers: tuple[tuple[str, tuple[Head, ...]], ...]

    @property
    def heads(self) -> list[Head]:
        return [head for _, heads in self.layers for head in heads]

    @property
    def columns(self) -> int:
        """The number of heads of the layer that has most."""
        return max(len(heads) for _, heads in self.layers)

    @cached_property
    def scores(self) -> list[float]:
        """Those that are recorded."""
        return [head.score for head in self.heads if head.score is not None]

    @cached_property
    def scale(self) -> ColourScale | None:
        """The colours of the scores; None where no score is recorded."""
        return colour_scale(self.scores) if self.scores else None

    @cached_property
    def power(self) -> int:
        """The power of ten that the written scores leave out."""
        return exponent(max(map(abs, self.scores), default=0.0))

    @property
    def unit(self) -> str:
        """What follows a written score, with the power of ten; may be empty."""
        return unit(self.score, self.power)

    def written(self, score: float) -> str:
        """The score as a cell shows it."""
        return short_number(score / 10**self.power)

    def marked(self, mark: Literal["snowflake", "bar"]) -> int:
        """How many heads have that mark."""
        return sum(head.mark == mark for head in self.heads)

    @property
    def snowflake_means(self) -> str:
        if any(head.frozen == "part" and head.share is None for head in self.heads):
            return "frozen in part; how much is not recorded"
        kinds = sorted({head.rank for head in self.heads if head.rank is not None})
        ranks = f" ({', '.join(f'r{rank}' for rank in kinds)}: with that rank)" if kinds else ""
        return f"{'would be frozen' if self.planned else 'frozen'}{ranks}"

    @property
    def bar_means(self) -> str:
        return "share that would be frozen" if self.planned else "frozen share"


def of_heads(
    title: str,
    score: str,
    heads: Mapping[str, int],
    scores: Mapping[str, Sequence[float]],
    frozen: Mapping[str, Sequence[int]],
    shares: Mapping[str, Sequence[float | None]],
    *,
    planned: bool,
    ranks: Mapping[tuple[str, int], int] = MappingProxyType({}),
) -> HeatMap:
    """The heads of a model with their scores and what of them is, or would be, frozen.

    Args:
        heads: how many every attention module has, by its path, in the model's order.
        scores: one for every head of a module; a module without scores may be absent.
        frozen: heads of which something is frozen, by module; a module without any may be absent.
        shares: for each of these heads the frozen share of its entries, in (0, 1]; None where that is not recorded.
        ranks: of heads of low rank, by module and head.

    Raises:
        ConfigError: there is no head, a score is not finite, or heads, scores and shares contradict each other.
    """
    if not any(heads.values()):
        raise ConfigError("cannot draw a heat map", expected="at least one attention head", got="none")
    for path, values in scores.items():
        _check_scores(path, values, heads.get(path, 0))
    for path, indices in frozen.items():
        _check_frozen(path, indices, shares.get(path, ()), heads)
    known = {path: dict(zip(indices, shares[path], strict=True)) for path, indices in frozen.items()}
    layers = [
        (name, _layer(scores.get(path, [None] * count), known.get(path, {}), path, ranks))
        for name, (path, count) in zip(layer_names(heads), heads.items(), strict=True)
    ]
    return HeatMap(title, score, planned, tuple(layers))


def of_freezing(
    title: str, freezing: Freezing, heads: Mapping[str, int], shares: Mapping[str, Sequence[float]] | None
) -> HeatMap:
    """The heads of a model with what is frozen in it.

    Args:
        heads: how many every attention module has, by its path, in the model's order.
        shares: for each frozen head of a module the share of its entries; None where that is not recorded.
    """
    unknown = 1.0 if freezing.granularity == "head" else None
    known = {path: [unknown] * len(frozen) for path, frozen in freezing.heads.items()} if shares is None else shares
    ranks = {
        (path, head): rank
        for path, frozen in freezing.heads.items()
        for head in frozen
        if (rank := freezing.rank_of(path, head)) is not None
    }
    return of_heads(title, freezing.score, heads, freezing.scores, freezing.heads, known, planned=False, ranks=ranks)


def of_checkpoint(header: CheckpointHeader, shares: Mapping[str, Sequence[float]]) -> HeatMap:
    """The heads of an EAM checkpoint; `shares` has the frozen share for each of its frozen heads."""
    heads = {path: shape.heads for path, shape in header.attention.items()}
    return of_freezing(header.timm_model, header.freezing, heads, shares)


def of_analysis(analysis: Analysis) -> list[HeatMap]:
    """A map for every score that was measured, the one that decided what would be frozen first."""
    heads = {path: shape.heads for path, shape in analysis.attention.items()}
    names = sorted(analysis.scores, key=lambda name: name != analysis.score)
    return [
        of_heads(
            *(analysis.timm_model, name, heads, analysis.scores[name], analysis.frozen, analysis.shares), planned=True
        )
        for name in names
    ]


def _check_scores(path: str, values: Sequence[float], count: int) -> None:
    if len(values) != count:
        raise ConfigError(f"scores of {path}", expected=f"{count} numbers", got=len(values))
    for head, value in enumerate(values):
        if not math.isfinite(value):
            raise ConfigError(f"score of head {head} of {path}", expected="a finite number", got=value)


def _check_frozen(path: str, frozen: Sequence[int], shares: Sequence[float | None], heads: Mapping[str, int]) -> None:
    count = heads.get(path, 0)
    for head in frozen:
        if not 0 <= head < count:
            raise ConfigError(
                f"frozen head {head} of {path} is none of the model's",
                expected=f"a head below {count}" if count else f"a module among {', '.join(heads)}",
            )
    if len(shares) != len(frozen) or not all(share is None or 0 < share <= 1 for share in shares):
        raise ConfigError(f"frozen shares of {path}", expected=f"{len(frozen)} numbers in (0, 1]", got=[*shares])


def _layer(
    scores: Sequence[float | None],
    shares: Mapping[int, float | None],
    path: str,
    ranks: Mapping[tuple[str, int], int],
) -> tuple[Head, ...]:
    return tuple(_head(score, shares.get(head, 0.0), ranks.get((path, head))) for head, score in enumerate(scores))


def _head(score: float | None, share: float | None, rank: int | None) -> Head:
    return Head(score, "nothing" if share == 0 else "whole" if share == 1 else "part", share, rank)
