"""The passes that bring frozen maps into a form that TensorRT takes: int8_maps, requantize_maps, float_maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from attention_graphs import IMAGES, GraphBuilder, N
from numpy.typing import NDArray
from rewriting import assert_bit_exact, initializers, left_alone, ops, rewritten

from eamdeploy.passes.base import Pass
from eamdeploy.passes.float_maps import FloatMaps
from eamdeploy.passes.int8_maps import Int8Maps
from eamdeploy.passes.requantize_maps import RequantizeMaps

PASSES: tuple[Pass[Any], ...] = (Int8Maps(), RequantizeMaps(), FloatMaps())


def integers(largest: int, dtype: Any = np.uint8) -> NDArray[Any]:
    """[N, N] with that integer in the second row."""
    values = np.random.default_rng(0).integers(1, 90, (N, N)).astype(dtype)
    values[1, 2] = largest
    return values


def drawn(
    codes: NDArray[Any],
    *,
    scales: NDArray[Any] | None = None,
    zero_points: NDArray[Any] | None = None,
    axis: int = 0,
    opset: int = 17,
    two_inputs: bool = False,
) -> onnx.ModelProto:
    """Rows of a map times the tokens."""
    g = GraphBuilder("batch", opset)
    scale = (1 / codes.astype(np.float64).sum(axis=1)).astype(np.float32) if scales is None else scales
    zeros = np.zeros(scale.shape, codes.dtype) if zero_points is None else zero_points
    inputs = [codes, scale] if two_inputs else [codes, scale, zeros]
    rows = g.op("DequantizeLinear", *inputs, axis=axis)
    if scale.dtype == np.float16:
        rows = g.op("Cast", rows, to=onnx.TensorProto.FLOAT)
    return g.classify(g.op("MatMul", rows, g.x))


def dequantized(model: onnx.ModelProto) -> list[NDArray[Any]]:
    """Integers, scales and zero points behind the one DequantizeLinear."""
    (node,) = (node for node in model.graph.node if node.op_type == "DequantizeLinear")
    stored = initializers(model)
    return [stored[name] for name in node.input]


@pytest.mark.parametrize("two_inputs", [False, True])
@pytest.mark.parametrize(("dtype", "opset"), [(np.uint8, 17), (np.uint16, 21)])
def test_integers_up_to_127_become_int8_bit_for_bit(dtype: Any, opset: int, two_inputs: bool) -> None:
    codes = integers(127, dtype)
    stock = drawn(codes, opset=opset, two_inputs=two_inputs)
    model, result = rewritten(stock, Int8Maps(), 1)
    assert (result.name, result.skipped, result.nodes_after - result.nodes_before) == ("int8_maps", (), 0)
    stored, scales, zeros = dequantized(model)
    assert (stored.dtype, zeros.dtype, scales.dtype) == (np.dtype(np.int8), np.dtype(np.int8), np.dtype(np.float32))
    np.testing.assert_array_equal(stored, codes)
    assert zeros.shape == scales.shape and not zeros.any()
    assert_bit_exact(stock, model, IMAGES)


def test_integers_over_127_are_left_for_requantizing() -> None:
    assert left_alone(drawn(integers(128)), Int8Maps()) == ["an integer is over 127"]
    model, _ = rewritten(drawn(integers(128)), Int8Maps(), 1, RequantizeMaps())
    assert dequantized(model)[0].dtype == np.int8


@pytest.mark.parametrize(
    ("largest", "dtype", "opset"), [(128, np.uint8, 17), (225, np.uint8, 17), (65025, np.uint16, 21)]
)
def test_only_rows_over_127_are_quantized_anew_and_keep_their_sum(largest: int, dtype: Any, opset: int) -> None:
    codes = integers(largest, dtype)
    scales = np.linspace(0.2, 0.9, N) / codes.astype(np.float64).sum(axis=1)  # rows frozen in part: sums below 1
    stock = drawn(codes, scales=scales.astype(np.float32), opset=opset)
    model, result = rewritten(stock, RequantizeMaps(), 1)
    assert (result.name, result.nodes_after - result.nodes_before) == ("requantize_maps", 0)
    stored, new_scales, _ = dequantized(model)
    rest = np.arange(N) != 1
    np.testing.assert_array_equal(stored[rest], codes[rest])
    np.testing.assert_array_equal(new_scales[rest], scales[rest].astype(np.float32))
    assert 100 < stored.max() <= 127
    sums = (stored * new_scales[:, None].astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(sums, np.linspace(0.2, 0.9, N), rtol=1e-6)
    before, after = codes[1] * scales[1], stored[1] * new_scales[1]
    assert np.abs(before - after).max() <= before.max() / 127  # a step


def test_integers_that_fit_are_not_quantized_anew() -> None:
    assert left_alone(drawn(integers(127)), RequantizeMaps()) == ["its integers fit INT8"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_float_maps_are_constants_bit_for_bit(dtype: Any) -> None:
    stock = drawn(integers(120, dtype))
    model, result = rewritten(stock, FloatMaps(), 1)
    assert (result.name, result.nodes_after - result.nodes_before) == ("float_maps", -1)
    assert ops(model)["DequantizeLinear"] == 0
    assert all(item.dtype.kind != "u" and item.dtype != np.int8 for item in initializers(model).values())
    assert_bit_exact(stock, model, IMAGES)


@pytest.mark.parametrize("rewrite_pass", PASSES[:2], ids=lambda each: each.name)
def test_signed_integers_are_left_alone(rewrite_pass: Pass[Any]) -> None:
    assert left_alone(drawn(integers(100, np.int8)), rewrite_pass) == ["its integers are signed"]


def activation() -> onnx.ModelProto:
    g = GraphBuilder("batch")
    scale, zero = np.array(0.1, np.float32), np.array(0, np.uint8)
    return g.classify(g.op("DequantizeLinear", g.op("QuantizeLinear", g.x, scale, zero), scale, zero))


def one_zero_point_is_not_zero() -> NDArray[np.uint8]:
    points = np.zeros(N, np.uint8)
    points[3] = 1
    return points


SCALES = np.full(N, 0.01, np.float32)
NEAR_MISSES = {
    "an activation": (activation(), "dequantizes what is no constant"),
    "one scale": (drawn(integers(200), scales=np.array(0.01, np.float32)), "one float32 scale per row"),
    "half scales": (drawn(integers(200), scales=SCALES.astype(np.float16), opset=19), "one float32 scale per row"),
    "scales of columns": (drawn(integers(200), axis=1), "its scales are not those of rows"),
    "a scale of 0": (drawn(integers(200), scales=SCALES * (np.arange(N) > 0)), "a scale is not positive"),
    "a zero point": (drawn(integers(200), zero_points=one_zero_point_is_not_zero()), "its zero points are not 0"),
}


@pytest.mark.parametrize("rewrite_pass", PASSES, ids=lambda each: each.name)
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_with_the_reason(name: str, rewrite_pass: Pass[Any]) -> None:
    stock, reason = NEAR_MISSES[name]
    (given,) = left_alone(stock, rewrite_pass)
    assert reason in given


@pytest.mark.parametrize("rewrite_pass", PASSES, ids=lambda each: each.name)
def test_constants_that_another_node_shares_stay_as_they_are(rewrite_pass: Pass[Any]) -> None:
    g = GraphBuilder("batch")
    shared = [g.constant(each) for each in (integers(200), SCALES, np.zeros(N, np.uint8))]
    if rewrite_pass.name == "int8_maps":
        g.constants[shared[0]] = integers(120)
    rows, columns = (g.op("DequantizeLinear", *shared, axis=axis) for axis in (0, 1))
    stock = g.classify(g.op("MatMul", rows, g.op("MatMul", columns, g.x)))
    model, result = rewritten(stock, rewrite_pass, 1)
    assert [skip.reason for skip in result.skipped] == ["its scales are not those of rows"]
    node = next(node for node in model.graph.node if node.name == columns)
    stored = initializers(model)
    for name, kept in zip(node.input, shared, strict=True):
        np.testing.assert_array_equal(stored[name], g.constants[kept])
        assert stored[name].dtype == g.constants[kept].dtype
    if rewrite_pass.name != "requantize_maps":
        assert_bit_exact(stock, model, IMAGES)
