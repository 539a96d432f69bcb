from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
from attention_graphs import (
    CLASSES,
    IMAGES,
    WEIGHTS,
    D,
    GraphBuilder,
    N,
    Spelling,
    floats,
    ints,
    run_unoptimized,
    scalar,
)
from lint_models import found
from numpy.typing import NDArray
from rewriting import initializers, left_alone, ops, rewritten

from eamdeploy.graph.model import to_graph
from eamdeploy.passes.quantize_products import QuantizeProducts, calibrated_tensors

Ranges = Mapping[str, tuple[float, float]]


def outputs_of(model: onnx.ModelProto, names: list[str]) -> dict[str, NDArray[np.float32]]:
    """The named tensors of `model` on `IMAGES`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {item.name for item in copy.graph.output}
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options)
    return dict(zip(names, session.run(names, {"image": IMAGES}), strict=True))


def ranges_of(model: onnx.ModelProto) -> Ranges:
    """Smallest and largest value of every tensor that the pass asks for."""
    values = outputs_of(model, calibrated_tensors(to_graph(model)))
    return {name: (float(each.min()), float(each.max())) for name, each in values.items()}


@cache
def plain() -> onnx.ModelProto:
    return Spelling("separate").model()


@cache
def beside_frozen() -> onnx.ModelProto:
    """Live attention, and a constant map for other heads, side by side in front of the output projection."""
    g = GraphBuilder()
    values = g.values()
    live = g.op("MatMul", g.op("Softmax", g.op("MatMul", g.queries(), g.keys()), axis=-1), values)
    codes = np.random.default_rng(0).integers(1, 90, (N, N)).astype(np.int8)
    rows = g.op("DequantizeLinear", codes, np.full(N, 1 / 300, np.float32), np.zeros(N, np.int8), axis=0)
    frozen = g.op("MatMul", rows, values)
    both = g.op("Concat", live, frozen, axis=3)  # [B,H,N,2d]
    merged = g.op("Reshape", g.op("Transpose", both, perm=[0, 2, 1, 3]), g.sizes(N, 2 * WEIGHTS.out.shape[0]))
    return g.classify(g.project(merged, np.concatenate([WEIGHTS.out, WEIGHTS.out])))


def test_both_operands_of_every_product_but_the_classifiers_are_int8() -> None:
    model, result = rewritten(plain(), QuantizeProducts(ranges_of(plain())), 7)  # patches, q, k, v, q·k, ·v, projection
    assert [skip.reason for skip in result.skipped] == ["it is the classifier"]
    counts = ops(model)
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (7, 12)  # x is read by three; five weights
    weights = {item.dtype: item for item in initializers(model).values() if item.ndim == 2}
    assert set(weights) == {np.dtype(np.int8), np.dtype(np.float32)}  # the head, and positions
    for version in ("8.6", "10.3", "11.4"):
        assert {finding.rule for finding in found(model, version)} <= {"attention-head-size"}


def test_the_result_is_near_and_better_the_finer_the_ranges() -> None:
    ranges = ranges_of(plain())
    reference = run_unoptimized(plain(), IMAGES)
    errors = []
    for factor in (1.0, 4.0, 16.0):
        wide = {name: (low * factor, high * factor) for name, (low, high) in ranges.items()}
        model, _ = rewritten(plain(), QuantizeProducts(wide), 7)
        errors.append(float(np.abs(run_unoptimized(model, IMAGES) - reference).max()))
    assert errors[0] < 0.05 * np.ptp(reference) and errors[0] < errors[1] < errors[2]


def test_scales_are_those_of_the_ranges_and_of_the_columns_and_float16_has_them() -> None:
    ranges = dict(ranges_of(plain()))
    (name,) = (key for key in ranges if key.startswith("Softmax"))
    ranges[name] = (0.0, 0.9)
    model, _ = rewritten(plain(), QuantizeProducts(ranges), 7)
    stored = initializers(model)
    scale = stored[f"{name}/int8/scale"]
    assert 0.9 / 127 <= scale <= 0.9 / 127 * (1 + 2**-10)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scales = stored[node.input[1]]
            np.testing.assert_array_equal(scales.astype(np.float16), scales)
            assert not stored[node.input[2]].any() and stored[node.input[2]].dtype == np.int8
    (weight,) = (n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0].startswith("MatMul_4"))
    integers, scales = stored[weight.input[0]], stored[weight.input[1]]
    assert integers.shape == (D, len(scales)) and weight.attribute[0].i == 1
    assert (np.abs(integers).max(axis=0) >= 126).all()
    np.testing.assert_allclose(integers * scales, WEIGHTS.query.matrix, atol=float(scales.max()) / 2 * 1.001)


def test_live_attention_beside_frozen_heads_is_enclosed_and_the_frozen_product_left_alone() -> None:
    stock = beside_frozen()
    ranges = ranges_of(stock)
    model, result = rewritten(stock, QuantizeProducts(ranges), 7)
    assert sorted(skip.reason for skip in result.skipped) == [
        "an operand is integers already",
        "it is the classifier",
    ]
    producers = {name: node for node in model.graph.node for name in node.output}
    (concat,) = (node for node in model.graph.node if node.op_type == "Concat")
    live, frozen = (producers[name] for name in concat.input)
    assert (live.op_type, frozen.op_type) == ("DequantizeLinear", "MatMul")
    context = producers[producers[live.input[0]].input[0]]
    softmax = producers[producers[producers[context.input[0]].input[0]].input[0]]
    assert (context.op_type, softmax.op_type) == ("MatMul", "Softmax")
    stored = initializers(model)
    before = next(n for n in model.graph.node if n.op_type == "QuantizeLinear" and "Reshape" in n.input[0])
    behind = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in before.output)
    assert stored[live.input[1]] == stored[behind.input[1]]  # so the second pair changes nothing
    values = outputs_of(model, [before.input[0], behind.output[0]])
    width = concat_width(values[before.input[0]])
    once, twice = (each.reshape(*each.shape[:2], -1, 2, width)[..., 0, :] for each in values.values())
    np.testing.assert_array_equal(once, twice)


def concat_width(merged: NDArray[np.float32]) -> int:
    """d, from [B,N,H·2d]."""
    return merged.shape[-1] // WEIGHTS.query.weight.shape[1] // 2


def test_a_tensor_of_zeros_has_a_positive_scale() -> None:
    ranges = {name: (0.0, 0.0) for name in ranges_of(plain())}
    model, _ = rewritten(plain(), QuantizeProducts(ranges), 7)
    assert all(finding.rule != "scale-positive" for finding in found(model, "8.6"))
    assert np.isfinite(run_unoptimized(model, IMAGES)).all()


def _constant_on_the_left() -> onnx.ModelProto:
    g = GraphBuilder()
    return g.classify(g.op("MatMul", np.eye(N, dtype=np.float32), g.x))


def _constant_with_three_axes() -> onnx.ModelProto:
    g = GraphBuilder()
    return g.classify(g.op("MatMul", g.x, np.ones((1, D, D), np.float32)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_constant_on_the_left, "a constant operand is no matrix on the right"),
        (_constant_with_three_axes, "a constant operand is no matrix on the right"),
    ],
)
def test_near_misses(model: object, reason: str) -> None:
    stock = model()  # type: ignore[operator]
    ranges = {"Transpose_1": (-3.0, 3.0), "Add_3": (-3.0, 3.0)}
    _, result = rewritten(stock, QuantizeProducts(ranges), 1)  # the patches
    assert [skip.reason for skip in result.skipped] == [reason, "it is the classifier"]


def test_a_tensor_without_a_range_is_left_alone() -> None:
    reasons = left_alone(plain(), QuantizeProducts({}))
    assert reasons[0].startswith("no range is known of ") and reasons[-1] == "it is the classifier"


def with_head(*, scaled: bool) -> onnx.ModelProto:
    """Logits with a bias, or scaled, behind the head's product."""
    g = GraphBuilder()
    product = g.op("MatMul", g.op("Squeeze", g.mean(g.x, 1), np.array([1])), np.ones((D, CLASSES), np.float32))
    g.op("Mul", product, scalar(2)) if scaled else g.op("Add", product, floats(1, 2, 3, 4))
    g.nodes[-1].output[0] = "logits"
    return g.model({"logits": [g.batch, CLASSES]})


def test_a_classifier_with_a_bias_behind_it_is_one_too() -> None:
    stock = with_head(scaled=False)
    assert "it is the classifier" in left_alone(stock, QuantizeProducts({}))
    assert len(calibrated_tensors(to_graph(stock))) == 1  # the patches


def test_a_product_whose_result_is_scaled_is_no_classifier() -> None:
    stock = with_head(scaled=True)
    _, result = rewritten(stock, QuantizeProducts(ranges_of(stock)), 2)
    assert result.skipped == ()


def test_tensors_that_are_hardly_negative_are_uint8_where_the_runtime_takes_it() -> None:
    """The maps behind the softmax are 0 to 1; images, queries, keys and values have both signs."""
    ranges = ranges_of(plain())
    model, _ = rewritten(plain(), QuantizeProducts(ranges, unsigned=True), 7)
    constants = initializers(model)
    zero_points = {
        node.input[0]: constants[node.input[2]] for node in model.graph.node if node.op_type == "QuantizeLinear"
    }
    unsigned = {name for name, value in zero_points.items() if value.dtype == np.uint8}
    assert unsigned == {name for name, (low, high) in ranges.items() if -low <= 0.3 * high}
    assert any(name.startswith("Softmax") for name in unsigned) and len(unsigned) < len(zero_points)
    reference = run_unoptimized(plain(), IMAGES)
    signed, _ = rewritten(plain(), QuantizeProducts(ranges), 7)
    errors = [float(np.abs(run_unoptimized(each, IMAGES) - reference).max()) for each in (model, signed)]
    assert errors[0] < errors[1] < 0.05 * np.ptp(reference)


def test_weights_for_pairs_have_neighbours_of_at_most_128_together() -> None:
    ranges = ranges_of(plain())
    model, _ = rewritten(plain(), QuantizeProducts(ranges, for_pairs=True), 7)
    full, _ = rewritten(plain(), QuantizeProducts(ranges), 7)

    def most(made: onnx.ModelProto) -> list[int]:
        stored = [item.astype(int) for item in initializers(made).values() if item.dtype == np.int8 and item.ndim == 2]
        pairs = [np.pad(item, ((0, len(item) % 2), (0, 0))).reshape(-1, 2, item.shape[1]) for item in stored]
        return [int(max(np.maximum(sign * pair, 0).sum(axis=1).max() for sign in (1, -1))) for pair in pairs]

    assert len(most(model)) == 5 and max(most(model)) <= 128 < min(most(full))
    reference = run_unoptimized(plain(), IMAGES)
    assert np.abs(run_unoptimized(model, IMAGES) - reference).max() < 0.05 * np.ptp(reference)


@pytest.mark.parametrize("stored", ["integers", "floats"])
def test_mixes_of_several_ranks_are_constants_too(stored: str) -> None:
    """Side by side they are computed, but from constants alone: a pair would round what is frozen once more."""
    g = GraphBuilder()
    parts = []
    for rank in (1, N - 1):
        codes = np.random.default_rng(rank).integers(1, 8, (N, rank)).astype(np.uint8)
        scales = (1 / codes.sum(axis=1)).astype(np.float32)
        if stored == "integers":
            rows: str | NDArray[np.float32] = g.op("DequantizeLinear", codes, scales, np.zeros(N, np.uint8), axis=0)
        else:
            rows = codes * scales[:, None]
        parts.append(g.op("Reshape", rows, ints(1, N, rank)))
    mix = g.op("Concat", *parts, axis=2)
    stock = g.classify(g.op("Add", g.x, g.op("MatMul", mix, g.x)))
    assert mix not in calibrated_tensors(to_graph(stock))
    ranges = {**ranges_of(stock), str(mix): (0.0, 1.0)}
    model, result = rewritten(stock, QuantizeProducts(ranges), 1)  # the patches
    reasons = {
        "integers": "an operand is computed from constants alone",
        "floats": "a constant operand is no matrix on the right",  # what was computed from floats was folded
    }
    assert [skip.reason for skip in result.skipped] == [reasons[stored], "it is the classifier"]
    assert all(node.input[0] != mix for node in model.graph.node if node.op_type == "QuantizeLinear")
