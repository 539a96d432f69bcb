from __future__ import annotations

from typing import Any

import pytest

from eamdeploy.engines.manifest import FrozenMapLayer
from eamdeploy.engines.trt.inspect import read_layers
from eamdeploy.engines.trt.request import FrozenMap

MAP = FrozenMap("a/map/integers", frozenset({"a/map/integers", "a/map", "a/map_view", "a/context"}), (6, 3))


def tensor(name: str, form: str = "Half row major") -> dict[str, Any]:
    return {"Name": name, "Format/Datatype": form}


def where(*layers: Any) -> list[tuple[str | None, str | None]]:
    return [(item.layer, item.type) for item in read_layers(list(layers), [MAP]).frozen_maps]


@pytest.mark.parametrize("key", ["weights", "Weights", "Constants"])
def test_layer_with_the_maps_weights_holds_it_in_their_type(key: str) -> None:
    holds = {"Name": "a/map_view", "LayerType": "Constant", key: {"Type": "Int8", "Count": 18}}
    reads = {"Name": "a/context", "LayerType": "MatrixMultiply", "Inputs": [tensor("a/map_view")]}
    assert where(reads, holds) == [("a/map_view", "Int8")]


def test_map_folded_into_its_product_is_named_with_the_outputs_type() -> None:
    fused = {"Name": "{ForeignNode[other + a/context]}", "LayerType": "Myelin", "Outputs": [tensor("y", "Float")]}
    assert where({"Name": "stem"}, fused) == [("{ForeignNode[other + a/context]}", "Float")]


@pytest.mark.parametrize(
    "layer",
    [
        {"Name": "x", "Metadata": "[ONNX Layer: a/map_view][ONNX Layer: b]"},
        {"Name": "x", "Metadata": "[ONNX Layer: b]\x1e[ONNX Layer: a/context]"},
        {"Name": "x", "Inputs": [tensor("a/map")]},
        {"Name": "p + a/context + q"},
        "a/context",
    ],
    ids=["metadata", "two layers", "input", "fused name", "bare name"],
)
def test_any_way_of_naming_it_counts(layer: Any) -> None:
    assert [name for name, _ in where(layer)] == [layer if isinstance(layer, str) else layer["Name"]]


@pytest.mark.parametrize("name", ["a/map_view_2", "b/a/map", "a/mapper", "a"])
def test_a_name_that_only_contains_it_does_not_count(name: str) -> None:
    assert read_layers([name], [MAP]).frozen_maps == [
        FrozenMapLayer(frozen_map="a/map/integers", layer=None, type=None)
    ]


def test_fused_attention_is_told_by_the_layers_or_the_kernels_name() -> None:
    layers = [
        {"Name": "_gemm_mha_v2_0x1", "LayerType": "kgen"},
        {"Name": "__myl_Fc", "TacticName": "fused_mha_v2_fp16_S_64_sm87"},
        {"Name": "amharic", "TacticName": "sm80_xmma_gemm"},
        "_gemm_mha_v2_0x2",
    ]
    found = read_layers(layers, [])
    assert found.layers == 4
    assert found.fused_attention == ["_gemm_mha_v2_0x1", "__myl_Fc", "_gemm_mha_v2_0x2"]
    assert found.frozen_maps == []
