"""Small timm models with random weights and their stock ONNX exports, each made once for all tests that read them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any, TypeAlias
from unittest.mock import patch

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from attention_graphs import Floats
from numpy.typing import NDArray
from tiny_models import FAMILY, KWARGS, NAME, SWIN_FAMILY, SWIN_NAME, images, make_model

from eamdeploy.graph.frozen import IntegerFactors, IntegerMaps
from eamdeploy.graph.model import copy_of, to_graph
from eamdeploy.host.attention import Constants, Factors, attention_sites, freeze_attention
from eamdeploy.host.sites import AttentionSite
from eamdeploy.host.stock_export import export_stock
from eamdeploy.passes.freeze_heads import AttentionModule
from eamdeploy.vocabulary import Exporter

SIZE, D, H, DEPTH = KWARGS["img_size"], KWARGS["embed_dim"], KWARGS["num_heads"], KWARGS["depth"]
HEAD_DIM = D // H

ManyFactors: TypeAlias = Mapping[int, tuple[IntegerFactors, ...]]
"""By number of the module."""
_NONE: ManyFactors = MappingProxyType({})

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "vit": FAMILY["vit"],
        "distilled": FAMILY["distilled"],
        "layer-scale": FAMILY["deit-3"],
        "avg-pool": FAMILY["average pooling"],
        "no-qkv-bias": FAMILY["no qkv bias"],
        "qk-norm": FAMILY["q/k norm"],
        "qk-rms-norm": (NAME, {"qk_norm": True, "norm_layer": "rmsnorm"}),
        "registers": FAMILY["registers"],
    }
)
SWIN_VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "swin": SWIN_FAMILY["swin"],
        "swin-padded": SWIN_FAMILY["swin, padded"],
        "swin-oblong": SWIN_FAMILY["swin, oblong windows"],
        "swin-partitioned": SWIN_FAMILY["swin, always partitioned"],
        # four padded windows, then one of 36 tokens for an image of 16
        "swin-larger": SWIN_FAMILY["swin, a window larger than the image"],
        # twelve windows of four classes, then four padded ones; enough heads to freeze some, parts of some, and none
        "swin-many": (SWIN_NAME, {**SWIN_FAMILY["swin, more windows than classes"][1], "num_heads": (4, 4)}),
    }
)
IMAGES: Floats = images(4).numpy()[:2]  # of every ViT


@cache
def timm_model(variant: str) -> Any:
    """The model; read, never changed."""
    name, changes = {**VARIANTS, **SWIN_VARIANTS}[variant]
    return make_model(name, dict(changes))


def sites_of(variant: str) -> list[AttentionSite]:
    """Its attention modules."""
    return attention_sites(timm_model(variant))


def images_of(variant: str, n: int = 2) -> Floats:
    """Images of its size, float32 [n,3,height,width]; the first are the same for every n."""
    return np.asarray(images(4, timm_model(variant).patch_embed.img_size).numpy()[:n])


@dataclass(frozen=True)
class Export:
    """A stock export; `fused` leaves attention to torch's fused operator."""

    variant: str
    exporter: Exporter
    batch: int | None
    opset: int
    fused: bool = False

    def __str__(self) -> str:
        batch = "dynamic" if self.batch is None else self.batch
        return f"{self.variant}-{self.exporter}-{batch}-{self.opset}" + ("-fused" if self.fused else "")

    def model(self) -> onnx.ModelProto:
        """As torch writes it; a copy of what is made once."""
        return onnx.load_from_string(_stock_bytes(self))

    def graph(self) -> gs.Graph:
        """Its graph, to be rewritten; a copy of what is parsed and measured once."""
        return copy_of(_graph(self))


EXPORTS = (
    *(Export(variant, "dynamo", None, 18) for variant in VARIANTS),
    *(Export(variant, "torchscript", batch, 17) for variant in VARIANTS for batch in (None, 2)),
    Export("vit", "dynamo", None, 17),
    Export("qk-norm", "torchscript", None, 16),
    Export("distilled", "torchscript", 1, 16),
    Export("vit", "torchscript", None, 20),
    Export("vit", "dynamo", None, 18, fused=True),
    Export("qk-norm", "dynamo", 2, 18, fused=True),
    Export("vit", "torchscript", None, 17, fused=True),
    Export("qk-norm", "torchscript", 2, 17, fused=True),
)

SWIN_EXPORTS = (
    *(Export(variant, "torchscript", None, 17) for variant in SWIN_VARIANTS),
    *(Export("swin", "torchscript", batch, 17) for batch in (1, 2, 4)),
    Export("swin-many", "torchscript", 1, 17),
    Export("swin-padded", "torchscript", 2, 17),
    Export("swin", "dynamo", None, 18),
    Export("swin", "dynamo", 1, 18),
)


@cache
def _stock_bytes(export: Export) -> bytes:
    with patch("eamdeploy.host.stock_export._unfused", _left_as_it_is) if export.fused else nullcontext():
        stock = export_stock(
            timm_model(export.variant),
            timm_model(export.variant).patch_embed.img_size,
            batch=export.batch,
            opset=export.opset,
            exporter=export.exporter,
        )
    return stock.model.SerializeToString()


@cache
def _graph(export: Export) -> gs.Graph:
    return to_graph(export.model())


def _left_as_it_is(model: Any) -> AbstractContextManager[None]:
    return nullcontext()


def modules_of(
    variant: str, frozen: Mapping[int, IntegerMaps] | None = None, factors: ManyFactors = _NONE
) -> list[AttentionModule]:
    """The attention modules, those of the given numbers frozen."""
    model = timm_model(variant)
    modules = []
    for index, site in enumerate(sites_of(variant)):
        rows = model.get_submodule(site.path).qkv.weight.detach().numpy()
        values, maps = rows[2 * len(rows) // 3 :], (frozen or {}).get(index)
        modules.append(AttentionModule(site.path, values, maps, factors=factors.get(index, ())))
    return modules


def planned_modules(
    variant: str, frozen: Mapping[int, IntegerMaps] | None = None, factors: ManyFactors = _NONE
) -> list[AttentionModule]:
    """The same with what `plan_passes` wants to know of each: the tokens that the classifier reads."""
    read = [site.read_tokens for site in sites_of(variant)]
    modules = modules_of(variant, frozen, factors)
    return [replace(module, read_tokens=t) for module, t in zip(modules, read, strict=True)]


def tokens_of(variant: str) -> int:
    """N of the first module."""
    return sites_of(variant)[0].tokens


def random_maps(
    heads: tuple[int, ...],
    tokens: int,
    seed: int = 0,
    windows: tuple[int, ...] = (0,),
    mask: NDArray[np.bool_] | None = None,
) -> IntegerMaps:
    """Maps of random squares of 4-bit codes; the frozen part of a row sums to its share of the row's entries."""
    codes = np.random.default_rng(seed).integers(0, 16, (len(heads), max(windows) + 1, tokens, tokens), np.uint8)
    if mask is None:
        codes[..., 0] += codes.sum(axis=-1) == 0
        integers = (codes**2).astype(np.uint8)
        return IntegerMaps(heads, integers, (1 / integers.sum(axis=-1)).astype(np.float32), windows)
    frozen = np.broadcast_to(mask.reshape(len(heads), 1, tokens, -1), codes.shape)
    integers = np.where(frozen, np.maximum(codes, 1) ** 2, 0).astype(np.uint8)
    scales = (frozen.mean(axis=-1) / np.maximum(integers.sum(axis=-1), 1)).astype(np.float32)
    return IntegerMaps(heads, integers, scales, windows, mask)


def random_factors(
    heads: tuple[int, ...], tokens: int, rank: int, seed: int = 0, windows: tuple[int, ...] = (0,)
) -> IntegerFactors:
    """Factors of random squares of 4-bit codes, whose rows sum to 1."""
    rng = np.random.default_rng(seed)
    form = (len(heads), max(windows) + 1)
    mix, pool = (
        (rng.integers(1, 16, shape, np.uint8) ** 2).astype(np.uint8)
        for shape in ((*form, tokens, rank), (*form, rank, tokens))
    )
    scales = [(1 / part.sum(axis=-1)).astype(np.float32) for part in (mix, pool)]
    return IntegerFactors(heads, mix, scales[0], pool, scales[1], windows)


def torch_logits(variant: str, frozen: Mapping[int, IntegerMaps], n: int = 2, factors: ManyFactors = _NONE) -> Floats:
    """Logits of the first n images by the reference forward with these maps and factors in the modules of these
    numbers.
    """
    model = copy.deepcopy(timm_model(variant))
    sites = sites_of(variant)
    constants = {sites[i].path: _constants(sites[i], frozen.get(i), factors.get(i, ())) for i in {*frozen, *factors}}
    freeze_attention(model, constants)
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(images_of(variant, n))).numpy(), np.float32)


def _constants(site: AttentionSite, maps: IntegerMaps | None, groups: tuple[IntegerFactors, ...]) -> Constants:
    has_windows = site.classes is not None
    factors = tuple(
        Factors(
            torch.tensor(group.heads),
            *(
                torch.from_numpy(values if has_windows else values[:, 0])
                for values in (
                    group.mix * group.mix_scales[..., None],
                    group.pool * group.pool_scales[..., None],
                )
            ),
        )
        for group in groups
    )
    if maps is None:
        windows = groups[0].windows if has_windows else None
        n_maps = () if windows is None else (max(windows) + 1,)
        nothing = torch.zeros(0, *n_maps, site.tokens, site.tokens)
        return Constants(torch.zeros(0, dtype=torch.int64), nothing, None, windows, factors)
    values = torch.from_numpy(maps.integers * maps.scales[..., None])
    mask = None if maps.mask is None else torch.from_numpy(maps.mask)
    return Constants(
        torch.tensor(maps.heads),
        values if has_windows else values[:, 0],
        mask,
        maps.windows if has_windows else None,
        factors,
    )
