"""How far a frozen model's answers are from the unfrozen one's, and where numbers stop being finite."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eamdeploy.artifacts.card import FreezingCost
from eamdeploy.errors import CheckpointError
from eamdeploy.host.attention import steps
from eamdeploy.parity.accuracy import kl_divergence, same_top1


def cost_of(expected: NDArray[np.float32], got: NDArray[np.float32]) -> FreezingCost:
    """What separates finite logits `got` from those of the unfrozen model, both float32 `[B, classes]`."""
    return FreezingCost(
        n_images=len(got),
        kl=float(kl_divergence(expected, got).mean()),
        agreement=float(same_top1(expected, got).mean() * 100),
    )


@torch.inference_mode()
def answers(model: Any, batches: Iterable[torch.Tensor], device: torch.device, where: str) -> NDArray[np.float32]:
    """The logits of `model`, which is on `device`, float32 `[B, classes]`.

    Args:
        batches: normalized images, float32 `[B, 3, H, W]`.
        where: what the error calls the model.

    Raises:
        CheckpointError: some are not finite; says behind which part of the model the first such number is.
    """
    found = []
    for images in batches:
        logits = model(images.to(device)).cpu()
        if not torch.isfinite(logits).all():
            raise not_finite(where, _first_not_finite(model, images.to(device)))
        found.append(logits.numpy())
    return np.concatenate(found)


def not_finite(where: str, part: str) -> CheckpointError:
    """What to say of a model whose part `part` gives numbers that are not finite."""
    return CheckpointError(
        f"{where}: {part} gives values that are not finite",
        expected="numbers, in the frozen model and in the unfrozen one",
        got="NaN or infinite",
        hint="The weights may be of a training that diverged.",
    )


@contextmanager
def step_outputs(model: Any) -> Iterator[list[torch.Tensor]]:
    """Inside the block, what every step of `model` between embedding and norm gives joins the list."""
    seen: list[torch.Tensor] = []
    handles = [module.register_forward_hook(lambda *found: seen.append(found[2])) for _, module in steps(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _first_not_finite(model: Any, images: torch.Tensor) -> str:
    """The path of the first step of `model` that gives such values."""
    with step_outputs(model) as found:
        model(images)
    broken = (path for (path, _), output in zip(steps(model), found, strict=True) if not torch.isfinite(output).all())
    return next(broken, "the classifier")
