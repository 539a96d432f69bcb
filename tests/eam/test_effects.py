"""What freezing heads does to the logits."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eamdeploy.eam.effects import HeadEffects
from eamdeploy.parity.accuracy import kl_divergence

H, CLASSES = 4, 6


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def drawn(n: int, size: float, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits [n, CLASSES], and what each head adds to them, [n, H, CLASSES]."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, CLASSES)) * 2, rng.normal(size=(n, H, CLASSES)) * size


def effects_of(logits: NDArray[np.float64], changes: NDArray[np.float64], weights: list[float]) -> HeadEffects:
    return HeadEffects.none(H).plus(log_softmax(logits), changes, weights)


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_alone_is_the_mean_divergence(size: float) -> None:
    logits, changes = drawn(5, size)
    found = effects_of(logits, changes, [1.0] * 5).alone
    wanted = [kl_divergence(logits, logits + changes[:, head]).mean() for head in range(H)]
    np.testing.assert_allclose(found, wanted, rtol=1e-7)


def test_pairs_are_the_divergence_of_small_changes_made_at_once() -> None:
    logits, changes = drawn(5, 1e-3)
    effects = effects_of(logits, changes, [1.0] * 5)
    trust = 5 / 45
    together = effects.together
    np.testing.assert_array_equal(together, together.T)
    for i in range(H):
        for j in range(i):
            both = kl_divergence(logits, logits + changes[:, i] + changes[:, j]).mean()
            alone = effects.alone
            np.testing.assert_allclose(2 * together[i, j] / trust, both - alone[i] - alone[j], atol=1e-9)  # third order


def test_what_is_added_to_all_logits_of_an_image_changes_nothing() -> None:
    logits, changes = drawn(3, 1.0)
    plain = effects_of(logits, changes, [1.0] * 3)
    shifted = effects_of(logits, changes + 7.0, [1.0] * 3)
    np.testing.assert_allclose(shifted.together, plain.together, rtol=1e-9)


def test_an_image_of_weight_two_counts_as_two_and_batches_do_not_matter() -> None:
    logits, changes = drawn(3, 1.0)
    twice = [0, 1, 1, 2]
    weighted = effects_of(logits, changes, [1.0, 2.0, 1.0])
    repeated = effects_of(logits[twice], changes[twice], [1.0] * 4)
    np.testing.assert_allclose(weighted.alone, repeated.alone, rtol=1e-12)
    np.testing.assert_allclose(weighted.covariance, repeated.covariance, rtol=1e-12)
    parts = HeadEffects.none(H)
    for i, weight in enumerate((1.0, 2.0, 1.0)):
        parts = parts.plus(log_softmax(logits[i : i + 1]), changes[i : i + 1], [weight])
    np.testing.assert_allclose(parts.together, weighted.together, rtol=1e-12)
    assert (parts.n_images, parts.total_weight) == (3, 4.0)


def test_pairs_count_more_the_more_images_showed_them() -> None:
    logits, changes = drawn(40, 1e-3)
    effects = effects_of(logits, changes, [1.0] * 40)
    off_diagonal = ~np.eye(H, dtype=bool)
    np.testing.assert_allclose(effects.together[off_diagonal], effects.covariance[off_diagonal] / 40 / 2)
    np.testing.assert_array_equal(np.diag(effects.together), effects.alone)
