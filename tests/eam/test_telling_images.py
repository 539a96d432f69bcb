"""Images drawn where the model is unsure."""

from __future__ import annotations

import numpy as np
import pytest

from eamdeploy.eam.telling_images import draw, uncertainty


def test_uncertainty_is_one_minus_the_squares_of_the_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]], np.float32))
    np.testing.assert_allclose(uncertainty(logits), [1 - 0.375, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(uncertainty(np.array([[1000.0, 0.0], [-1e4, 0.0]])), [0, 0], atol=1e-12)


@pytest.mark.parametrize("n", [5, 6, 100])
def test_few_images_are_all_taken_once(n: int) -> None:
    assert draw(np.array([0.0, 0.1, 0.9, 0.5, 0.2]), n, 0) == dict.fromkeys(range(5), 1.0)


def test_the_mean_over_drawn_images_is_right_on_average_and_better_than_that_of_an_even_draw() -> None:
    rng = np.random.default_rng(3)
    unsure = rng.beta(0.4, 1.0, 300)
    values = unsure * rng.gamma(2.0, 1.0, 300)  # what freezing costs is large where the model is unsure
    wanted = values.mean()
    drawn = [draw(unsure, 30, seed) for seed in range(400)]
    means = [sum(values[i] * weight for i, weight in one.items()) / 300 for one in drawn]
    assert np.mean(means) == pytest.approx(wanted, rel=0.02)
    even = [rng.choice(values, 30, replace=False).mean() for _ in range(400)]
    assert np.std(means) < 0.7 * np.std(even)
    assert all(len(one) <= 30 and list(one) == sorted(one) for one in drawn)
    assert np.mean([sum(one.values()) for one in drawn]) == pytest.approx(300, rel=0.05)


def test_an_image_that_stands_out_is_drawn_more_than_once_and_run_once() -> None:
    unsure = np.array([*np.zeros(50), 0.9])
    (one,) = {i for i, weight in draw(unsure, 10, 0).items() if i == 50}
    assert one == 50
    # its size 0.92 is 4.79 of the ten steps of 0.192: four or five draws, each for 0.192 / 0.92 images
    assert draw(unsure, 10, 0)[50] == pytest.approx(1, abs=0.2)


def test_the_same_seed_draws_the_same() -> None:
    unsure = np.linspace(0, 0.9, 100)
    assert draw(unsure, 10, 1) == draw(unsure, 10, 1) != draw(unsure, 10, 2)
