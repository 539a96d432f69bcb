"""Frozen attention maps as an ONNX file holds them, and which heads they concern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class HeadGroups:
    """The heads of a module by how much of them is frozen, each ascending.

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


def head_groups(heads: int, frozen: IntegerMaps | None) -> HeadGroups:
    """The groups of a module with that many heads."""
    some = frozen.heads if frozen else ()
    whole = some
    if frozen is not None and frozen.mask is not None:
        whole = tuple(head for head, mask in zip(some, frozen.mask, strict=True) if mask.all())
    live = tuple(head for head in range(heads) if head not in some)
    return HeadGroups(live, tuple(head for head in some if head not in whole), whole)


def padded(chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices of the true values of each row of `chosen` `[P, N]`, ascending, the last repeated: `[P, most]`."""
    counts = chosen.sum(axis=1)
    ordered = np.argsort(~chosen, axis=1, kind="stable")
    return np.take_along_axis(ordered, np.minimum(np.arange(counts.max()), counts[:, None] - 1), axis=1)
