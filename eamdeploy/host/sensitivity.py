"""How much the logits change when one head alone is frozen.

The cost would be one forward pass per head and image. Three things make it less than half of that: everything before
the frozen layer is computed once, that layer's own projections and maps too, and the frozen head changes its layer's
output by  (F_h − A_h)·V_h·Wo_h  only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from eamdeploy.host.attention import AttentionSite, attention_map, merge_heads, project

OnProgress = Callable[[int, int, float], None]


@torch.inference_mode()
def sensitivity(
    model: nn.Module,
    sites: list[AttentionSite],
    maps: Mapping[str, NDArray[np.float32]],
    batches: Iterable[torch.Tensor],
    n_images: int,
    on_progress: OnProgress,
) -> dict[str, NDArray[np.float64]]:
    """For every head the mean of KL(model ‖ model with this head frozen) over the images, in nats.

    Args:
        maps: by module path, the maps to freeze, float32 `[H, N, N]`.
        batches: normalized images, float32 `[B, 3, H, W]`.
        n_images: how many images to expect, for the progress only.
        on_progress: called with (units done, units in all, seconds left by the speed so far) after every head and
            batch; a unit is an image through one transformer block.

    Source: shared definition of the score `sensitivity`, DESIGN §1.
    """
    totals = {site.path: np.zeros(site.heads) for site in sites}
    depth = len(sites)
    units = n_images * (depth + sum(site.heads * (depth - layer) for layer, site in enumerate(sites)))
    done, seen, started = 0, 0, time.monotonic()
    for images in batches:
        seen += len(images)
        inputs, reference = _block_inputs(model, images)
        done += depth * len(images)
        for layer, site in enumerate(sites):
            for head, kl in enumerate(_layer_sensitivity(model, layer, inputs[layer], maps[site.path], reference)):
                totals[site.path][head] += kl
                done += (depth - layer) * len(images)
                on_progress(done, units, (time.monotonic() - started) / done * (units - done))
    return {path: total / seen for path, total in totals.items()}


def _block_inputs(model: Any, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What every block reads, `[B, N, D]` each, and the log-probabilities `[B, classes]` of the unfrozen model."""
    inputs: list[torch.Tensor] = []
    handles = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, functional.log_softmax(logits.double(), dim=-1)


def _layer_sensitivity(
    model: Any, layer: int, x: torch.Tensor, frozen: NDArray[np.float32], reference: torch.Tensor
) -> Iterable[float]:
    """For each head of `layer`, the sum over the batch of KL(reference ‖ head frozen)."""
    block = model.blocks[layer]
    attention = block.attn
    query, key, value = project(attention, block.norm1(x))
    live = attention_map(query, key)
    unfrozen = attention.proj(merge_heads(live @ value))
    width = attention.head_dim
    for head in range(attention.num_heads):
        difference = (torch.from_numpy(frozen[head]) - live[:, head]) @ value[:, head]
        output = unfrozen + difference @ attention.proj.weight[:, head * width : (head + 1) * width].T
        y = x + block.ls1(output)
        y = y + block.ls2(block.mlp(block.norm2(y)))
        for later in model.blocks[layer + 1 :]:
            y = later(y)
        logits = model.forward_head(model.norm(y))
        candidate = functional.log_softmax(logits.double(), dim=-1)
        yield float(functional.kl_div(candidate, reference, reduction="sum", log_target=True))
