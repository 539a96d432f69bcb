"""Attention maps of low rank: a tall matrix times a flat one, both with rows that sum to 1.

    F  ≈  U·P        U [N, r] the mix, P [r, N] the pool, no entry negative, every row sums to 1

Row k of the pool makes one *pooled token* out of all N tokens. Row i of the mix says how much of
each pooled token the query i gets. The product's rows sum to 1 too:  U·P·1 = U·1 = 1.  So a bias
of the values passes through as it does through a whole map.

Such factors of a row-stochastic matrix are probabilistic latent semantic analysis (Hofmann, 1999):
row i of F is a mixture of r distributions. Its EM steps never raise the divergence
Σ F·ln(F / U·P):

    R = F / (U·P)      U ← U * (R·Pᵀ)      P ← P * (Uᵀ·R), rows divided by their sums

Nothing is random: the pool starts as the r rows of F that are farthest from each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.eam.maps import check_maps
from eamdeploy.errors import ConfigError

_MOST_STEPS, _STRIDE = 400, 20
_GAIN = 1e-4  # of the divergence; where so many steps lower it by less, they are the last ones
_TINY = 1e-300
_SPREAD = 0.05  # share of the mean row in every row of the start, which EM could not leave at 0
_EXACT = 1e-12  # distance of two rows that are one


def factorize(map_: NDArray[Any], rank: int, where: str = "the map") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mix `[N, r]` and pool `[r, N]`, whose product is near the map; exactly the map where it has
    at most r different rows.

    Args:
        map_: floating point [N, N], rows as `check_maps` wants them.
        rank: r, in 1…N.
        where: what errors call the map.

    Raises:
        CheckpointError: it is no attention map.
        ConfigError: the rank is below 1 or above N.
    """
    check_maps(map_, where)
    check_rank(rank, map_.shape[-1], where)
    rows = np.clip(map_.astype(np.float64), 0, None)
    rows /= rows.sum(axis=1, keepdims=True)
    chosen, distances = _farthest_rows(rows, rank)
    if distances.min(axis=1).max() <= _EXACT:
        return np.eye(rank)[distances.argmin(axis=1)], rows[chosen]
    mix, pool = _start(rows, chosen, distances)
    error = divergence(rows, mix @ pool)
    for _ in range(_MOST_STEPS // _STRIDE):
        for _ in range(_STRIDE):
            mix, pool = em_step(rows, mix, pool)
        before, error = error, divergence(rows, mix @ pool)
        if before - error <= _GAIN * before:
            break
    return mix, pool


def em_step(
    rows: NDArray[np.float64], mix: NDArray[np.float64], pool: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mix and pool after one step, whose divergence from `rows` [N, N] is not higher."""
    ratio = rows / np.maximum(mix @ pool, _TINY)
    mixed, pooled = mix * (ratio @ pool.T), pool * (mix.T @ ratio)
    return _to_one(mixed), _to_one(pooled)


def divergence(rows: NDArray[np.float64], product: NDArray[np.float64]) -> float:
    """Mean over the rows of KL(row of `rows` ‖ row of `product`), in nats."""
    ratio = np.maximum(rows, _TINY) / np.maximum(product, _TINY)
    return float((rows * np.log(ratio)).sum(axis=1).mean())


def check_rank(rank: int, tokens: int, where: str) -> None:
    """A map of `tokens` tokens can have that rank.

    Raises:
        ConfigError: it can't.
    """
    if not 1 <= rank <= tokens:
        raise ConfigError(
            f"the rank of {where}",
            expected=f"a number in 1…{tokens}, the tokens of its map",
            got=rank,
        )


def _farthest_rows(rows: NDArray[np.float64], rank: int) -> tuple[list[int], NDArray[np.float64]]:
    """Indices of r rows, the first near the mean and each next one farthest from those before it;
    and of every row the squared distance to each of them, `[N, r]`.
    """
    first = int(((rows - rows.mean(axis=0)) ** 2).sum(axis=1).argmin())
    chosen = [first]
    distances = [((rows - rows[first]) ** 2).sum(axis=1)]
    while len(chosen) < rank:
        chosen.append(int(np.min(distances, axis=0).argmax()))
        distances.append(((rows - rows[chosen[-1]]) ** 2).sum(axis=1))
    return chosen, np.stack(distances, axis=1)


def _start(
    rows: NDArray[np.float64], chosen: list[int], distances: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Every row is made mostly of the chosen rows that are near, and everything is positive where
    any row is.
    """
    near = 1 / (distances + 1e-3 * distances.max())
    pool = (1 - _SPREAD) * rows[chosen] + _SPREAD * rows.mean(axis=0)
    return _to_one(near), _to_one(pool)


def _to_one(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """`rows` divided by their sums; a row of zeros, which no query uses, becomes uniform."""
    sums = rows.sum(axis=1, keepdims=True)
    scaled: NDArray[np.float64] = rows / np.maximum(sums, _TINY)
    scaled[sums[:, 0] <= _TINY] = 1 / rows.shape[1]
    return scaled
