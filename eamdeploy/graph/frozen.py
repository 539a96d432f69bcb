"""Frozen attention maps as an ONNX file holds them, and which heads they concern."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class IntegerMaps:
    """The frozen maps of one attention module; row i of a map is `scales[…, i] · integers[…, i]`.

    Attributes:
        heads: which heads have something frozen, ascending.
        integers: uint8 or uint16 `[F, M, R, N]`, 0 where nothing is frozen; R is N but behind `of_rows`.
        scales: float32 `[F, M, R]`, 0 in rows where nothing is frozen.
        windows: which of the M maps each of an image's W windows uses; `(0,)` without windows.
        mask: what is frozen: None for whole heads, bool `[F, R]` for rows, bool `[F, R, N]` for entries.
    """

    heads: tuple[int, ...]
    integers: NDArray[np.unsignedinteger]
    scales: NDArray[np.float32]
    windows: tuple[int, ...] = (0,)
    mask: NDArray[np.bool_] | None = None

    @property
    def by_row(self) -> bool:
        """Whether single rows are frozen."""
        return self.mask is not None and self.mask.ndim == 2

    @property
    def mixes_rows(self) -> bool:
        """Whether single entries are frozen, so that a row of a map may have frozen and live ones."""
        return self.mask is not None and self.mask.ndim == 3

    def take(self, heads: tuple[int, ...]) -> IntegerMaps:
        """The maps of `heads` alone."""
        chosen = [self.heads.index(head) for head in heads]
        mask = None if self.mask is None else self.mask[chosen]
        return IntegerMaps(heads, self.integers[chosen], self.scales[chosen], self.windows, mask)

    def of_rows(self, rows: Sequence[int] | None) -> IntegerMaps | None:
        """What is frozen of these rows of the maps, in that order, or of all if None; None where nothing of them is."""
        if rows is None:
            return self
        mask = None if self.mask is None else self.mask[:, rows]
        cut = IntegerMaps(self.heads, self.integers[:, :, rows], self.scales[:, :, rows], self.windows, mask)
        if mask is None:
            return cut
        some = tuple(head for head, chosen in zip(self.heads, mask, strict=True) if chosen.any())
        return cut.take(some) if some else None


@dataclass(frozen=True, eq=False)
class IntegerFactors:
    """The heads of one attention module that are frozen with one rank r, see `eam.factors`.

    Attributes:
        heads: ascending.
        mix: uint8 or uint16 `[G, M, R, r]`; R is N but behind `of_rows`.
        mix_scales: float32 `[G, M, R]`.
        pool: uint8 or uint16 `[G, M, r, N]`.
        pool_scales: float32 `[G, M, r]`.
        windows: as of `IntegerMaps`.
    """

    heads: tuple[int, ...]
    mix: NDArray[np.unsignedinteger]
    mix_scales: NDArray[np.float32]
    pool: NDArray[np.unsignedinteger]
    pool_scales: NDArray[np.float32]
    windows: tuple[int, ...] = (0,)

    @property
    def rank(self) -> int:
        """r, the pooled tokens of each head."""
        return int(self.mix.shape[-1])

    def of_rows(self, rows: Sequence[int] | None) -> IntegerFactors:
        """The factors for these rows of the maps, in that order, or for all if None."""
        if rows is None:
            return self
        return replace(self, mix=self.mix[:, :, rows], mix_scales=self.mix_scales[:, :, rows])


@dataclass(frozen=True, eq=False)
class Rows:
    """Integer rows as one constant holds them, and the shape in which they are used.

    Attributes:
        heads: the heads that the rows belong to.
        integers: uint8 or uint16 `[rows, K]`.
        scales: float32 `[rows]`.
        shape: whose elements are those of `integers`, in the same order.
    """

    heads: tuple[int, ...]
    integers: NDArray[np.unsignedinteger]
    scales: NDArray[np.float32]
    shape: tuple[int, ...]


def pool_rows(groups: Sequence[IntegerFactors]) -> Rows:
    """The pools of all groups in one constant, used as `[M, Σr, N]`: group by group, head by head."""
    n_maps, tokens = groups[0].pool.shape[1], groups[0].pool.shape[3]
    pools = [group.pool.swapaxes(0, 1).reshape(n_maps, -1, tokens) for group in groups]
    scales = [group.pool_scales.swapaxes(0, 1).reshape(n_maps, -1) for group in groups]
    integers = np.concatenate(pools, axis=1)
    heads = tuple(head for group in groups for head in group.heads)
    flat_scales = np.concatenate(scales, axis=1).reshape(-1)
    return Rows(heads, integers.reshape(-1, tokens), flat_scales, integers.shape)


def mix_rows(group: IntegerFactors) -> Rows:
    """The mixes of one rank, used as `[M, R, G·r]`: behind each other in the order of heads."""
    count, n_maps, rows, rank = group.mix.shape
    integers = group.mix.transpose(1, 2, 0, 3).reshape(-1, rank)
    scales = group.mix_scales.transpose(1, 2, 0).reshape(-1)
    return Rows(group.heads, integers, scales, (n_maps, rows, count * rank))


@dataclass(frozen=True)
class HeadGroups:
    """The heads of a module by how much of them is frozen, each ascending; without those of low rank.

    Attributes:
        live: nothing.
        partial: some rows or entries.
        whole: the whole map.
    """

    live: tuple[int, ...]
    partial: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def order(self) -> list[int]:
        """All heads in the order in which the rewritten attention computes them."""
        return [*self.live, *self.partial, *self.whole]


def head_groups(heads: int, frozen: IntegerMaps | None, low_rank: Collection[int] = ()) -> HeadGroups:
    """The groups of a module with that many heads, of which those in `low_rank` are in none."""
    some = frozen.heads if frozen else ()
    whole = some
    if frozen is not None and frozen.mask is not None:
        whole = tuple(head for head, mask in zip(some, frozen.mask, strict=True) if mask.all())
    live = tuple(head for head in range(heads) if head not in some and head not in low_rank)
    return HeadGroups(live, tuple(head for head in some if head not in whole), whole)


def padded(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices of the true values of each row of `chosen` `[P, N]`, ascending, the last repeated: `[P, most]`."""
    counts = chosen.sum(axis=1)
    ordered = np.argsort(~chosen, axis=1, kind="stable")
    return np.take_along_axis(ordered, np.minimum(np.arange(counts.max()), counts[:, None] - 1), axis=1)
