"""timm's SwinTransformer, version 1: attention inside windows, every other block with shifted ones."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import starmap, zip_longest
from typing import Any

import torch
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
)
from torch import nn

from eamdeploy.host.sites import AttentionSite, Half, refuse_other_modules, refuse_unless
from eamdeploy.passes.facts import Parts

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
        site = AttentionSite(f"{path}.attn", block.attn.num_heads, block.window_area, _mask_classes(block))
        found.append(replace(site, read_tokens=_read_tokens(block)))
    refuse_other_modules(model, MODULES)
    return found


def parts(model: Any) -> Parts:
    """How often `model` has what passes change; its tokens are patches, its positions biases."""
    path = [module for _, module in steps(model)]
    blocks = [block for _, block in _blocks(model)]
    attentions = [block.attn for block in blocks]
    biased = [each for each in attentions if each.qkv.bias is not None]
    return Parts(
        embeddings=0,
        layer_scales=0,
        scaled_queries=sum(each.scale != 1 for each in attentions),
        biased_keys=len(biased),
        biased_values=sum(each.proj.bias is not None for each in biased),
        token_moves=len(path) + len(blocks),  # a block moves them twice, patch merging once
        reordering_blocks=sum(map(_reorders, blocks)),
        reorderings_met=sum(starmap(_is_met, zip_longest(path, path[1:]))),
        masks=sum(block.attn_mask is not None for block in blocks),
    )


def _reorders(block: Any) -> bool:
    """Whether the windows of `block` divide the image and hold its tokens in another order."""
    (height, width), window = block.input_resolution, block.window_size
    if height % window[0] or width % window[1]:
        return False
    tokens = torch.arange(height * width).view(1, height, width, 1)
    shifted = torch.roll(tokens, shifts=[-shift for shift in block.shift_size], dims=(1, 2))
    return not torch.equal(window_partition(shifted, window).flatten(), tokens.flatten())


def _is_met(step: Any, following: Any) -> bool:
    """Whether the gather behind `step`, a block that reorders, meets one of `following`.

    Args:
        following: the next block, or patch merging; None in front of the pooling, which meets any
            order of tokens.
    """
    if not (isinstance(step, SwinTransformerBlock) and _reorders(step)):
        return False
    if isinstance(following, PatchMerging):  # it pads an odd image
        return not any(side % 2 for side in step.input_resolution)
    return following is None or _reorders(following)


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


def _read_tokens(block: Any) -> tuple[int, ...] | None:
    """The tokens of the only window that the image has, where they are at most half; the rest is padding.

    None for over half of the tokens, and for more than one window: they are put together before padding is cut off.
    """
    (height, width), (down, across) = block.input_resolution, block.window_size
    if height > down or width > across or 2 * height * width > block.window_area:
        return None
    # timm shifts first and then pads below and to the right
    return tuple(row * across + column for row in range(height) for column in range(width))


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


class _Windows(nn.Module):
    """Stands in for a block's attention, and keeps the windows that the block makes of its tokens."""

    seen: torch.Tensor

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.seen = x
        return x


def halves(block: Any, projection: nn.Linear) -> tuple[Half, Half]:
    """Attention and MLP of `block`, each with its residual; together they are the block.

    Args:
        projection: the output projection of the block's attention.

    Source: `timm.models.swin_transformer.SwinTransformerBlock.forward`.
    """

    def arrange(x: torch.Tensor) -> torch.Tensor:
        attention, windows = block.attn, _Windows()
        block.attn = windows
        try:
            block._attn(x)
        finally:
            block.attn = attention
        return windows.seen  # [B·W, N, D]

    return (
        Half(projection, lambda x: x + block._attn(block.norm1(x)), None, arrange),
        Half(block.mlp.fc2, lambda x: x + block.mlp(block.norm2(x)), None, lambda x: x),
    )
