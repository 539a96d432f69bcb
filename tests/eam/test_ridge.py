from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eamdeploy.eam.ridge import Products, best_correction, corrections

INPUTS, OUTPUTS = 5, 3


def samples(n: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Inputs, the errors of a known correction, and weights."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, INPUTS)) + 2
    known = np.random.default_rng(99).normal(size=(OUTPUTS, INPUTS + 1))
    return x, x @ known[:, :-1].T + known[:, -1], rng.uniform(0, 2, n)


def products(*arrays: NDArray[np.float64]) -> Products:
    sums = Products(arrays[0].shape[1], arrays[1].shape[1])
    sums.add(*arrays)
    return sums


def test_sums_that_are_added_up_in_batches_are_those_of_all_samples() -> None:
    x, e, w = samples(50)
    streamed = Products(INPUTS, OUTPUTS)
    for start in range(0, 50, 7):
        streamed.add(x[start : start + 7], e[start : start + 7], w[start : start + 7])
    wide = np.hstack([x, np.ones((50, 1))])
    np.testing.assert_allclose(streamed.gram, wide.T @ (w[:, None] * wide))
    np.testing.assert_allclose(streamed.cross, wide.T @ (w[:, None] * e))
    assert streamed.square == pytest.approx(float((w * (e**2).sum(axis=1)).sum()))


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_known_correction_is_found(has_bias: bool) -> None:
    x, e, _ = samples(100)
    known = np.random.default_rng(99).normal(size=(OUTPUTS, INPUTS + 1))
    (found,) = corrections(products(x, e if has_bias else e - known[:, -1]), [1e-12], has_bias=has_bias)
    np.testing.assert_allclose(found.weight, known[:, :-1], atol=1e-8)
    if has_bias:
        assert found.bias is not None
        np.testing.assert_allclose(found.bias, known[:, -1], atol=1e-7)
    else:
        assert found.bias is None


def test_the_ridge_draws_towards_no_change_and_leaves_the_bias_free() -> None:
    x, e, w = samples(100)
    e = e + np.random.default_rng(5).normal(size=e.shape)
    strength = 0.3
    (found,) = corrections(products(x, e, w), [strength], has_bias=True)
    centred = x - np.average(x, axis=0, weights=w)
    gram = centred.T @ (w[:, None] * centred)
    ridge = strength * np.trace(gram) / INPUTS * np.eye(INPUTS)
    expected = np.linalg.solve(gram + ridge, centred.T @ (w[:, None] * e)).T
    np.testing.assert_allclose(found.weight, expected)
    assert found.bias is not None
    residual = e - x @ found.weight.T - found.bias
    np.testing.assert_allclose(np.average(residual, axis=0, weights=w), 0, atol=1e-12)


def test_the_error_that_is_left_follows_from_the_sums() -> None:
    x, e, w = samples(60)
    (found,) = corrections(products(x, e, w), [1.0], has_bias=True)
    other_x, other_e, other_w = samples(40, seed=1)
    residual = other_e - other_x @ found.weight.T - found.bias
    expected = float((other_w * (residual**2).sum(axis=1)).sum())
    assert found.error_left(products(other_x, other_e, other_w)) == pytest.approx(expected)


def test_a_correction_that_does_not_help_other_samples_is_none() -> None:
    rng = np.random.default_rng(3)
    x, e = rng.normal(size=(6, INPUTS)), rng.normal(size=(6, OUTPUTS)) + 5
    other = products(rng.normal(size=(50, INPUTS)), np.zeros((50, OUTPUTS)))
    assert best_correction(products(x, e), other, has_bias=True) is None
    assert best_correction(products(x, e), products(x, e), has_bias=True) is not None


def test_the_strength_is_that_with_the_least_error_on_other_samples() -> None:
    x, e, _ = samples(8)
    rng = np.random.default_rng(4)
    noisy = products(x, e + rng.normal(size=e.shape) * 3)
    other_x, other_e, _ = samples(200, seed=2)
    other = products(other_x, other_e)
    found = best_correction(noisy, other, has_bias=True)
    assert found is not None and 1e-5 < found.strength < 10
    for strength in (1e-5, 10):
        (tried,) = corrections(noisy, [strength], has_bias=True)
        assert found.error_left(other) <= tried.error_left(other)


def test_samples_that_are_all_the_same_teach_their_mean() -> None:
    (found,) = corrections(products(np.ones((4, 2)), np.full((4, 1), 3.0)), [0.1], has_bias=True)
    assert found.bias is not None and not found.weight.any() and found.bias.tolist() == [3.0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_noticed(value: float) -> None:
    x, e, _ = samples(10)
    assert products(x, e).is_finite
    x[3, 2] = value
    assert not products(x, e).is_finite
