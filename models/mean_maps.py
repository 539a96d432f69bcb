"""Trains attention that also works with its mean map, so that whole layers can be frozen later.

    live step:     out = softmax(q·kᵀ·s)·v        and the running mean of the map moves towards this batch's
    frozen step:   out = mean map·v               queries and keys are not computed

A draw decides at every step and for every layer. The values and the layers behind them learn to live
with either, so that freezing the layer later changes little.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

MOMENTUM = 0.1
IMAGES = 8
"""Images of a batch that the running mean is taken from; all would slow the training down."""


@contextmanager
def mean_maps(attentions: list[Any], generator: torch.Generator, probability: float = 0.75) -> Iterator[None]:
    """Inside the block, each of timm's `Attention` modules computes with its mean map in some steps.

    Args:
        probability: how often a training step takes the mean map. In `eval` mode every map is live.
    """
    for attention in attentions:
        attention.forward = _MeanMap(attention, generator, probability)  # hides the class's method
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward


class _MeanMap:
    """The forward of one attention module; `mean` is its running mean map float32 [H,N,N]."""

    def __init__(self, attention: Any, generator: torch.Generator, probability: float) -> None:
        self.attention, self.generator, self.probability = attention, generator, probability
        self.mean: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """`x` [B,N,D] to [B,N,D]; what timm's blocks pass besides is not used by a ViT."""
        attention, (B, N, D) = self.attention, x.shape
        if self.mean is not None and self._takes_mean():
            weight, bias = attention.qkv.weight[2 * D :], attention.qkv.bias[2 * D :]
            value = functional.linear(x, weight, bias).view(B, N, attention.num_heads, -1)
            merged = self.mean @ value.transpose(1, 2)
        else:
            qkv = attention.qkv(x).reshape(B, N, 3, attention.num_heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            if attention.training:
                self._learn(query[:IMAGES] * attention.scale, key[:IMAGES])
            merged = functional.scaled_dot_product_attention(query, key, value)
        result: torch.Tensor = attention.proj(merged.transpose(1, 2).reshape(B, N, D))
        return result

    def _takes_mean(self) -> bool:
        drawn = torch.rand((), generator=self.generator).item() if self.attention.training else 1.0
        return drawn < self.probability

    @torch.no_grad()
    def _learn(self, query: torch.Tensor, key: torch.Tensor) -> None:
        seen = (query @ key.transpose(-2, -1)).softmax(dim=-1).mean(dim=0)
        self.mean = seen if self.mean is None else self.mean + MOMENTUM * (seen - self.mean)
