"""How much the logits change when one row or entry alone is frozen, estimated to second order.

One forward pass for each of millions of pieces is out of the question. For a small change δ of the attention maps the
divergence is a quadratic form with the Fisher information of the output distribution:

    KL(p ‖ p_δ) ≈ ½ δᵀ E[g gᵀ] δ = ½ E[(g·δ)²],   g = ∂ log p_y / ∂A,   y drawn from p

and freezing a piece is the change δ = F − A on the piece, 0 elsewhere. One backward pass gives g for every entry of
every module at once. Images are independent of each other in evaluation mode, so that a batch gives g image by image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eamdeploy.host.attention import attend, merge_heads, replaced_attention
from eamdeploy.host.sites import AttentionSite, by_window
from eamdeploy.vocabulary import Granularity, WindowMaps

# Axes of [B, W, H, N, N] over which a piece extends: it never splits windows.
_PIECE_AXES: dict[Granularity, tuple[int, ...]] = {"head": (1, 3, 4), "row": (1, 4), "entry": (1,)}


def fisher_sensitivity(
    model: nn.Module,
    sites: list[AttentionSite],
    maps: Mapping[str, NDArray[np.floating[Any]]],
    batches: Iterable[torch.Tensor],
    granularity: Granularity,
    on_images: Callable[[int], None],
    *,
    windows: WindowMaps = "shared",
    seed: int = 0,
) -> dict[str, NDArray[np.float64]]:
    """For every piece the estimated mean of KL(model ‖ model with this piece frozen) over the images, in nats.

    Args:
        maps: by module path, what to freeze to, `[H, N, N]`, or `[H, M, N, N]` in a model with windows.
        batches: normalized images, float32 `[B, 3, H, W]`.
        on_images: called with the number of images so far after every batch.
        windows: which windows share a map, see `window_maps`.
        seed: of the labels drawn; image i draws the same whatever the batches are.

    Returns:
        By module path, float64 `[H]`, `[H, N]` or `[H, N, N]` for heads, rows and entries.

    Source: J. Martens, New Insights and Perspectives on the Natural Gradient Method, JMLR 21 (2020), section 8.
    """
    taps = {site.path: _Tap(model.get_submodule(site.path)) for site in sites}
    totals: dict[str, Any] = dict.fromkeys(taps, 0)
    rng = np.random.default_rng(seed)
    seen = 0
    with _without_weight_gradients(model), replaced_attention(model, taps), torch.enable_grad():
        for images in batches:
            log_probabilities = model(images).double().log_softmax(dim=-1)
            labels = _draw(log_probabilities.detach().exp(), rng.random(len(images)))
            chosen = log_probabilities[torch.arange(len(images)), labels].sum()
            live = [taps[site.path].maps for site in sites]
            for site, found, gradient in zip(sites, live, torch.autograd.grad(chosen, live), strict=True):
                frozen = torch.from_numpy(by_window(site, maps[site.path], windows)).transpose(0, 1)  # [W, H, N, N]
                change = frozen - found.detach().view(-1, *frozen.shape)  # [B, W, H, N, N]
                effect = gradient.view(change.shape).double() * change
                squares = effect.sum(dim=_PIECE_AXES[granularity]).square().sum(dim=0)
                totals[site.path] += squares
            seen += len(images)
            on_images(seen)
    return {path: total.numpy() / (2 * seen) for path, total in totals.items()}


class _Tap(nn.Module):
    """timm's attention that keeps its maps `[B·W, H, N, N]`, as nodes of the gradient's graph."""

    maps: torch.Tensor

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention: Any = attention

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, **_: object) -> torch.Tensor:
        self.maps, value = attend(self.attention, x, mask)
        if not self.maps.requires_grad:  # the first module's: the graph begins there
            self.maps.requires_grad_()
        merged: torch.Tensor = self.attention.proj(merge_heads(self.maps @ value))
        return merged


@contextmanager
def _without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Inside the block the weights need no gradient, which saves most of a backward pass's memory."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)


def _draw(probabilities: torch.Tensor, uniform: NDArray[np.float64]) -> torch.Tensor:
    """A class for every image, int64 `[B]`, of `probabilities` `[B, classes]` and numbers in [0, 1)."""
    below = probabilities.cumsum(dim=1) <= torch.from_numpy(uniform)[:, None]
    return below.sum(dim=1).clamp(max=probabilities.shape[1] - 1)
