from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from engine_models import SIZE, make_frozen_model
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from eamdeploy.convert.trt_half import has_decomposed_norms, to_half

BOTH = ("normalization", "softmax")


def layer_norm_model(*, whole: bool) -> onnx.ModelProto:
    """LayerNorm over the last axis of [B,3,4,8], native or decomposed, between two Adds, and a softmax."""
    if whole:
        norm = [helper.make_node("LayerNormalization", ["x", "gamma"], ["n"], "ln", axis=-1)]
    else:
        norm = [
            helper.make_node("ReduceMean", ["x"], ["m"], "mean", axes=[-1]),
            helper.make_node("Sub", ["x", "m"], ["d"], "centred"),
            helper.make_node("Mul", ["d", "d"], ["s"], "square"),
            helper.make_node("ReduceMean", ["s"], ["v"], "variance", axes=[-1]),
            helper.make_node("Add", ["v", "eps"], ["e"], "shifted"),
            helper.make_node("Sqrt", ["e"], ["r"], "deviation"),
            helper.make_node("Div", ["d", "r"], ["n"], "normal"),
        ]
    nodes = [
        helper.make_node("Add", ["image", "offset"], ["x"], "stem"),
        *norm,
        helper.make_node("Mul", ["n", "gamma"], ["g"], "affine"),
        helper.make_node("Softmax", ["g"], ["p"], "softmax", axis=-1),
        helper.make_node("Add", ["p", "p"], ["logits"], "last"),
    ]
    shape = ["B", 3, 4, 8]
    graph = helper.make_graph(
        nodes,
        "norm",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor("offset", TensorProto.FLOAT, [8], np.linspace(-900, 900, 8)),
            helper.make_tensor("gamma", TensorProto.FLOAT, [8], np.full(8, 0.5)),
            helper.make_tensor("eps", TensorProto.FLOAT, [], [1e-6]),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """By onnx's own evaluator: ONNX Runtime computes float16 on a CPU in float32, so nothing would overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(ReferenceEvaluator(model).run(None, {"image": images})[0])


IMAGES = np.random.default_rng(0).standard_normal((2, 3, 4, 8)).astype(np.float32)


@pytest.mark.parametrize("whole", [True, False], ids=["native", "decomposed"])
def test_layer_norm_of_large_values_survives(whole: bool) -> None:
    model = layer_norm_model(whole=whole)
    half = to_half(model, BOTH)
    onnx.checker.check_model(half, full_check=True)
    np.testing.assert_allclose(run(half, IMAGES), run(model, IMAGES), atol=2e-3)


def test_a_layer_norm_that_is_spelled_out_is_told_from_a_whole_one() -> None:
    assert has_decomposed_norms(layer_norm_model(whole=False))
    assert not has_decomposed_norms(layer_norm_model(whole=True))


def test_without_keeping_anything_squares_overflow() -> None:
    half = to_half(layer_norm_model(whole=False), ())
    assert not np.allclose(run(half, IMAGES), run(layer_norm_model(whole=False), IMAGES), atol=0.05)


def test_kept_steps_hand_on_float32_without_a_detour() -> None:
    half = onnx.shape_inference.infer_shapes(to_half(layer_norm_model(whole=False), BOTH))
    types = {item.name: item.type.tensor_type.elem_type for item in half.graph.value_info}
    nodes = {node.name: node for node in half.graph.node}
    for name in ("mean", "centred", "square", "variance", "shifted", "deviation", "normal", "softmax"):
        assert types[nodes[name].output[0]] == TensorProto.FLOAT, name
    assert types[nodes["stem"].output[0]] == types[nodes["affine"].output[0]] == TensorProto.FLOAT16
    # into mean and difference (one Cast for both), the affine step and the softmax, out of it; image and logits
    assert sum(node.op_type == "Cast" for node in half.graph.node) == 6


def test_maps_stay_integers_with_float32_scales_and_the_model_is_left_alone() -> None:
    model = make_frozen_model().to_onnx()
    before = model.SerializeToString()
    half = to_half(model, BOTH)
    assert model.SerializeToString() == before
    onnx.checker.check_model(half, full_check=True)
    types = {item.name: item.data_type for item in half.graph.initializer}
    wanted = (TensorProto.UINT8, TensorProto.FLOAT, TensorProto.FLOAT16)
    assert (types["codes"], types["scales"], types["patch"]) == wanted
    images = np.random.default_rng(1).uniform(-2, 2, (3, 3, SIZE, SIZE)).astype(np.float32)
    session = onnxruntime.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
    got, want = np.asarray(session.run(None, {"image": images})[0]), make_frozen_model().forward(images)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=0.01 * np.abs(want).max())


def quantized_model(opset: int, weight_scale: float) -> onnx.ModelProto:
    """logits = dq(q(image)) · dq(weight) over the last axis, then a frozen map's product behind a Reshape."""
    initializers = {
        "s": np.array(2.0**-6, np.float32),
        "z": np.array(0, np.int8),
        "w": np.random.default_rng(0).integers(-127, 128, (8, 8)).astype(np.int8),
        "ws": np.full(8, weight_scale, np.float32),
        "wz": np.zeros(8, np.int8),
        "m": np.random.default_rng(1).integers(0, 50, (4, 4)).astype(np.int8),
        "ms": np.full(4, 2.0**-7, np.float32),
        "mz": np.zeros(4, np.int8),
        "shape": np.array([1, 4, 4]),
    }
    nodes = [
        helper.make_node("Relu", ["image"], ["x"], "stem"),
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], "weight", axis=1),
        helper.make_node("MatMul", ["d", "dw"], ["y"], "product"),
        helper.make_node("DequantizeLinear", ["m", "ms", "mz"], ["rows"], "rows", axis=0),
        helper.make_node("Reshape", ["rows", "shape"], ["map"], "map"),
        helper.make_node("MatMul", ["map", "y"], ["logits"], "frozen"),
    ]
    shape = ["B", 3, 4, 8]
    graph = helper.make_graph(
        nodes,
        "quantized",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(values, name) for name, values in initializers.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize(
    ("opset", "weight_scale", "halves"),
    [
        (19, 2.0**-8, {"s", "ws"}),  # no Cast between an INT8 product and its pairs
        (19, 1 / 300, {"s"}),  # float16 has no such number
        (17, 2.0**-8, set()),  # nor has this operator set float16 scales
    ],
)
def test_scales_around_int8_products_are_float16_where_that_changes_nothing(
    opset: int, weight_scale: float, halves: set[str]
) -> None:
    model = quantized_model(opset, weight_scale)
    half = to_half(model, BOTH)
    onnx.checker.check_model(half, full_check=True)
    stored = {item.name: item for item in half.graph.initializer}
    assert {name for name, item in stored.items() if item.data_type == TensorProto.FLOAT16} == halves
    producers = {name: node.op_type for node in half.graph.node for name in node.output}
    product = next(node for node in half.graph.node if node.name == "product")
    wanted = ["DequantizeLinear" if name in halves else "Cast" for name in ("s", "ws")]
    assert [producers[name] for name in product.input] == wanted
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    got, want = (
        onnxruntime.InferenceSession(each.SerializeToString(), options).run(None, {"image": IMAGES[:, :3]})[0]
        for each in (half, model)
    )
    np.testing.assert_allclose(got, want, atol=0.005 * np.abs(want).max())
