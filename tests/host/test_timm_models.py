"""Every model of timm that has attention is refused with a true reason, or can be frozen and then exported.

Models are made on torch's meta device, without weights, and two blocks deep where depth is an argument: the blocks of a
model are alike. Of classes that are refused whole, one model for each is made. What is accepted must be of a kind that
`test_every_kind_is_frozen_and_exported` proves, so that a kind which a later timm brings is noticed.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from timm.layers import RmsNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm_kinds import OTHER_KINDS, TIMM_KINDS, kind_of, make_strong, small_backbones
from tiny_models import SWIN_FAMILY, SWIN_KWARGS, make_member, make_model, save_weights
from torch import nn

from eamdeploy import export, freeze
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.errors import UnsupportedGraph
from eamdeploy.host import swin, vit
from eamdeploy.host.attention import attention_sites
from eamdeploy.host.model import ModelSpec, preprocessing_of
from eamdeploy.host.sites import class_of
from eamdeploy.images.options import TIMM_PREPROCESSING
from eamdeploy.images.source import ImageSource
from eamdeploy.vocabulary import Exporter

SUPPORTED = (VisionTransformer, VisionTransformerDistilled, SwinTransformer)
MODULE_OF = {name: sys.modules[timm.model_entrypoint(name).__module__] for name in timm.list_models()}

REFUSED = {
    r"(test_vit[24]?|vit_intern300m_.*)": "dynamic_img_size makes the token count depend on the image",
    r"beit3_.*": r"blocks\.0\.attn normalizes its output",
    r"vit_(.*_xp_224|pwee_.*)": r"blocks\.0 is a ParallelScalingBlock, not a pre-norm Block",
    r"vit_dpwee_.*": r"blocks\.0 is a DiffParallelScalingBlock, not a pre-norm Block",
    r"vit_.*_18x2_224": r"blocks\.0 is a ParallelThingsBlock, not a pre-norm Block",
    r"vit_.*_rpn_224": r"blocks\.0 is a ResPostBlock, not a pre-norm Block",
    r"vit_d(wee|little)_.*": r"blocks\.0\.attn is a DiffAttention",
}
"""Models of supported classes that timm's source says are something else; all others of these classes are accepted."""

REFUSED_CLASSES = {
    "SwinTransformerV2": "cosine similarity",
    "SwinTransformerV2Cr": "cosine similarity",
    "NaFlexVit": "the number of its tokens depends on the image",
    "Cait": "talking heads",
    "Xcit": "between channels, not between tokens",
    "VOLO": "from each token alone",
    "CrossVit": "between tokens of two branches",
    "Eva": "RoPE",
    "VisionTransformerRelPos": "from relative positions",
    "Beit": "a bias of relative positions",
    "VisionTransformerSAM": "a bias that depends on the queries",
    "MaxxVit": "relative positions",
}
"""Reasons of whole classes; of others, the message says no more than the class."""


def on_meta(name: str, **kwargs: object) -> Any:
    with torch.device("meta"):
        model: Any = timm.create_model(name, **kwargs)
    for block in model.modules():
        if class_of(block) == "timm.SwinTransformerBlock" and block.attn_mask is not None:
            mask = block.get_attn_mask(device=torch.device("cpu"), dtype=torch.float32)  # its values matter
            block.register_buffer("attn_mask", mask)
    return model


def has_supported_class(module: ModuleType) -> bool:
    return any(value in SUPPORTED for value in vars(module).values() if isinstance(value, type))


def candidates() -> list[str]:
    """Models of Python modules that know a supported class."""
    return [name for name, module in MODULE_OF.items() if has_supported_class(module)]


def one_of_each_other_class() -> list[str]:
    """The first model of each class in every other Python module that computes attention."""
    attentive = {
        module
        for module in set(MODULE_OF.values())
        if not has_supported_class(module)
        and re.search(r"softmax|scaled_dot_product|Attention", inspect.getsource(module))
    }
    first: dict[tuple[str, str], str] = {}
    for name, module in MODULE_OF.items():
        if module in attentive:
            returns = timm.model_entrypoint(name).__annotations__.get("return")
            first.setdefault((module.__name__, str(returns)), name)
    return list(first.values())


@cache
def proven_kinds() -> frozenset[tuple[object, ...]]:
    with small_backbones():
        return frozenset(kind_of(on_meta(name, **kwargs)) for name, kwargs in TIMM_KINDS.items())


# --- the walk --------------------------------------------------------------------------------------------------------


def test_every_model_of_a_supported_class_is_accepted_as_a_proven_kind_or_refused_with_its_reason() -> None:
    seen = set()
    for name in candidates():
        shallow = {} if MODULE_OF[name].__name__.endswith("swin_transformer") else {"depth": 2}
        model = on_meta(name, num_classes=10, **shallow)
        reason = next((why for names, why in REFUSED.items() if re.fullmatch(names, name)), None)
        if reason is not None:
            seen.add(reason)
            with pytest.raises(UnsupportedGraph, match=f"this model is not supported: .*{reason}"):
                attention_sites(model)
        elif isinstance(model, SwinTransformer):
            assert len(attention_sites(model)) == sum(len(stage.blocks) for stage in model.layers), name
        else:
            assert len(attention_sites(model)) == 2, name
            assert preprocessing_of(model, TIMM_PREPROCESSING).size == tuple(model.patch_embed.img_size), name
            assert kind_of(model) in proven_kinds(), f"{name} is of a kind that no export proves: add it to TIMM_KINDS"
    assert seen == set(REFUSED.values()), "a line of REFUSED has no model"


def test_every_other_class_with_attention_is_refused_with_its_reason() -> None:
    seen = set()
    for name in one_of_each_other_class():
        model = on_meta(name)
        kind = type(model).__name__
        reason = REFUSED_CLASSES.get(kind, "")
        with pytest.raises(UnsupportedGraph, match=rf"^models of class {kind} are not supported.*{reason}.*; expected"):
            attention_sites(model)
        seen.add(kind)
    assert seen >= REFUSED_CLASSES.keys() and len(seen) > 40


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit4", "vit_intern300m_patch14_448"])
def test_what_the_hint_for_dynamic_images_says_helps(name: str) -> None:
    with pytest.raises(UnsupportedGraph, match=r"Try --model-kwargs dynamic_img_size=False\.$"):
        attention_sites(on_meta(name, depth=2, num_classes=10))
    model = on_meta(name, depth=2, num_classes=10, dynamic_img_size=False)
    assert len(attention_sites(model)) == 2 and kind_of(model) in proven_kinds()


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("vit_small_patch14_dinov2", {}, r"no classifier \(num_classes=0\)\. Give it one with --model-kwargs num_cla"),
        ("vit_small_r26_s32_224", {"in_chans": 1}, "its input does not have 3 channels"),
        ("vit_base_mci_224", {"in_chans": 4}, "its input does not have 3 channels"),
    ],
)
def test_whole_models_that_cannot_be_exported_are_refused(name: str, kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedGraph, match=f"this model is not supported: .*{reason}"):
        attention_sites(on_meta(name, **kwargs))


@pytest.mark.parametrize(
    "name",
    ["aimv2_3b_patch14_224", "vit_so400m_patch14_siglip_gap_378", "vitamin_xlarge_384", "vit_giant_patch14_dinov2"],
)
def test_large_models_are_accepted(name: str) -> None:
    model = on_meta(name, num_classes=10)
    assert len(attention_sites(model)) == len(model.blocks)


# --- what arguments and hands can make of a model -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("vit_tiny_patch16_224", {"act_layer": "hard_swish"}, r"blocks\.0\.mlp\.act is a torch\.Hardswish, which none"),
        ("vit_tiny_patch16_224", {"norm_layer": "layernormfp32"}, r"blocks\.0\.norm1 is a timm\.LayerNormFp32, which"),
        ("vit_tiny_patch16_224", {"global_pool": "prr"}, "pooling 'prr' has an attention of its own"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "it does not pool its tokens"),
        (
            *("vit_tiny_patch16_224", {"dynamic_img_pad": True, "img_size": 230}),
            "dynamic_img_pad adds patches that have no position",
        ),
        (
            *("deit_tiny_distilled_patch16_224", {"no_embed_class": True}),
            "no_embed_class=True makes timm add the positions of all tokens",
        ),
        (
            *("swin_tiny_patch4_window7_224", {"norm_layer": RmsNorm}),
            r"patch_embed\.norm is a timm\.RmsNorm, which none of the supported models has",
        ),
    ],
)
def test_arguments_that_make_something_unproven_are_refused(name: str, kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedGraph, match=f"this model is not supported: .*{reason}"):
        attention_sites(on_meta(name, **kwargs))


def test_dynamic_padding_that_adds_nothing_is_accepted() -> None:
    assert attention_sites(on_meta("vit_tiny_patch16_224", dynamic_img_pad=True, depth=2))


def test_a_foreign_module_anywhere_is_refused() -> None:
    class Mlp(nn.Module):
        """Of a class with the name of a known one, but of another package."""

    for model, path in ((make_model(), "blocks.1.mlp"), (make_member("swin"), "layers.1.blocks.0.mlp")):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Mlp())
        with pytest.raises(UnsupportedGraph, match=rf"{re.escape(path)} is a \w+\.Mlp, which none of the supported"):
            attention_sites(model)


def test_every_known_class_of_modules_is_in_a_model_that_is_exported() -> None:
    with small_backbones():
        vits = [on_meta(name, **kwargs) for name, kwargs in kinds().values()]
    swins = [on_meta(name, **{**SWIN_KWARGS, **changes}) for name, changes in swin_kinds().values()]
    assert {class_of(module) for model in vits for module in model.modules()} == vit.MODULES
    assert {class_of(module) for model in swins for module in model.modules()} == swin.MODULES


# --- the proofs ------------------------------------------------------------------------------------------------------


def kinds() -> dict[str, tuple[str, Mapping[str, Any]]]:
    return {**{name: (name, kwargs) for name, kwargs in TIMM_KINDS.items()}, **OTHER_KINDS}


SWIN_POOLS = {
    f"swin, {pool}": ("swin_tiny_patch4_window7_224", {"global_pool": pool}) for pool in ("avgmax", "catavgmax")
}


def swin_kinds() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Those that are exported here, or in test_export_matrix.py."""
    return {**SWIN_FAMILY, **SWIN_POOLS}


BY_DEFAULT = {
    *("vit_base_patch32_siglip_256", "vit_giant_patch14_reg4_dinov2"),
    *("aimv2_large_patch14_224", "vit_base_mci_224"),
}
"""Kinds with operators of their own, exported as users do by default; the others are by the faster exporter."""


@pytest.fixture
def backbones() -> Iterator[None]:
    with small_backbones():
        yield


@pytest.mark.usefixtures("backbones")
@pytest.mark.parametrize("kind", [*kinds(), *SWIN_POOLS])
def test_every_kind_is_frozen_and_exported(kind: str, pictures: Path, tmp_path: Path) -> None:
    """`export` compares the graph with the reference forward in torch on 16 images, and raises if they differ."""
    name, kwargs = {**kinds(), **{k: (n, {**SWIN_KWARGS, **c}) for k, (n, c) in SWIN_POOLS.items()}}[kind]
    weights = save_weights(make_strong(name, kwargs), tmp_path / "weights.safetensors")
    source, checkpoint = ImageSource(pictures, limit=8), tmp_path / "x.eam.safetensors"
    options = FreezeOptions(sparsity=0.5, score="variance")
    header = freeze(ModelSpec(name, str(weights), kwargs), source, checkpoint, options)
    assert kinds().keys() >= BY_DEFAULT
    exporter: Exporter = "auto" if kind in BY_DEFAULT else "torchscript"
    done = export(checkpoint, tmp_path / "x.onnx", exporter=exporter, images=source)
    assert done.frozen.parity.passed and {"canonical_attention", "freeze_heads"} <= set(done.frozen.rewrites)
    assert sum(map(len, header.freezing.heads.values())) > 0
