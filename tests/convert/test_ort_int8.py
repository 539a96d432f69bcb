"""`build-ort --int8`: linear layers in INT8 by ONNX Runtime's own quantizer, under the gate."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from attention_graphs import Spelling
from command_line import RunCli, only_error
from onnx import numpy_helper

from eamdeploy.convert.ort_int8 import dynamic_int8
from eamdeploy.engines.manifest import Manifest, manifest_path
from eamdeploy.errors import ConfigError
from eamdeploy.graph.model import card_of
from eamdeploy.parity.reference_set import ReferenceSet, reference_path


@pytest.fixture
def model(eam_model: Path, tmp_path: Path) -> Path:
    for file in (eam_model, reference_path(eam_model)):
        shutil.copy(file, tmp_path)
    return tmp_path / eam_model.name


def test_linear_layers_but_the_classifier_become_int8() -> None:
    stock = Spelling("separate", batch="b").model()
    quantized = dynamic_int8(stock, "x")
    ops = [node.op_type for node in quantized.graph.node]
    assert ops.count("MatMulInteger") == 5  # patches, q, k, v, projection; the head and both products stay
    assert ops.count("MatMul") == 3
    stored = [numpy_helper.to_array(item) for item in quantized.graph.initializer]
    assert sum(item.dtype == np.int8 and item.ndim == 2 for item in stored) == 5
    scales = [numpy_helper.to_array(item) for item in quantized.graph.initializer if item.name.endswith("_scale")]
    assert all(scale.ndim == 1 and len(scale) > 1 for scale in scales)  # one for each column


def test_weights_are_near_and_no_two_products_overflow_whoever_reads_them() -> None:
    """One weight has two readers, and columns of zeros and nearly so; ONNX Runtime's own would have 8 full bits."""
    weight = np.random.default_rng(0).standard_normal((16, 6)).astype(np.float32)
    weight[:, 2], weight[:, 3] = 0, 1e-44
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["image", "w"], ["a"], name="a"),
            onnx.helper.make_node("Neg", ["image"], ["other"]),
            onnx.helper.make_node("MatMul", ["other", "w"], ["b"], name="b"),
            onnx.helper.make_node("Mul", ["a", "b"], ["logits"]),
        ],
        "shared",
        [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 16])],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 6])],
        [numpy_helper.from_array(weight, "w")],
    )
    stock = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    stored = {item.name: numpy_helper.to_array(item) for item in dynamic_int8(stock, "x").graph.initializer}
    integers, scales = stored["w_quantized"], stored["w_scale"]
    assert (integers.dtype, integers.shape, scales.dtype, scales.shape) == (np.int8, (16, 6), np.float32, (6,))
    assert not stored["w_zero_point"].any() and not integers[:, 2:4].any()
    np.testing.assert_allclose(integers * scales, weight, atol=float(scales.max()) / 2 * 1.001)
    pairs = integers.astype(int).reshape(8, 2, 6)
    most = [np.maximum(sign * pairs, 0).sum(axis=1).max(axis=0) for sign in (1, -1)]
    assert np.delete(np.maximum(*most), [2, 3]).min() > 120 and np.maximum(*most).max() <= 128


def test_an_engine_in_int8_is_built_checked_and_agrees(model: Path, pictures: Path, run_cli: RunCli) -> None:
    engine, twin = model.with_name("x.int8.ort.onnx"), model.with_name("x.ort.onnx")
    built = run_cli("build-ort", model, "-o", engine, "--int8", "--min-agreement", 75, "--json")
    assert built.code == 0, built.err
    manifest = Manifest.parse(built.out, "stdout")
    assert manifest == Manifest.read(manifest_path(engine))
    assert manifest.card is not None and manifest.card.rewrites[-1] == "dynamic_int8"
    assert manifest.parity is not None and manifest.parity.tolerance == "reduced-engine at 75 %"
    assert manifest.engine_digest != manifest.model_digest
    assert run_cli("build-ort", model, "-o", twin).code == 0
    assert manifest.engine_bytes < 0.6 * twin.stat().st_size
    evaluated = run_cli("evaluate", engine, "--reference", twin, "--data", pictures, "--json")
    assert json.loads(evaluated.out)["agreement"] >= 75
    assert card_of(onnx.load(engine), "x") == manifest.card
    again = only_error(run_cli("build-ort", engine, "-o", twin, "--int8", "--no-check"), 2)
    assert "is quantized already" in again


def test_an_engine_that_disagrees_is_not_written(model: Path, run_cli: RunCli, tmp_path: Path) -> None:
    """Its reference set says that every image is of another class."""
    loaded = ReferenceSet.load(reference_path(model))
    dataclasses.replace(loaded, logits=-loaded.logits).save(reference_path(model))
    engine = tmp_path / "x.int8.ort.onnx"
    assert "first class equal for" in only_error(run_cli("build-ort", model, "-o", engine, "--int8"), 3)
    assert not engine.exists() and not manifest_path(engine).exists()


def test_agreement_is_no_option_for_fp32(model: Path, run_cli: RunCli) -> None:
    refused = run_cli("build-ort", model, "-o", model.with_name("x.ort.onnx"), "--min-agreement", 90)
    assert "held to FP32's noise" in only_error(refused, 2)
    refused = run_cli("build-ort", model, "-o", model.with_name("x.ort.onnx"), "--int8", "--min-agreement", 101)
    assert "expected 0 to 100 %; got 101 %" in only_error(refused, 2)


def test_without_the_package_onnx_it_says_how_to_get_it(
    model: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "eamdeploy.convert.ort", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused = run_cli("build-ort", model, "-o", model.with_name("x.ort.onnx"), "--int8")
    assert "converting a model needs the package onnx" in only_error(refused, 4)
    assert "pip install onnx" in refused.err


def test_what_can_not_be_quantized() -> None:
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Relu", ["image"], ["logits"])],
            "none",
            [onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 4])],
            [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [1, 4])],
        )
    )
    with pytest.raises(ConfigError, match="x has no linear layer"):
        dynamic_int8(model, "x")
