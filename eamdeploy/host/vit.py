"""timm's VisionTransformer: ViT, DeiT, DeiT distilled, DeiT-III, CLIP, SigLIP, DINOv2, AIMv2, hybrids with a CNN."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from timm.models.vitamin import GeGluMlp
from torch import nn

from eamdeploy.host.sites import AttentionSite, Half, refuse_other_modules, refuse_unless
from eamdeploy.passes.facts import Parts

MODELS = (VisionTransformer, VisionTransformerDistilled)
ATTENTION = Attention
_POOLS = ("token", "avg", "avgmax", "max", "map")
_OTHER_POOLS = {"": "it does not pool its tokens (global_pool='')", "prr": "pooling 'prr' has an attention of its own"}
_BACKBONES = {
    *("timm.ResNetV2", "timm.ResNetStage", "timm.DownsampleConv", "timm.StdConv2dSame", "timm.GroupNormAct"),
    *("timm.MaxPool2dSame", "timm.ClassifierHead", "timm.SelectAdaptivePool2d", "timm.Bottleneck"),
    *("timm.FeatureListNet", "torch.BatchNorm2d", "torch.ReLU", "torch.AvgPool2d", "torch.MaxPool2d"),
    *("timm.MbConvStages", "timm.MbConvLNBlock", "timm.Stem", "timm.Downsample2d", "timm.StridedConv"),
    *("timm.LayerNorm2d", "timm.LayerNormAct2d", "timm.ConvStem", "timm.ConvNormAct", "timm.BatchNormAct2d"),
}
MODULES = frozenset(
    {
        *("timm.VisionTransformer", "timm.VisionTransformerDistilled", "timm.PatchEmbed", "timm.HybridEmbed"),
        *("timm.Block", "timm.Attention", "timm.Mlp", "timm.GluMlp", "timm.SwiGLU", "timm.GeGluMlp"),
        *("timm.LayerNorm", "timm.RmsNorm", "timm.LayerScale", "timm.AttentionPoolLatent"),
        *("timm.DropPath", "timm.PatchDropout"),
        *("timm.GELU", "timm.GELUTanh", "timm.QuickGELU", "torch.GELU", "torch.SiLU"),
        *("torch.Conv2d", "torch.Linear", "torch.Dropout", "torch.Identity", "torch.Sequential"),
        *_BACKBONES,
    }
)
"""The classes of modules that a supported model may have."""


def sites(model: Any) -> list[AttentionSite]:
    """Every attention module of `model`, in forward order.

    Raises:
        UnsupportedGraph: the model's attention is not `softmax(q·kᵀ)·v`, or the model has modules that no export was
            proved with; the reason is given.
    """
    refuse_unless(
        not model.dynamic_img_size,
        "dynamic_img_size makes the token count depend on the image",
        "Try --model-kwargs dynamic_img_size=False.",
    )
    pool = model.global_pool
    refuse_unless(pool in _POOLS, _OTHER_POOLS.get(pool, f"pooling {pool!r} is not known"))
    distilled = isinstance(model, VisionTransformerDistilled)
    refuse_unless(
        not (distilled and model.no_embed_class),
        "no_embed_class=True makes timm add the positions of all tokens of a distilled model to its patches alone",
    )
    refuse_unless(_embeds_every_patch(model), "dynamic_img_pad adds patches that have no position")
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        where = f"blocks.{index}"
        refuse_unless(type(block) is Block, f"{where} is a {type(block).__name__}, not a pre-norm Block")
        attention = block.attn
        refuse_unless(type(attention) is Attention, f"{where}.attn is a {type(attention).__name__}")
        refuse_unless(getattr(attention, "gate", None) is None, f"{where}.attn gates its output")
        norm = getattr(attention, "norm", nn.Identity())
        refuse_unless(isinstance(norm, nn.Identity), f"{where}.attn normalizes its output (scale_norm)")
    refuse_other_modules(model, MODULES)
    found = [AttentionSite(f"blocks.{i}.attn", block.attn.num_heads, tokens) for i, block in enumerate(model.blocks)]
    return [*found[:-1], *(replace(last, read_tokens=_read_tokens(model, tokens)) for last in found[-1:])]


def _embeds_every_patch(model: Any) -> bool:
    """Whether padding, if there is any, gives no more patches than timm counted without it."""
    embed = model.patch_embed
    return not embed.dynamic_img_pad or embed.dynamic_feat_size(embed.img_size) == tuple(embed.grid_size)


def _read_tokens(model: Any, tokens: int) -> tuple[int, ...] | None:
    """The tokens that the classifier, or the pooling in front of it, reads of the last block; None for over half."""
    if isinstance(model, VisionTransformerDistilled):
        read: tuple[int, ...] = (0, 1)
    elif model.global_pool == "token":
        read = (0,)
    else:
        read = tuple(range(0 if getattr(model, "pool_include_prefix", False) else model.num_prefix_tokens, tokens))
    return read if 2 * len(read) <= tokens else None


def parts(model: Any) -> Parts:
    """How often `model` has what passes change; no windows are among it."""
    attentions = [block.attn for block in model.blocks]
    plain = [each for each in attentions if isinstance(each.q_norm, nn.Identity)]
    biased = [each for each in attentions if each.qkv.bias is not None]
    return Parts(
        embeddings=int(model.num_prefix_tokens > 0 and model.pos_embed is not None),
        layer_scales=sum(isinstance(module, LayerScale) for module in model.modules()),
        scaled_queries=sum(each.scale != 1 for each in plain),
        biased_keys=sum(isinstance(each.k_norm, nn.Identity) for each in biased),
        biased_values=sum(each.proj.bias is not None for each in biased),
        token_moves=0,
        reordering_blocks=0,
        reorderings_met=0,
        masks=0,
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


def halves(block: Any, projection: nn.Linear) -> tuple[Half, Half]:
    """Attention and MLP of `block`, each with its residual; together they are the block.

    Args:
        projection: the output projection of the block's attention.

    Source: `timm.models.vision_transformer.Block.forward`.
    """
    last = block.mlp.w2 if isinstance(block.mlp, GeGluMlp) else block.mlp.fc2
    return (
        Half(projection, lambda x: x + block.ls1(block.attn(block.norm1(x))), _gamma(block.ls1), lambda x: x),
        Half(last, lambda x: x + block.ls2(block.mlp(block.norm2(x))), _gamma(block.ls2), lambda x: x),
    )


def _gamma(scale: nn.Module) -> torch.Tensor | None:
    return scale.gamma.detach() if isinstance(scale, LayerScale) else None
