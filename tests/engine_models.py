"""A small classifier with frozen integer maps, as an ONNX model and in numpy, for tests of engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from eamdeploy.artifacts.card import CARD_KEY, Freezing, ModelCard, Preprocessing
from eamdeploy.convert.ort_form import OrtForm
from eamdeploy.engines.manifest import Manifest
from eamdeploy.images.preprocess import normalize
from eamdeploy.observer import SILENT
from eamdeploy.parity.gate import TOLERANCES
from eamdeploy.parity.reference_set import ReferenceSet
from eamdeploy.stages.ort_forms import Request
from eamdeploy.stages.ort_forms import build as build_form
from eamdeploy.vocabulary import ProviderName

SIZE, PATCH, N, D, HEADS, CLASSES = 8, 4, 4, 16, 2, 5
HEAD_SIZE = D // HEADS

CARD = ModelCard(
    timm_model="test_vit",
    weights="random",
    num_classes=CLASSES,
    preprocessing=Preprocessing(size=(SIZE, SIZE), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
    freezing=Freezing(
        bits=4, quantizer="uniform", score="variance", sparsity_asked=1.0, sparsity=1.0, heads={"blocks.0.attn": [0, 1]}
    ),
)


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """Patches → values → frozen maps · values → mean over tokens → logits."""

    patch: NDArray[np.float32]  # [D,3,PATCH,PATCH]
    codes: NDArray[np.uint8]  # [HEADS·N,N]
    scales: NDArray[np.float32]  # [HEADS·N]
    head: NDArray[np.float32]  # [D,CLASSES]

    def forward(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits float32 [B,CLASSES], computed without ONNX."""
        B, side = len(images), SIZE // PATCH
        patches = images.reshape(B, 3, side, PATCH, side, PATCH).transpose(0, 2, 4, 1, 3, 5).reshape(B, N, -1)
        tokens = patches @ self.patch.reshape(D, -1).T  # [B,N,D]
        maps = (self.codes * self.scales[:, None]).reshape(HEADS, N, N)
        values = tokens.reshape(B, N, HEADS, HEAD_SIZE).transpose(0, 2, 1, 3)
        mixed = (maps @ values).transpose(0, 2, 1, 3).reshape(B, N, D)
        return np.asarray(mixed.mean(axis=1) @ self.head, np.float32)

    def to_onnx(self, batch: int | str = "batch", card: ModelCard | None = CARD) -> onnx.ModelProto:
        """The model with a fixed (int) or dynamic (name) batch."""
        constants = {
            "patch": self.patch,
            "codes": self.codes,
            "scales": self.scales,
            "zeros": np.zeros(HEADS * N, np.uint8),
            "map_shape": np.array([1, HEADS, N, N]),
            "token_shape": np.array([0, D, N]),
            "head_shape": np.array([0, N, HEADS, HEAD_SIZE]),
            "merged_shape": np.array([0, N, D]),
            "head": self.head,
        }
        nodes = [
            helper.make_node("Conv", ["image", "patch"], ["grid"], strides=[PATCH, PATCH]),
            helper.make_node("Reshape", ["grid", "token_shape"], ["flat"]),
            helper.make_node("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1]),
            helper.make_node("Reshape", ["tokens", "head_shape"], ["split"]),
            helper.make_node("Transpose", ["split"], ["values"], perm=[0, 2, 1, 3]),
            helper.make_node("DequantizeLinear", ["codes", "scales", "zeros"], ["rows"], axis=0),
            helper.make_node("Reshape", ["rows", "map_shape"], ["maps"]),
            helper.make_node("MatMul", ["maps", "values"], ["mixed"]),
            helper.make_node("Transpose", ["mixed"], ["mixed_tokens"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", ["mixed_tokens", "merged_shape"], ["merged"]),
            helper.make_node("ReduceMean", ["merged"], ["pooled"], axes=[1], keepdims=0),
            helper.make_node("MatMul", ["pooled", "head"], ["logits"]),
        ]
        graph = helper.make_graph(
            nodes,
            "frozen",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, SIZE, SIZE])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        if card is not None:
            helper.set_model_props(model, {CARD_KEY: card.model_dump_json()})
        onnx.checker.check_model(model, full_check=True)
        return model

    def reference(self, n: int = 6, seed: int = 1) -> ReferenceSet:
        """Random images and the model's logits for them."""
        pixels = np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), np.uint8)
        return ReferenceSet(pixels, self.forward(normalize(pixels, CARD.preprocessing)), "synthetic")


def make_frozen_model(seed: int = 0) -> FrozenModel:
    """Random weights; every row of the frozen maps sums to 1."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 16, (HEADS * N, N), np.uint8)
    codes[:, 0] += 1
    return FrozenModel(
        patch=(rng.standard_normal((D, 3, PATCH, PATCH)) * 0.3).astype(np.float32),
        codes=codes,
        scales=(1 / codes.sum(axis=1)).astype(np.float32),
        head=rng.standard_normal((D, CLASSES)).astype(np.float32),
    )


def build(
    model: Path, output: Path, *, threads: int, reference: ReferenceSet | None, provider: ProviderName = "cpu"
) -> Manifest:
    """The model as it is has become an engine of ONNX Runtime."""
    request = Request(model, output, threads, None, reference, TOLERANCES["f32-engine"])
    return build_form(request, [OrtForm(provider=provider)], SILENT)
