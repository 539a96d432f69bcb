from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from attention_graphs import run_unoptimized
from lint_models import frozen_map
from rewriting import initializers, ops
from tiny_models import images

from eamdeploy.convert.trt_passes import plan_trt, to_trt
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import ConfigError
from eamdeploy.graph.model import card_of
from eamdeploy.lint.linter import lint
from eamdeploy.parity.gate import TOLERANCES, compare


def of(text: str) -> TrtVersion:
    return TrtVersion.parse(text)


def errors(model: onnx.ModelProto, version: str) -> set[str]:
    return {finding.rule for finding in lint(model, of(version)) if finding.severity == "error"}


@pytest.fixture(scope="module")
def stock(eam_model: Path) -> onnx.ModelProto:
    """The tiny ViT as exported for ONNX Runtime, opset 17, with 4-bit squared maps."""
    return onnx.load(eam_model)


@pytest.mark.parametrize(
    ("version", "names"),
    [
        ("8.5.2.2", ["float_maps", "decompose_layer_norm"]),
        ("8.5", ["float_maps", "decompose_layer_norm"]),
        ("8.6", ["float_maps"]),
        ("10.3", ["requantize_maps", "int8_maps"]),
        ("11.4", ["requantize_maps", "int8_maps"]),
    ],
)
def test_an_export_for_onnx_runtime_becomes_one_for_tensorrt(
    version: str, names: list[str], stock: onnx.ModelProto
) -> None:
    assert [planned.rewrite_pass.name for planned in plan_trt(of(version))] == names
    assert "quantized-type" in errors(stock, version)
    model = to_trt(stock, of(version))
    onnx.checker.check_model(model, full_check=True)
    assert errors(model, version) == set()
    before, after = card_of(stock, "stock"), card_of(model, "model")
    assert before is not None and after is not None
    assert after.rewrites == [*before.rewrites, *names]
    assert after.model_copy(update={"rewrites": before.rewrites}) == before
    assert to_trt(model, of(version)).SerializeToString() == model.SerializeToString(), (
        "a second time changes something"
    )


def test_maps_that_fit_compute_the_same_bit_for_bit(stock: onnx.ModelProto) -> None:
    shown = images(4).numpy()
    floats = to_trt(stock, of("8.6"))
    assert ops(floats)["DequantizeLinear"] == 0
    expected = run_unoptimized(stock, shown)
    assert compare(expected, run_unoptimized(floats, shown), TOLERANCES["f32-reassoc"]).passed
    once = to_trt(stock, of("10.3"))
    assert any(item.dtype == np.int8 for item in initializers(once).values())
    difference = np.abs(run_unoptimized(once, shown) - expected).max()
    assert 0 < difference < 0.1 * np.ptp(expected)  # rows with codes over 11 are quantized anew


def test_foreign_models_are_returned_as_they_are() -> None:
    foreign = frozen_map(np.ones((4, 6), np.uint8), zero_points=np.zeros(4, np.uint8))
    assert to_trt(foreign, of("8.6")) is foreign


def test_the_unfrozen_twin_stays_as_it_is(eam_model: Path) -> None:
    twin = onnx.load(eam_model.with_name("base.onnx"))
    assert to_trt(twin, of("10.3")) is twin
    assert errors(to_trt(twin, of("8.5")), "8.5") == set()


def test_before_8_5_nothing_is_supported(stock: onnx.ModelProto) -> None:
    with pytest.raises(ConfigError, match=r"8\.2 is not supported"):
        to_trt(stock, of("8.2"))
