"""Which pieces to freeze: those that cost least for their size, as many as the sparsity allows.

Piece i has aᵢ attention entries, and freezing the set S costs D(S). Sparsity counts entries, so the pieces that are
worth freezing are those with the smallest cost per entry. From the empty set on, again and again, the piece

    argmin  (D(S ∪ {i}) − D(S)) / aᵢ      over every i that is not in S and still fits

joins S, until none fits: where a large piece does not fit, smaller ones fill up. Two kinds of D:

- `select`: costs add up, D(S) = Σ cᵢ. That is so for scores that know pieces alone.
- `select_together`: D(S) = Σᵢⱼ Tᵢⱼ over all i, j in S, with Tᵢⱼ from `effects.HeadEffects`. Two heads that change the
  logits in the same direction cost more together than alone, two that pull against each other cost less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from eamdeploy.eam.records import AttentionShape, FrozenFactors, FrozenMaps
from eamdeploy.errors import ConfigError
from eamdeploy.vocabulary import Granularity

PLURALS: Final[Mapping[Granularity, str]] = {"head": "heads", "row": "rows", "entry": "entries"}
_SHARE_SLACK = 1e-9  # so that 0.3 of 10 heads is 3 although 0.3 * 10 may round below
_LEAST_SAVING = 1e-9  # of the set's cost: rounding must not let exchanges go round in circles


@dataclass(frozen=True, eq=False)
class Selection:
    """The pieces to freeze.

    Attributes:
        pieces: by attention module path (sorted), True where frozen; bool of the shape of the module's scores, heads
            first. Modules without frozen pieces are left out.
        sparsity: frozen entries ÷ all attention entries, in [0, 1].
        sparsity_asked: what was asked for; `sparsity` does not exceed it.
    """

    pieces: dict[str, NDArray[np.bool_]]
    sparsity: float
    sparsity_asked: float

    @property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """The heads with at least one frozen piece, ascending, by attention module path."""
        return {
            path: tuple(np.flatnonzero(frozen.reshape(len(frozen), -1).any(axis=1)).tolist())
            for path, frozen in self.pieces.items()
        }


def select(
    cost_per_entry: Mapping[str, NDArray[np.float64]], entries_per_piece: Mapping[str, int], sparsity: float
) -> Selection:
    """The pieces that cost least for each of their entries, as many as fit into `sparsity`; costs add up.

    All pieces of all modules are ranked by ascending cost per entry; equal costs by the modules' order, then by index
    in C order. Each piece of this ranking that still fits is frozen; one that does not fit is passed over.

    Args:
        cost_per_entry: float [H] for heads, [H, N] for rows or [H, N, N] for entries, by attention module path, in any
            unit.
        entries_per_piece: attention entries of one piece over all W windows of an image (W·N·N, W·N or W) by the same
            paths.
        sparsity: in [0, 1].

    Raises:
        ConfigError: the sparsity is outside [0, 1], the paths differ, there is no piece, or a cost is not finite.
    """
    check_sparsity(sparsity)
    _check_pieces(cost_per_entry, entries_per_piece)
    sizes = _sizes(cost_per_entry, entries_per_piece)
    budget = _budget(sparsity, int(sizes.sum()))
    ranking = np.argsort(np.concatenate([values.reshape(-1) for values in cost_per_entry.values()]), kind="stable")
    frozen = np.zeros(len(sizes), np.bool_)
    while len(ranking := ranking[sizes[ranking] <= budget]):
        used = np.cumsum(sizes[ranking])
        count = int(np.searchsorted(used, budget, side="right"))  # the longest prefix that fits: at least one piece
        frozen[ranking[:count]] = True
        budget -= int(used[count - 1])
        ranking = ranking[count:]
    return _selection(frozen, cost_per_entry, sizes, sparsity)


def select_together(
    costs: NDArray[np.float64], heads: Mapping[str, int], entries_per_head: Mapping[str, int], sparsity: float
) -> Selection:
    """The heads that cost least together for each of their entries, as many as fit into `sparsity`.

    The greedy choice above, then exchanges: while some frozen head can make room for a live one of at least its size
    such that the set costs less, the exchange that saves most is made.

    Args:
        costs: T, float64 [heads, heads], symmetric: freezing the set S costs the sum of T over all pairs of S. The
            heads of all modules in the order of `heads`.
        heads: how many heads each module has, by attention module path.
        entries_per_head: attention entries of one head over all windows of an image, by the same paths.
        sparsity: in [0, 1].

    Raises:
        ConfigError: as for `select`.
    """
    check_sparsity(sparsity)
    ends = np.cumsum(list(heads.values()))
    alone = dict(zip(heads, np.split(np.diag(costs), ends[:-1]), strict=True))
    _check_pieces(alone, entries_per_head)
    if not np.isfinite(costs).all():
        raise ConfigError("costs of pairs of heads", expected="finite numbers", got="NaN or infinite ones")
    sizes = _sizes(alone, entries_per_head)
    budget = _budget(sparsity, int(sizes.sum()))
    frozen = np.zeros(len(sizes), np.bool_)
    while (fits := ~frozen & (sizes <= budget - sizes[frozen].sum())).any():
        added = np.diag(costs) + 2 * costs[:, frozen].sum(axis=1)
        frozen[np.argmin(np.where(fits, added / sizes, np.inf))] = True
    while (exchange := _best_exchange(costs, sizes, frozen, budget)) is not None:
        frozen[list(exchange)] ^= True
    return _selection(frozen, alone, sizes, sparsity)


def cost_of(costs: NDArray[np.float64], frozen: NDArray[np.bool_]) -> float:
    """D of the heads that are true in `frozen` [heads], by `costs` as for `select_together`."""
    return float(costs[np.ix_(frozen, frozen)].sum())


def check_sparsity(sparsity: float) -> None:
    """`sparsity` can be asked for.

    Raises:
        ConfigError: it is outside [0, 1].
    """
    if not 0 <= sparsity <= 1:  # false for NaN too
        raise ConfigError("cannot select what to freeze: sparsity", expected="a number in [0, 1]", got=sparsity)


def _best_exchange(
    costs: NDArray[np.float64], sizes: NDArray[np.int64], frozen: NDArray[np.bool_], budget: int
) -> tuple[int, int] | None:
    """The frozen head and the live one whose exchange lowers the set's cost most; None where none does."""
    out, in_ = np.flatnonzero(frozen), np.flatnonzero(~frozen)
    if not len(out) or not len(in_):
        return None
    own, pulls = np.diag(costs), 2 * costs[:, frozen].sum(axis=1)
    saved = pulls[out] - own[out]  # [out]
    change = (own[in_] + pulls[in_])[None] - 2 * costs[np.ix_(out, in_)] - saved[:, None]  # [out, in]
    larger = sizes[in_][None] - sizes[out][:, None]
    allowed = (larger >= 0) & (larger <= budget - sizes[frozen].sum())
    change = np.where(allowed, change, 0)
    i, j = np.unravel_index(int(change.argmin()), change.shape)
    if change[i, j] >= -_LEAST_SAVING * abs(cost_of(costs, frozen)):
        return None
    return int(out[i]), int(in_[j])


def _sizes(pieces: Mapping[str, NDArray[np.float64]], entries: Mapping[str, int]) -> NDArray[np.int64]:
    """Attention entries of every piece of all modules, int64 [pieces]."""
    return np.repeat([entries[path] for path in pieces], [values.size for values in pieces.values()]).astype(np.int64)


def _budget(sparsity: float, entries: int) -> int:
    """How many of `entries` may be frozen."""
    return math.floor((sparsity + _SHARE_SLACK) * entries)


def _selection(
    frozen: NDArray[np.bool_], pieces: Mapping[str, NDArray[np.float64]], sizes: NDArray[np.int64], sparsity: float
) -> Selection:
    """The frozen ones of all pieces [pieces], by module path and of the shape of the module's `pieces`."""
    ends = np.cumsum([values.size for values in pieces.values()])
    parts = {
        path: part.reshape(values.shape)
        for (path, values), part in zip(pieces.items(), np.split(frozen, ends[:-1]), strict=True)
    }
    return Selection(
        pieces={path: parts[path] for path in sorted(parts) if parts[path].any()},
        sparsity=int(sizes[frozen].sum()) / int(sizes.sum()),
        sparsity_asked=float(sparsity),
    )


def sparsity_of(
    frozen: Mapping[str, FrozenMaps],
    attention: Mapping[str, AttentionShape],
    factors: Mapping[str, tuple[FrozenFactors, ...]] = MappingProxyType({}),
) -> float:
    """Share of all attention entries that is frozen, in [0, 1]; what `select` calls sparsity.

    Args:
        frozen: by attention module path, of modules in `attention`.
        attention: every attention module of the model.
        factors: heads of low rank, by module path too; all entries of such a head are frozen.

    Raises:
        ConfigError: the model has no attention module, or one with something frozen is none of the model's.
    """
    if unknown := sorted({*frozen, *factors} - set(attention)):
        raise ConfigError("frozen maps of unknown modules", expected=sorted(attention), got=unknown)
    if not attention:
        raise ConfigError("the model has no attention to freeze")
    entries = sum(maps.frozen_entries * attention[path].n_windows for path, maps in frozen.items())
    for path, groups in factors.items():
        entries += sum(len(each.heads) for each in groups) * attention[path].entries_per_head
    return entries / sum(shape.heads * shape.entries_per_head for shape in attention.values())


def _check_pieces(scores: Mapping[str, NDArray[np.float64]], entries_per_piece: Mapping[str, int]) -> None:
    for path, values in scores.items():
        if values.ndim < 1 or not np.isfinite(values).all():
            raise ConfigError(
                f"scores of {path} cannot be ranked",
                expected="one finite number per piece, heads first",
                got=f"{values.dtype} {list(values.shape)}, {np.count_nonzero(~np.isfinite(values))} not finite",
            )
    if set(scores) != set(entries_per_piece):
        raise ConfigError(
            "scores and attention entries belong to different modules",
            expected=sorted(entries_per_piece),
            got=sorted(scores),
        )
    if not any(values.size for values in scores.values()):
        raise ConfigError("the model has no attention to freeze")
    if min(entries_per_piece.values()) < 1:
        raise ConfigError("a piece without entries", expected="at least one per piece", got=dict(entries_per_piece))
