"""How a linear layer changes so that what stands behind it comes close to what it should be.

A layer gives W·x + b, and e is what is missing from it, for every sample x. The change Δ, δ of W, b that minimises

    Σ w·‖e − Δ·x − δ‖² + λ·‖Δ‖²

is known in closed form from the sums Σ w·x̂·x̂ᵀ and Σ w·x̂·eᵀ, where x̂ is x with a 1 behind it. The sums are added up
sample by sample, so that memory does not grow with the samples. λ draws the new weights towards the old ones; the
bias δ is free.
Source: docs/design.md, Recovering a linear layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

STRENGTHS: Final = tuple(10.0**exponent for exponent in np.arange(-5.0, 1.25, 0.25))
"""Which strengths of the ridge are tried; λ is the strength times the mean eigenvalue of the inputs' covariance."""


class Products:
    """Sums over samples x [K] with errors e [M] and weights w: all that a regression of e on x needs.

    Attributes:
        gram: Σ w·x̂·x̂ᵀ, float64 [K + 1, K + 1].
        cross: Σ w·x̂·eᵀ, float64 [K + 1, M].
        square: Σ w·‖e‖².
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.gram = np.zeros((inputs + 1, inputs + 1))
        self.cross = np.zeros((inputs + 1, outputs))
        self.square = 0.0

    def add(self, x: NDArray[Any], e: NDArray[Any], weights: NDArray[Any] | None = None) -> None:
        """The samples `x` [n, K] with errors `e` [n, M] are in the sums, each `weights` [n] times; once if None."""
        ones = np.ones((len(x), 1))
        wide, errors = np.hstack([x.astype(np.float64), ones]), e.astype(np.float64)
        weighted = wide if weights is None else wide * weights.astype(np.float64)[:, None]
        self.gram += weighted.T @ wide
        self.cross += weighted.T @ errors
        squares = np.square(errors).sum(axis=1)
        self.square += float(squares.sum() if weights is None else squares @ weights)

    @property
    def is_finite(self) -> bool:
        """Whether no sample had a NaN or an infinite number."""
        return bool(np.isfinite(self.gram).all() and np.isfinite(self.cross).all() and np.isfinite(self.square))


@dataclass(frozen=True, eq=False)
class Correction:
    """What is added to a linear layer.

    Attributes:
        weight: float64 [M, K].
        bias: float64 [M]; None for a layer without bias.
        strength: of the ridge behind it, see `STRENGTHS`.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64] | None
    strength: float

    def error_left(self, products: Products) -> float:
        """Σ w·‖e − Δ·x − δ‖² over the samples of `products`."""
        bias = np.zeros(len(self.weight)) if self.bias is None else self.bias
        both = np.column_stack([self.weight, bias]).T  # [K + 1, M]
        return float(products.square - 2 * np.sum(products.cross * both) + np.sum(both * (products.gram @ both)))


def corrections(products: Products, strengths: Sequence[float], *, has_bias: bool) -> list[Correction]:
    """The best change of the layer for every strength of the ridge, from one eigendecomposition.

    Args:
        products: of finite samples, of at least one.
        has_bias: whether the layer has a bias, which then absorbs the samples' means.
    """
    gram, cross = products.gram[:-1, :-1], products.cross[:-1]
    count, sum_x, sum_e = products.gram[-1, -1], products.gram[-1, :-1], products.cross[-1]
    if has_bias:
        gram, cross = gram - np.outer(sum_x, sum_x) / count, cross - np.outer(sum_x, sum_e) / count
    values, vectors = np.linalg.eigh(gram)
    values, turned = np.maximum(values, 0.0), vectors.T @ cross
    unit = values.mean()
    if unit == 0:  # every sample is the same: nothing to learn from but the mean
        values, unit = np.ones_like(values), 1.0
    found = []
    for strength in strengths:
        weight = (vectors @ (turned / (values + strength * unit)[:, None])).T
        bias = (sum_e - weight @ sum_x) / count if has_bias else None
        found.append(Correction(weight, bias, strength))
    return found


def best_correction(fit: Products, held_back: Products, *, has_bias: bool) -> Correction | None:
    """Of the changes learnt from `fit`, the one that leaves least error on `held_back`; None if none lessens it."""
    tried = corrections(fit, STRENGTHS, has_bias=has_bias)
    best = min(tried, key=lambda each: each.error_left(held_back))
    return best if best.error_left(held_back) < held_back.square else None
