"""One small model of every kind of timm model that is supported, and what makes a kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import timm
import torch
from timm.models import vision_transformer_hybrid, vitamin
from timm.models.resnet import resnet26d
from timm.models.resnetv2 import ResNetV2

from eamdeploy.host.sites import class_of

_SMALL: Mapping[str, Any] = {
    **{"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "num_classes": 10,
}
_HYBRID: Mapping[str, Any] = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}

TIMM_KINDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "deit_tiny_patch16_224": _SMALL,
        "deit_tiny_distilled_patch16_224": _SMALL,
        "deit3_small_patch16_224": _SMALL,
        "vit_base_patch16_224_miil": _SMALL,
        "vit_base_patch16_clip_224": _SMALL,
        "vit_base_patch32_clip_quickgelu_224": _SMALL,
        "vit_base_patch16_siglip_gap_224": _SMALL,
        "vit_base_patch16_siglip_224": _SMALL,
        "vit_base_patch32_siglip_gap_256": _SMALL,
        "vit_base_patch32_siglip_256": _SMALL,
        "vit_small_patch14_dinov2": _SMALL,
        "vit_small_patch14_reg4_dinov2": _SMALL,
        "vit_giant_patch14_dinov2": _SMALL,
        "vit_giant_patch14_reg4_dinov2": _SMALL,
        "vit_huge_patch16_radio_v3": _SMALL,
        "vit_base_patch16_radio_v3": _SMALL,
        "aimv2_large_patch14_224": _SMALL,
        "eva_large_patch14_196": _SMALL,
        "flexivit_small": _SMALL,
        "vit_medium_patch16_gap_240": _SMALL,
        "vit_betwixt_patch16_reg4_gap_256": _SMALL,
        "vit_so150m_patch16_reg4_gap_256": _SMALL,
        "vit_so150m_patch16_reg4_map_256": _SMALL,
        "vit_so150m2_patch16_reg1_gap_256": _SMALL,
        "vit_base_patch16_reg4_gap_256": _SMALL,
        "test_vit2": {**_SMALL, "dynamic_img_size": False},
        "test_vit3": _SMALL,
        "test_vit4": {**_SMALL, "dynamic_img_size": False},
        "vit_intern300m_patch14_448": {**_SMALL, "dynamic_img_size": False},
        "vit_tiny_r_s16_p8_224": _HYBRID,
        "vit_small_r26_s32_224": _HYBRID,
        "vit_small_resnet26d_224": _HYBRID,
        "vit_base_mci_224": _HYBRID,
        "vitamin_small_224": _HYBRID,
        "vitamin_xlarge_256": _HYBRID,
    }
)
"""A timm name for each kind of ViT that timm has and that is supported, and the arguments that make it small."""

OTHER_KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "maxima": ("vit_tiny_patch16_224", {**_SMALL, "global_pool": "max", "img_size": (24, 40)}),
        "means and maxima": ("vit_tiny_patch16_224", {**_SMALL, "global_pool": "avgmax", "reg_tokens": 2}),
        "few patches": ("vit_tiny_patch16_224", {**_SMALL, "global_pool": "avg", "reg_tokens": 4, "img_size": 8}),
        "means of all tokens": (
            "vit_tiny_patch16_224",
            {**_SMALL, "global_pool": "avg", "pool_include_prefix": True, "pos_embed": "none"},
        ),
        "class token and RMS norms": (
            "vit_tiny_patch16_224",
            {**_SMALL, "norm_layer": "rmsnorm", "qk_norm": True, "pre_norm": True},
        ),
        "gated, class token": ("aimv2_large_patch14_224", {**_SMALL, "class_token": True, "global_pool": "token"}),
        "norm inside the MLP": ("vit_tiny_patch16_224", {**_SMALL, "scale_mlp_norm": True, "qk_norm": True}),
        "every drop rate": (
            "vit_tiny_patch16_224",
            {
                **_SMALL,
                **{"drop_rate": 0.1, "pos_drop_rate": 0.1, "patch_drop_rate": 0.5, "proj_drop_rate": 0.1},
                **{"attn_drop_rate": 0.1, "drop_path_rate": 0.1},
            },
        ),
    }
)
"""What arguments make of timm's models."""


@contextmanager
def small_backbones() -> Iterator[None]:
    """Inside the block, the CNNs in front of hybrids have few channels; their modules are of timm's classes."""
    conv_stem, stages = vision_transformer_hybrid.ConvStem, vitamin.MbConvStages
    few = vitamin.VitCfg(embed_dim=(8, 16, _HYBRID["embed_dim"]), depths=(1, 2, 1), stem_width=8)
    channels = (8, 8, _HYBRID["embed_dim"])
    resnet: dict[str, Any] = {"layers": (1, 2), "channels": (128, 128)}  # norms of 32 groups want no fewer
    with (
        patch.object(vision_transformer_hybrid, "ResNetV2", lambda **how: ResNetV2(**{**how, **resnet})),
        patch.object(vision_transformer_hybrid, "resnet26d", partial(resnet26d, channels=(8, 8, 8, 8))),
        patch.object(vision_transformer_hybrid, "ConvStem", lambda **how: conv_stem(**{**how, "channels": channels})),
        patch.object(vitamin, "MbConvStages", lambda **how: stages(**{**how, "cfg": few})),
    ):
        yield


def make_strong(name: str, kwargs: Mapping[str, Any]) -> Any:
    """A model in evaluation mode; the weights of its ViT are strong enough that its maps depend on the image."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if not path.startswith("patch_embed.backbone"):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def kind_of(model: Any) -> tuple[object, ...]:
    """What an export of a ViT may depend on, sizes aside: models of equal kinds differ in sizes and weights alone."""
    embed = model.patch_embed
    tokens = (model.cls_token, model.reg_token, getattr(model, "dist_token", None), model.pos_embed)
    return (
        class_of(model),
        frozenset(map(class_of, embed.modules())),
        _parameters(embed.proj),
        tuple(part is not None for part in tokens),
        model.no_embed_class,
        model.pool_include_prefix,
        model.global_pool,
        *(class_of(part) for part in (model.norm_pre, model.norm, model.fc_norm, model.attn_pool)),
        frozenset(_block_kind(block) for block in model.blocks),
    )


def _block_kind(block: Any) -> tuple[object, ...]:
    parts = (block.norm1, block.attn, block.ls1, block.norm2, block.mlp, block.ls2)
    inside = (module for part in parts for module in part.modules())
    classes = tuple(class_of(module) for module in inside if not class_of(module).endswith(("Dropout", "DropPath")))
    return (*classes, *(_parameters(part) for part in parts), block.attn.attn_dim == block.attn.proj.out_features)


def _parameters(module: Any) -> tuple[str, ...]:
    return tuple(path for path, _ in module.named_parameters())
