"""timm's VisionTransformer: ViT, DeiT, DeiT distilled, DeiT-III."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import nn

from eamdeploy.host.sites import AttentionSite, refuse_unless
from eamdeploy.passes.order import Parts

MODELS = (VisionTransformer, VisionTransformerDistilled)
ATTENTION = Attention
_POOLS = ("token", "avg", "avgmax", "max")


def sites(model: Any) -> list[AttentionSite]:
    """Every attention module of `model`, in forward order.

    Raises:
        UnsupportedGraph: the model's attention is not `softmax(q·kᵀ)·v`; the reason is given.
    """
    refuse_unless(not model.dynamic_img_size, "dynamic_img_size makes the token count depend on the image")
    refuse_unless(model.global_pool in _POOLS, f"pooling {model.global_pool!r} has an attention of its own or none")
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        where = f"blocks.{index}"
        refuse_unless(type(block) is Block, f"{where} is a {type(block).__name__}, not a pre-norm Block")
        attention = block.attn
        refuse_unless(type(attention) is Attention, f"{where}.attn is a {type(attention).__name__}")
        refuse_unless(getattr(attention, "gate", None) is None, f"{where}.attn gates its output")
        norm = getattr(attention, "norm", nn.Identity())
        refuse_unless(isinstance(norm, nn.Identity), f"{where}.attn normalizes its output (scale_norm)")
    found = [AttentionSite(f"blocks.{i}.attn", block.attn.num_heads, tokens) for i, block in enumerate(model.blocks)]
    return [*found[:-1], *(replace(last, read_tokens=_read_tokens(model, tokens)) for last in found[-1:])]


def _read_tokens(model: Any, tokens: int) -> tuple[int, ...] | None:
    """The tokens that the classifier reads of the last block; None where they are more than half."""
    if isinstance(model, VisionTransformerDistilled):
        read: tuple[int, ...] = (0, 1)
    elif model.global_pool == "token":
        read = (0,)
    else:
        return None
    return read if 2 * len(read) <= tokens else None


def parts(model: Any) -> Parts:
    """What `model` has besides attention that passes change."""
    return Parts(
        embeddings=int(model.num_prefix_tokens > 0 and model.pos_embed is not None),
        layer_scales=sum(isinstance(module, LayerScale) for module in model.modules()),
    )


def attend(attention: Any, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps `[B, H, N, N]` and values `[B, H, N, d]` of `x` `[B, N, D]`, as timm computes them without its fused kernel.

    Source: `timm.layers.attention.Attention.forward`.
    """
    assert mask is None, "image models pass no mask"
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    query, key = attention.q_norm(query) * attention.scale, attention.k_norm(key)
    return (query @ key.transpose(-2, -1)).softmax(dim=-1), value


def steps(model: Any) -> list[tuple[str, nn.Module]]:
    """Module path and module of everything between embedding and final norm, in forward order."""
    return [(f"blocks.{index}", block) for index, block in enumerate(model.blocks)]
