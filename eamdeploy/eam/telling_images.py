"""Which images tell most about what freezing costs, and how many others each of them stands for.

A model that is sure of an image hardly changes its mind: KL(p ‖ softmax(z + Δ)) ≈ ½ Varₚ(Δ) is small wherever p is near
0 and 1. The few images on which it is unsure hold most of the mean, so they are drawn more often and count less:

    u(x) = 1 − Σ p(x)²  + 0.02      drawn in proportion to u, weight  Σu / (n·u(x))

which leaves the expected sum over all N images what it is, and needs about half as many images for the same error.
The draws are systematic (one random start, equal steps through the images sorted by u), so that all kinds are there.

Source: W. Cochran, Sampling Techniques, 3rd edition, section 9A (systematic sampling with unequal probabilities).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SURE = 0.02  # what an image counts of which the model is wholly sure


def uncertainty(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """1 − Σp² of each image, float64 [B] in [0, 1), of its logits [B, classes]: 0 where the model is sure."""
    shifted = logits.astype(np.float64)
    p = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return np.asarray(1 - np.square(p).sum(axis=1))


def draw(unsure: NDArray[np.float64], n: int, seed: int) -> dict[int, float]:
    """At most `n` of the N images by index, ascending, with the number of images that each stands for.

    All N, each for itself, where `n` is N or more. The weights sum up to about N, exactly on average.

    Args:
        unsure: `uncertainty` of every image, float64 [N].
        n: at least 1.
        seed: of the one random number in it.
    """
    if n >= len(unsure):
        return dict.fromkeys(range(len(unsure)), 1.0)
    size = unsure + _SURE
    order = np.argsort(size, kind="stable")
    ends = np.cumsum(size[order])
    step = ends[-1] / n
    places = (np.arange(n) + np.random.default_rng(seed).random()) * step
    picked = order[np.minimum(np.searchsorted(ends, places, side="right"), len(order) - 1)]
    images, times = np.unique(picked, return_counts=True)  # an image larger than a step is drawn more than once
    return {int(i): float(step / size[i] * count) for i, count in zip(images, times, strict=True)}
