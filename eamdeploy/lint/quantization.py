"""Rules about QuantizeLinear, DequantizeLinear and the constants behind them.

Source: docs/tensorrt.md, The ONNX parser.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from eamdeploy.engines.trt.versions import Capabilities
from eamdeploy.lint.base import Place, Rule
from eamdeploy.lint.view import GraphView, attribute, name_of, optional_input, type_name

_T = onnx.TensorProto
_FLOAT8 = tuple(getattr(_T, name) for name in ("FLOAT8E4M3FN", "FLOAT8E5M2") if hasattr(_T, name))
_INT4: int = getattr(_T, "INT4", -1)  # from onnx 1.16
_INT4_OPSET = 21
_HALVES = (_T.FLOAT16, _T.BFLOAT16)
_HALF_SCALES_OPSET = 19


def _quantized_type(graph: GraphView, node: onnx.NodeProto) -> int | None:
    """The element type on the quantized side of a (de)quantizing node; None where that is not known."""
    side = node.input[0] if node.op_type == "DequantizeLinear" else node.output[0]
    zero_point = optional_input(node, 2)
    known = graph.types.get(side) or graph.types.get(zero_point)
    if known is None and node.op_type == "QuantizeLinear" and not zero_point:
        return int(attribute(node, "output_dtype", 0)) or int(_T.UINT8)  # ONNX's default
    return known


def _quantizers(graph: GraphView) -> Iterator[onnx.NodeProto]:
    return graph.ops("QuantizeLinear", "DequantizeLinear")


def _types(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    allowed = {_T.INT8, *_FLOAT8, _INT4}  # INT4 has rules of its own
    for node in _quantizers(graph):
        kind = _quantized_type(graph, node)
        if kind is not None and kind not in allowed:
            yield Place(name_of(node), f"{node.op_type} of {type_name(kind)}, expected INT8")


def _int8_constant_place(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for name, tensor in graph.initializers.items():
        if tensor.data_type != _T.INT8:
            continue
        for node in graph.readers.get(name, ()):
            as_data = node.op_type == "DequantizeLinear" and node.input[0] == name
            as_zero_point = node.op_type in ("DequantizeLinear", "QuantizeLinear") and optional_input(node, 2) == name
            if not as_data and not as_zero_point:
                yield Place(name_of(node), f"INT8 constant {name} is read by {node.op_type}, expected DequantizeLinear")


def _int8_constant_version(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    if can.int8_constants:
        return
    for node in graph.ops("DequantizeLinear"):
        if node.input[0] in graph.initializers and graph.types.get(node.input[0]) == _T.INT8:
            yield Place(name_of(node), f"INT8 constant {node.input[0]}: known to work from TensorRT 8.5.3")


def _three_inputs(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    if can.optional_zero_point:
        return
    for node in _quantizers(graph):
        given = sum(map(bool, node.input))
        if given != 3:
            yield Place(name_of(node), f"{node.op_type}: expected three inputs (data, scale, zero point), got {given}")


def _scale_type(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    halves = can.half_scales and graph.opset >= _HALF_SCALES_OPSET
    allowed = (_T.FLOAT, *_HALVES) if halves else (_T.FLOAT,)
    expected = " or ".join(map(type_name, allowed))
    for node in _quantizers(graph):
        kind = graph.types.get(optional_input(node, 1))
        if kind is not None and kind not in allowed:
            yield Place(name_of(node), f"scale: expected {expected}, got {type_name(kind)}")


def _scale_positive(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for node in _quantizers(graph):
        scale = graph.value(optional_input(node, 1))
        if scale is None:
            continue
        values = np.asarray(scale, np.float64).reshape(-1)
        wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if wrong.size:
            where = f"{wrong.size} of {values.size}, the first at {wrong[0]}: {values[wrong[0]]:g}"
            yield Place(name_of(node), f"scales: expected all positive and finite, got {where}")


def _zero_point(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for node in _quantizers(graph):
        zero_point = optional_input(node, 2)
        values = graph.value(zero_point)
        if values is not None and np.asarray(values, np.float64).any():
            yield Place(name_of(node), "zero point: expected 0 throughout (symmetric), got other values")
        sizes = [_size(graph, name) for name in (optional_input(node, 1), zero_point)]
        if zero_point and None not in sizes and sizes[0] != sizes[1]:
            yield Place(name_of(node), f"zero point: expected {sizes[0]} values like the scale, got {sizes[1]}")


def _size(graph: GraphView, name: str) -> int | None:
    shape = graph.shapes.get(name)
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return int(np.prod([int(size) for size in shape if isinstance(size, int)], dtype=np.int64))


def _per_axis(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    """Scales by axis: of constants only (a QuantizeLinear in between counts), one for each slice."""
    for node in _quantizers(graph):
        count = _size(graph, optional_input(node, 1))
        if count is None or count == 1 or _is_blocked(graph, node):
            continue
        source = node
        if node.op_type == "DequantizeLinear" and node.input[0] in graph.writer:
            source = graph.writer[node.input[0]]
        if source.input and source.input[0] not in graph.initializers and source.op_type != "Constant":
            yield Place(name_of(node), f"{count} scales along an axis of {node.input[0]}, which is no constant")
            continue
        shape, axis = graph.shapes.get(node.input[0]), int(attribute(node, "axis", 1))
        if shape is not None and (not -len(shape) <= axis < len(shape) or shape[axis] != count):
            yield Place(
                name_of(node), f"scales: expected one for each slice of {list(shape)} on axis {axis}, got {count}"
            )


def _is_blocked(graph: GraphView, node: onnx.NodeProto) -> bool:
    return bool(attribute(node, "block_size", 0)) or (graph.rank(optional_input(node, 1)) or 0) > 1


def _blocks(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for node in _quantizers(graph):
        kind = _quantized_type(graph, node)
        if _is_blocked(graph, node) and kind is not None and kind not in (_INT4, *_FLOAT8):
            yield Place(name_of(node), f"scales by block: expected INT4 or FP8 data, got {type_name(kind)}")


def _int4(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for node in _quantizers(graph):
        if _quantized_type(graph, node) != _INT4:
            continue
        if not can.int4:
            yield Place(name_of(node), "this TensorRT has no INT4")
        elif node.op_type == "QuantizeLinear" or node.input[0] not in graph.initializers:
            yield Place(name_of(node), f"INT4 is for constants only, got {node.op_type} of a computed tensor")
        elif graph.opset < _INT4_OPSET:
            yield Place(name_of(node), f"INT4: expected operator set {_INT4_OPSET} or newer, got {graph.opset}")
        elif not can.int4_any_rank and graph.rank(node.input[0]) != 2:
            yield Place(name_of(node), f"INT4 constant: expected two axes, got {graph.rank(node.input[0])}")


def _float8(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for node in _quantizers(graph):
        if _quantized_type(graph, node) in _FLOAT8:
            yield Place(name_of(node), "FP8 needs an Ada GPU or newer; Jetson Orin has none")


def _one_sided(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    """A product of a quantized activation with something that is not: computed in FP16, and its Q/DQ cost time."""
    for node in graph.ops("MatMul"):
        sources = [graph.writer.get(name) for name in node.input]
        quantized = [source is not None and source.op_type == "DequantizeLinear" for source in sources]
        if sum(quantized) != 1:
            continue
        source = sources[quantized.index(True)]
        assert source is not None, "a DequantizeLinear"
        if source.input[0] in graph.writer:  # an activation, not a constant that simply becomes float
            side = ("left", "right")[quantized.index(False)]
            yield Place(name_of(node), f"INT8 product: the {side} operand does not come from DequantizeLinear")


_FLAVOUR = "Export again with: eamdeploy export --target trt --trt VERSION."

RULES = (
    Rule("quantized-type", _types, "all", f"{_FLAVOUR} It stores frozen maps as INT8; build-trt converts them too."),
    Rule(
        "int8-constant-use", _int8_constant_place, "all", "Put a DequantizeLinear between the constant and its reader."
    ),
    Rule("int8-constant-version", _int8_constant_version, "below 8.5.3", f"{_FLAVOUR} It then stores float maps."),
    Rule("dequantize-inputs", _three_inputs, "below 10.0", "Give a zero point of zeros, as large as the scale."),
    Rule("scale-type", _scale_type, "8.x: FP32; later FP16, BF16 from opset 19", "Store the scale as float32."),
    Rule("scale-positive", _scale_positive, "all", "Use scale 1 where all integers are 0."),
    Rule("zero-point", _zero_point, "all", "Quantize symmetrically: zero points 0, as many as scales."),
    Rule("per-axis", _per_axis, "all", "Quantize activations with one scale for the tensor."),
    Rule("blocks", _blocks, "all", "Use one scale per row or per tensor."),
    Rule("int4", _int4, "none below 10.0; constants of two axes up to 10.3", f"{_FLAVOUR} It stores INT8."),
    Rule("float8", _float8, "all", "Use INT8 or FP16 on Orin.", "warning"),
    Rule(
        "int8-product",
        _one_sided,
        "all",
        "Quantize both operands, or neither; a frozen map as left operand wants one scale for the tensor.",
        "warning",
    ),
)
