"""timm's SwinTransformer, version 1: attention inside windows, every other block with shifted ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from torch import nn

from eamdeploy.host.sites import AttentionSite, refuse_other_modules, refuse_unless
from eamdeploy.passes.order import Parts

MODELS = (SwinTransformer,)
ATTENTION = WindowAttention
MODULES = frozenset(
    {
        *("timm.SwinTransformer", "timm.SwinTransformerStage", "timm.SwinTransformerBlock", "timm.WindowAttention"),
        *("timm.PatchEmbed", "timm.PatchMerging", "timm.Mlp", "timm.ClassifierHead", "timm.SelectAdaptivePool2d"),
        *(
            "timm.FastAdaptiveAvgPool",
            "timm.FastAdaptiveMaxPool",
            "timm.FastAdaptiveAvgMaxPool",
            "timm.FastAdaptiveCatAvgMaxPool",
            "timm.DropPath",
            "torch.Softmax",
        ),
        *("torch.LayerNorm", "torch.GELU", "torch.Conv2d", "torch.Linear", "torch.Dropout"),
        *("torch.Identity", "torch.Sequential"),
    }
)
"""The classes of modules that a supported model may have."""


def sites(model: Any) -> list[AttentionSite]:
    """Every attention module of `model`, in forward order.

    Raises:
        UnsupportedGraph: the windows depend on the image, or blocks, attention or pooling are not Swin's own.
    """
    refuse_unless(
        model.patch_embed.strict_img_size,
        "strict_img_size=False makes the windows depend on the image",
        "Try --model-kwargs strict_img_size=True.",
    )
    refuse_unless(bool(model.head.global_pool.pool_type), "it does not pool its tokens (global_pool='')")
    found = []
    for path, block in _blocks(model):
        refuse_unless(type(block) is SwinTransformerBlock, f"{path} is a {type(block).__name__}")
        refuse_unless(type(block.attn) is WindowAttention, f"{path}.attn is a {type(block.attn).__name__}")
        found.append(AttentionSite(f"{path}.attn", block.attn.num_heads, block.window_area, _mask_classes(block)))
    refuse_other_modules(model, MODULES)
    return found


def parts(model: Any) -> Parts:
    """What `model` has besides attention that passes change: nothing; its tokens are patches, its positions biases."""
    return Parts(embeddings=0, layer_scales=0)


def attend(attention: Any, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps `[B·W, H, N, N]` and values `[B·W, H, N, d]` of `x` `[B·W, N, D]`, as timm computes them.

    Args:
        mask: 0 where a query may look, −100 where not, `[W, N, N]`; None for unshifted windows.

    Source: `timm.models.swin_transformer.WindowAttention.forward`.
    """
    windows, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(windows, tokens, 3, attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (query * attention.scale) @ key.transpose(-2, -1) + attention._get_rel_pos_bias()
    if mask is not None:
        by_image = scores.view(-1, len(mask), *scores.shape[1:])  # [B, W, H, N, N]
        scores = (by_image + mask[:, None]).flatten(0, 1)
    return scores.softmax(dim=-1), value


def steps(model: Any) -> list[tuple[str, nn.Module]]:
    """Module path and module of everything between embedding and final norm, in forward order."""
    found: list[tuple[str, nn.Module]] = []
    for index, stage in enumerate(model.layers):
        if not isinstance(stage.downsample, nn.Identity):
            found.append((f"layers.{index}.downsample", stage.downsample))
        found += [(f"layers.{index}.blocks.{number}", block) for number, block in enumerate(stage.blocks)]
    return found


def _blocks(model: Any) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in steps(model) if ".blocks." in path]


def _mask_classes(block: Any) -> tuple[int, ...]:
    """The class of every window's shift mask; one class for unshifted windows, padded ones among them."""
    if block.attn_mask is None:
        down, across = (
            math.ceil(side / window) for side, window in zip(block.input_resolution, block.window_size, strict=True)
        )
        return (0,) * int(down * across)
    numbers: dict[bytes, int] = {}
    masks: list[torch.Tensor] = list(block.attn_mask)
    return tuple(numbers.setdefault((mask != 0).numpy().tobytes(), len(numbers)) for mask in masks)
