"""Small timm models with random weights and their stock ONNX exports, each made once for all tests that read them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import torch
from attention_graphs import Floats
from tiny_models import FAMILY, KWARGS, NAME, images, make_model

from eamdeploy.graph.frozen import IntegerMaps
from eamdeploy.host.attention import Constants, attention_sites, freeze_attention
from eamdeploy.host.stock_export import Exporter, export_stock
from eamdeploy.passes.freeze_heads import AttentionModule

SIZE, D, H, DEPTH = KWARGS["img_size"], KWARGS["embed_dim"], KWARGS["num_heads"], KWARGS["depth"]
HEAD_DIM = D // H

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
IMAGES: Floats = images(2).numpy()


@cache
def timm_model(variant: str) -> Any:
    """The model; read, never changed."""
    name, changes = VARIANTS[variant]
    return make_model(name, dict(changes))


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


EXPORTS = (
    *(Export(variant, "dynamo", None, 18) for variant in VARIANTS),
    # torchscript does not know aten::rms_norm
    *(Export(variant, "torchscript", batch, 17) for variant in VARIANTS if "rms" not in variant for batch in (None, 2)),
    Export("vit", "dynamo", None, 17),
    Export("qk-norm", "torchscript", None, 16),
    Export("distilled", "torchscript", 1, 16),
    Export("vit", "torchscript", None, 20),
    Export("vit", "dynamo", None, 18, fused=True),
    Export("qk-norm", "dynamo", 2, 18, fused=True),
    Export("vit", "torchscript", None, 17, fused=True),
    Export("qk-norm", "torchscript", 2, 17, fused=True),
)


@cache
def _stock_bytes(export: Export) -> bytes:
    with patch("eamdeploy.host.stock_export._unfused", _left_as_it_is) if export.fused else nullcontext():
        stock = export_stock(
            timm_model(export.variant),
            (SIZE, SIZE),
            batch=export.batch,
            opset=export.opset,
            exporter=export.exporter,
        )
    return stock.model.SerializeToString()


def _left_as_it_is(model: Any) -> AbstractContextManager[None]:
    return nullcontext()


def modules_of(variant: str, frozen: Mapping[int, IntegerMaps] | None = None) -> list[AttentionModule]:
    """The attention modules, those with the given block numbers frozen."""
    model = timm_model(variant)
    return [
        AttentionModule(
            site.path, model.get_submodule(site.path).qkv.weight[2 * D :].detach().numpy(), (frozen or {}).get(i)
        )
        for i, site in enumerate(attention_sites(model))
    ]


def tokens_of(variant: str) -> int:
    """N."""
    return attention_sites(timm_model(variant))[0].tokens


def random_maps(heads: tuple[int, ...], tokens: int, seed: int = 0) -> IntegerMaps:
    """Maps of random squares of 4-bit codes, each row summing to 1."""
    codes = np.random.default_rng(seed).integers(0, 16, (len(heads), 1, tokens, tokens), np.uint8)
    codes[..., 0] += codes.sum(axis=-1) == 0
    integers = (codes**2).astype(np.uint8)
    return IntegerMaps(heads, integers, (1 / integers.sum(axis=-1)).astype(np.float32))


def torch_logits(variant: str, frozen: Mapping[int, IntegerMaps]) -> Floats:
    """Logits of `IMAGES` by the reference forward with these maps in the blocks of these numbers."""
    model = copy.deepcopy(timm_model(variant))
    maps = {
        f"blocks.{i}.attn": Constants(torch.tensor(m.heads), torch.from_numpy((m.integers * m.scales[..., None])[:, 0]))
        for i, m in frozen.items()
    }
    freeze_attention(model, maps)
    with torch.no_grad():
        return np.asarray(model(torch.from_numpy(IMAGES)).numpy(), np.float32)
