"""How the logits change when one head alone is frozen.

The cost would be one forward pass per head and image. Three things make it less than half of that: everything before
the frozen layer is computed once, that layer's own projections and maps too, and the frozen head changes its layer's
output by  (F_h − A_h)·V_h·Wo_h  only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from eamdeploy.eam.effects import HeadEffects
from eamdeploy.host.attention import attend, merge_heads, replaced_attention, steps, tapped_inputs
from eamdeploy.host.sites import AttentionSite, by_window
from eamdeploy.vocabulary import WindowMaps

OnProgress = Callable[[int, int, float], None]


@torch.inference_mode()
def head_effects(
    model: nn.Module,
    sites: list[AttentionSite],
    maps: Mapping[str, NDArray[np.float32]],
    batches: Iterable[tuple[torch.Tensor, Sequence[float]]],
    n_images: int,
    on_progress: OnProgress,
    *,
    windows: WindowMaps = "shared",
) -> HeadEffects:
    """What freezing each head alone does to the logits over the images, the maps of all sites in order.

    Args:
        maps: by module path, the maps to freeze, float32 `[H, N, N]`, or `[H, M, N, N]` in a model with windows; or
            several maps for each head, `[K·H, …]`: one for each head, then a second one for each, and so on.
        batches: normalized images, float32 `[B, 3, H, W]`, and how many images each of the B stands for.
        n_images: how many images to expect, for the progress only.
        on_progress: called with (units done, units in all, seconds left by the speed so far) after every head and
            batch; a unit is an image through one step of the model: a transformer block, or Swin's merging of patches.
        windows: which windows share a map, see `window_maps`.
    """
    effects = HeadEffects.none(sum(len(maps[site.path]) for site in sites))
    numbers = {f"{path}.attn": number for number, (path, _) in enumerate(steps(model))}
    depth = len(numbers)
    units = n_images * (depth + sum(len(maps[site.path]) * (depth - numbers[site.path]) for site in sites))
    done, started = 0, time.monotonic()
    for images, weights in batches:
        record = _record_forward(model, sites, images)
        done += depth * len(images)
        changes = []
        for site in sites:
            constants = torch.from_numpy(by_window(site, maps[site.path], windows))
            for change in _changes(model, site, numbers[site.path], record, constants):
                changes.append(change)
                done += (depth - numbers[site.path]) * len(images)
                on_progress(done, units, (time.monotonic() - started) / done * (units - done))
        effects = effects.plus(record.log_probabilities.numpy(), torch.stack(changes, dim=1).numpy(), weights)
    return effects


def by_module(
    sites: list[AttentionSite], values: NDArray[np.float64], kinds: Mapping[str, int] = MappingProxyType({})
) -> dict[str, NDArray[np.float64]]:
    """`values` `[maps of all sites]` as `[K·H]` for every module path.

    Args:
        kinds: K by module path; 1 for a path that is not there.
    """
    ends = np.cumsum([site.heads * kinds.get(site.path, 1) for site in sites])
    return dict(zip((site.path for site in sites), np.split(values, ends[:-1]), strict=True))


@dataclass(frozen=True)
class _Forward:
    """What the unfrozen model computes for one batch.

    Attributes:
        inputs: of every step.
        attention: input and mask of every attention module, by path.
        log_probabilities: float64 `[B, classes]`.
    """

    inputs: list[torch.Tensor]
    attention: dict[str, tuple[torch.Tensor, torch.Tensor | None]]
    log_probabilities: torch.Tensor


class _Given(nn.Module):
    """An attention module that returns what it is told to."""

    output: torch.Tensor

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        return self.output


def _record_forward(model: nn.Module, sites: list[AttentionSite], images: torch.Tensor) -> _Forward:
    inputs: list[torch.Tensor] = []
    attention: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def on_input(path: str, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        attention[path] = (x, mask)

    handles = [step.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for _, step in steps(model)]
    try:
        with tapped_inputs(model, sites, on_input):
            logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return _Forward(inputs, attention, functional.log_softmax(logits.double(), dim=-1))


def _changes(
    model: Any, site: AttentionSite, number: int, record: _Forward, constants: torch.Tensor
) -> Iterator[torch.Tensor]:
    """For each map of `site`, in step `number`, how freezing its head to it changes the log-softmax, float64
    `[B, classes]`.

    Args:
        constants: `[K·H, W, N, N]`, see `head_effects`.
    """
    attention = model.get_submodule(site.path)
    live, value = attend(attention, *record.attention[site.path])
    unfrozen = attention.proj(merge_heads(live @ value))
    width = value.shape[-1]
    given = _Given()
    with replaced_attention(model, {site.path: given}):
        for index, constant in enumerate(constants):
            head = index % site.heads
            live_head = live[:, head].reshape(-1, site.n_windows, site.tokens, site.tokens)
            difference = (constant - live_head).flatten(0, 1) @ value[:, head]
            given.output = unfrozen + difference @ attention.proj.weight[:, head * width : (head + 1) * width].T
            x = record.inputs[number]
            for _, step in steps(model)[number:]:
                x = step(x)
            candidate = functional.log_softmax(model.forward_head(model.norm(x)).double(), dim=-1)
            yield candidate - record.log_probabilities
