"""Rules about operators, operator sets and the types that nodes compute in.

Source: docs/tensorrt.md, The ONNX parser; onnx-tensorrt's list of operators (operators.md of its releases).
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from eamdeploy.engines.trt.versions import Capabilities
from eamdeploy.graph.operator_set import STANDARD_DOMAINS
from eamdeploy.lint.base import Place, Rule
from eamdeploy.lint.view import GraphView, name_of, type_name

# No release of onnx-tensorrt imports these.
_NEVER = frozenset(
    (
        *("BitShift", "Compress", "ConvInteger", "Det", "DynamicQuantizeLinear", "MatMulInteger", "MaxRoiPool"),
        *("MaxUnpool", "Multinomial", "NegativeLogLikelihoodLoss", "QLinearConv", "QLinearMatMul"),
        *("SoftmaxCrossEntropyLoss", "StringNormalizer", "TfIdfVectorizer", "Unique"),
        *("ConcatFromSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase"),
        *("SequenceInsert", "SequenceLength", "SplitToSequence"),
    )
)
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "MatMul", "Gemm", "Pow", "ReduceSum", "ReduceMean", "Max", "Min")


def _opset(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    if graph.opset > can.max_opset:
        yield Place("model", f"operator set: expected at most {can.max_opset}, got {graph.opset}")


def _domains(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for node in graph.nodes:
        if node.domain not in STANDARD_DOMAINS:
            yield Place(name_of(node), f"operator {node.op_type} is of domain {node.domain}, not of standard ONNX")


def _known(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for node in graph.nodes:
        if node.domain not in STANDARD_DOMAINS:
            continue
        if node.op_type in _NEVER:
            yield Place(name_of(node), f"TensorRT's parser does not import operator {node.op_type}")
        elif not onnx.defs.has(node.op_type):
            yield Place(name_of(node), f"standard ONNX has no operator {node.op_type}")


def _layer_normalization(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    if not can.layer_normalization:
        for node in graph.ops("LayerNormalization"):
            yield Place(name_of(node), "the parser does not know LayerNormalization")


def _gelu(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    if not can.gelu:
        for node in graph.ops("Gelu"):
            yield Place(name_of(node), "the parser does not know Gelu")


def _attention(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    if not can.attention:
        for node in graph.ops("Attention"):
            yield Place(name_of(node), "the parser does not know Attention")


def _double(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for value in (*graph.inputs, *graph.outputs):
        if graph.types.get(value.name) == onnx.TensorProto.DOUBLE:
            yield Place(value.name, "the model's input or output is float64, expected float32")
    for node in graph.nodes:
        if any(graph.types.get(name) == onnx.TensorProto.DOUBLE for name in node.output):
            yield Place(name_of(node), f"{node.op_type} computes in float64, expected float32")


def _int64(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    """Arithmetic that reaches a float tensor by a Cast; that of shapes, indices and sizes is expected."""
    if can.int64:
        return
    for node in graph.ops("Cast"):
        source = graph.writer.get(node.input[0])
        in_int64 = graph.types.get(node.input[0]) == onnx.TensorProto.INT64
        if source is not None and source.op_type in _ARITHMETIC and in_int64:
            yield Place(name_of(source), "computes values in int64, which becomes int32, clamped")


def _narrow_integers(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    """8- and 16-bit unsigned tensors may only be inputs that are cast at once, or outputs that were cast last."""
    narrow = (onnx.TensorProto.UINT8, onnx.TensorProto.UINT16, onnx.TensorProto.INT16)
    inputs, outputs = ({value.name for value in values} for values in (graph.inputs, graph.outputs))
    quantizers = ("QuantizeLinear", "DequantizeLinear")  # rules of their own
    for name, data_type in graph.types.items():
        if data_type not in narrow:
            continue
        only_uint8 = data_type == onnx.TensorProto.UINT8
        touching = [*graph.readers.get(name, ()), *((graph.writer[name],) if name in graph.writer else ())]
        for node in touching:
            at_the_edge = only_uint8 and node.op_type == "Cast" and name in inputs | outputs
            if node.op_type not in quantizers and not at_the_edge and node.op_type != "Constant":
                yield Place(
                    name_of(node),
                    f"{type_name(data_type)} tensor {name}: expected a UINT8 input or output of the model with one "
                    f"Cast, got {node.op_type}",
                )


def _dynamic_axes(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for value in graph.inputs:
        shape = graph.shapes.get(value.name)
        if shape is None:
            yield Place(value.name, "the input's rank is not stated")
        elif open_axes := [axis for axis, size in enumerate(shape) if axis > 0 and not isinstance(size, int)]:
            yield Place(value.name, f"the input's axes {open_axes} are dynamic: expected none but the batch, axis 0")


def _expanded_tokens(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    """A class token, repeated as often as an open axis of some tensor says, is joined with another tensor than that.

    TorchScript's exporter asks the patches for their number, which 8.6.0 took; the dynamo exporter asks the image.
    """
    if can.expanded_tokens:
        return
    for node in graph.ops("Concat"):
        for name in node.input:
            writer = graph.writer.get(name)
            if writer is None or writer.op_type != "Expand":
                continue
            measured = _measured(graph, writer.input[1])
            if measured and not measured & set(node.input):
                what = f"joins {name}, which is repeated as {', '.join(sorted(measured))} says"
                yield Place(name_of(node), f"{what}, expected as a tensor says that it is joined with")


def _measured(graph: GraphView, name: str) -> set[str]:
    """Tensors with an open axis whose Shape the values of a tensor depend on."""
    found: set[str] = set()
    names, seen = [name], set[str]()
    while names:
        current = names.pop()
        writer = graph.writer.get(current)
        if writer is None or current in seen:
            continue
        seen.add(current)
        if writer.op_type != "Shape":
            names += writer.input
        elif not all(isinstance(size, int) for size in graph.shapes.get(writer.input[0], (None,))):
            found.add(writer.input[0])
    return found


_EXPORT = "Export again with: eamdeploy export --target trt --trt VERSION."

RULES = (
    Rule("opset", _opset, "8.5, 8.6: 17; 10.0: 20; 10.15: 24", f"{_EXPORT} Or choose --opset."),
    Rule(
        "operator-domain", _domains, "all", "Export to standard ONNX; an optimizer's fused operators run nowhere else."
    ),
    Rule(
        "operator-known",
        _known,
        "all",
        "Write it with operators that TensorRT has; quantize with QuantizeLinear and DequantizeLinear.",
    ),
    Rule("layer-normalization", _layer_normalization, "below 8.6", f"{_EXPORT} That spells it out."),
    Rule("gelu", _gelu, "below 10.0", "Export at opset 19 or lower, which spells it with Erf."),
    Rule("attention-operator", _attention, "below 10.14", "Export at opset 22 or lower: MatMul, Softmax, MatMul."),
    Rule("float64", _double, "all", "Cast to float32 in the model; TensorRT has no float64."),
    Rule("int64-arithmetic", _int64, "below 10.0", "Compute in float32 or int32.", "warning"),
    Rule(
        "narrow-integers",
        _narrow_integers,
        "all",
        "Feed uint8 through one Cast to float32 at the input, or use INT8 behind DequantizeLinear.",
    ),
    Rule(
        "expanded-tokens",
        _expanded_tokens,
        "below 10.0",
        "Export with eamdeploy, whose pass add_position does without, with a fixed batch, or by torch's TorchScript "
        "exporter.",
    ),
    Rule("dynamic-axes", _dynamic_axes, "all", "Export with fixed height and width; only the batch has a profile."),
)
