"""What a head can be frozen to, what each kind saves, and which kind pays most.

A head's kind is None for a whole map, or a rank r for factors (see `eam.factors`). Of a head with N
tokens, R of them read, D channels and d of its own, an image and a window cost these multiply-adds:

    live          (2·R + 2·N)·D·d + 2·R·N·d        queries, output; keys, values; both products
    whole map     (R + N)·D·d + R·N·d              output, values; the product with the map
    rank r        r·(N·D + 2·D·d + R·D)            pooled tokens, value and output, mixing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eamdeploy.errors import ConfigError

Kind: TypeAlias = int | None
"""A rank, or None for a whole map."""

AUTO_KINDS: Final[tuple[Kind, ...]] = (None, 1, 2, 4, 8)
"""What `--rank auto` chooses from."""


@dataclass(frozen=True)
class HeadSize:
    """What the multiply-adds of one head follow from.

    Attributes:
        tokens, rows: N and R.
        channels, head_dim: D and d.
        windows: of an image; 1 without windows.
    """

    tokens: int
    rows: int
    channels: int
    head_dim: int
    windows: int = 1

    def saved(self, kind: Kind) -> int:
        """Multiply-adds for each image that a head of this kind needs less than a live one."""
        n, r, width = self.tokens, self.rows, self.channels * self.head_dim
        live = 2 * (r + n) * width + 2 * r * n * self.head_dim
        if kind is None:
            frozen = (r + n) * width + r * n * self.head_dim
        else:
            frozen = kind * ((n + r) * self.channels + 2 * width)
        return self.windows * (live - frozen)


def kinds_of(rank: str) -> tuple[Kind, ...]:
    """The kinds that the option `--rank` allows, at least one.

    Raises:
        ConfigError: it is no such option.
    """
    if rank == "auto":
        return AUTO_KINDS
    if rank == "none":
        return (None,)
    if not (rank.isascii() and rank.isdigit() and 1 <= int(rank) < 10**6):
        raise ConfigError("cannot freeze with that rank", expected="none, auto or a number from 1 on", got=rank)
    return (int(rank),)


def fitting(kinds: Sequence[Kind], size: HeadSize) -> tuple[Kind, ...]:
    """Those of several `kinds` that a head of this size can have and that save something; of one
    kind that one.
    """
    if len(kinds) == 1:
        return tuple(kinds)
    possible = [kind for kind in kinds if kind is None or kind <= size.tokens]
    return tuple(kind for kind in possible if size.saved(kind) > 0)


def best_kinds(damage: NDArray[np.float64], saved: Sequence[int]) -> NDArray[np.int64]:
    """For every head, which kind does least damage for each multiply-add that it saves, int64 [H].

    Args:
        damage: float64 [K, H], none negative.
        saved: multiply-adds of each kind, positive; of one kind that one is taken.
    """
    if len(saved) == 1:
        return np.zeros(damage.shape[1], np.int64)
    ratios = damage / np.array(saved, np.float64)[:, None]
    return np.asarray(ratios.argmin(axis=0), np.int64)
