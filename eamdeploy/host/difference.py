"""How far a frozen model's answers are from the unfrozen one's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import FreezingCost
from eamdeploy.errors import CheckpointError
from eamdeploy.parity.accuracy import kl_divergence, same_top1


def cost_of(expected: NDArray[np.float32], got: NDArray[np.float32]) -> FreezingCost:
    """What separates the logits `got` from those of the unfrozen model, both float32 `[B, classes]`.

    Raises:
        CheckpointError: some are not finite.
    """
    if not (np.isfinite(expected).all() and np.isfinite(got).all()):
        raise CheckpointError("the model has logits that are not finite for these images")
    return FreezingCost(
        n_images=len(got),
        kl=float(kl_divergence(expected, got).mean()),
        agreement=float(same_top1(expected, got).mean() * 100),
    )
