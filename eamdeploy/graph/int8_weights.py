"""Weights as INT8 whose products with unsigned activations are the same number on every processor.

    w = s·k with |k| ≤ 127, and k[2i] + k[2i+1] ≤ 128 where both have one sign; one s for a column

x86 processors without VNNI multiply unsigned with signed bytes by `pmaddubsw`, which gives the sum a·k + b·l of two
neighbours, cut to 16 bits. Activations a and b go up to 255, so that the sum fits if neighbours of one sign have at
most 128 together. Two weights near 127 overflow: an engine then computes something else there, without a word. So a
scale is the largest sum of such neighbours / 127, not the largest magnitude / 127. That costs DeiT-Tiny a third of a
bit, where 7 bits for all weights would cost one. It costs no time, as the kernels stay those of signed weights.
Kernels of unsigned weights are exact too, but DeiT-Tiny takes 1.7 times as long with them with VNNI, and 1.2 times as
long without.

Source: MLAS pairs rows 2i and 2i+1 in all of its U8S8 kernels (SSE4.1, AVX2, AVX-512), as oneDNN does; Intel, "Nuances
of int8 computations" in oneDNN's developer guide.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST = 127


def pair_limits(weight: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """For each column of `weight` [K, N] the largest sum of magnitudes of two neighbours with one sign, float64 [N].

    It is at least the column's largest magnitude. With scales that are no smaller than a 127th of it, every pair of
    integers of one sign has at most 128 together: each of two roundings adds at most a half.
    """
    rows = np.pad(weight.astype(np.float64), ((0, len(weight) % 2), (0, 0)))
    pairs = rows.reshape(-1, 2, rows.shape[1])
    sums = [np.maximum(sign * pairs, 0).sum(axis=1).max(axis=0, initial=0) for sign in (1, -1)]
    return np.asarray(np.maximum(*sums))


def integers_of(weight: NDArray[np.floating[Any]], scales: NDArray[np.float32]) -> NDArray[np.int8]:
    """INT8 [K, N] that stand for `weight` with one scale for each column."""
    return np.asarray(np.clip(np.rint(weight / scales), -LARGEST, LARGEST).astype(np.int8))
