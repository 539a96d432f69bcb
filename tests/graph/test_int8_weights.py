"""INT8 weights against a model of the instruction that saturates."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eamdeploy.graph.int8_weights import integers_of, pair_limits

RNG = np.random.default_rng(0)
K, N = 32, 24


def scaled(weight: NDArray[np.float64]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    scales = (pair_limits(weight) / 127).astype(np.float32)
    return integers_of(weight, scales), scales


def pmaddubsw(unsigned: NDArray[np.int64], signed: NDArray[np.int8]) -> NDArray[np.int64]:
    """A product of [M, K] and [K, N] as processors without VNNI compute it: sums of two are cut to 16 bits."""
    rows = len(signed) + len(signed) % 2
    left = np.zeros((len(unsigned), rows), np.int64)
    right = np.zeros((rows, signed.shape[1]), np.int64)
    left[:, : unsigned.shape[1]], right[: len(signed)] = unsigned, signed
    pairs = left.reshape(len(left), -1, 2)[..., None] * right.reshape(-1, 2, right.shape[1])  # [M, K/2, 2, N]
    return np.asarray(np.clip(pairs.sum(axis=2), -(2**15), 2**15 - 1).sum(axis=1))


WEIGHTS = {
    "normal": RNG.standard_normal((K, N)),
    "all alike": np.ones((K, N)),
    "all alike and negative": np.full((K, N), -3.0),
    "signs in turn": np.where(np.arange(K)[:, None] % 2 == 0, 1.0, -1.0) * np.ones((K, N)),
    "outliers": RNG.standard_t(2, (K, N)),
    "near a half": np.tile([[63.5], [63.5]], (K // 2, N)) + RNG.uniform(-1e-3, 1e-3, (K, N)),
    "an odd number of rows": RNG.standard_normal((K - 1, N)),
    "one row": RNG.standard_normal((1, N)),
    "tiny": RNG.standard_normal((K, N)) * 1e-30,
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_no_activations_make_two_products_overflow(kind: str) -> None:
    integers, _ = scaled(WEIGHTS[kind])
    rows = len(integers)
    activations = [np.full((1, rows), 255), np.eye(rows, dtype=np.int64) * 255, RNG.integers(0, 256, (64, rows))]
    worst = np.concatenate([*activations, np.where(integers.T > 0, 255, 0), np.where(integers.T < 0, 255, 0)])
    np.testing.assert_array_equal(pmaddubsw(worst, integers), worst @ integers.astype(np.int64))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_integers_are_the_nearest_and_use_the_range(kind: str) -> None:
    weight = WEIGHTS[kind]
    integers, scales = scaled(weight)
    assert np.abs(integers).max() <= 127
    np.testing.assert_allclose(integers * scales.astype(np.float64), weight, atol=float(scales.max()) * 0.5001)
    largest = np.abs(weight).max(axis=0)
    assert (scales >= largest / 127 * (1 - 1e-6)).all() and (scales <= 2 * largest / 127 * (1 + 1e-6)).all()


def test_eight_full_bits_do_overflow() -> None:
    """So the model of the instruction is not blind."""
    weight = WEIGHTS["all alike"]
    integers = integers_of(weight, (np.abs(weight).max(axis=0) / 127).astype(np.float32))
    full = np.full((1, K), 255)
    assert (pmaddubsw(full, integers) < full @ integers.astype(np.int64)).all()


def test_columns_where_neighbours_have_other_signs_keep_eight_bits() -> None:
    np.testing.assert_array_equal(np.abs(scaled(WEIGHTS["signs in turn"])[0]), 127)


def test_normal_weights_lose_a_third_of_a_bit() -> None:
    weight = RNG.standard_normal((192, 192))
    _, scales = scaled(weight)
    full = np.abs(weight).max(axis=0) / 127
    assert 0.2 < np.log2(scales / full).mean() < 0.5


def test_a_column_of_zeros_has_no_limit() -> None:
    assert (pair_limits(np.zeros((4, 3))) == 0).all()
