"""A model in mixed precision, for TensorRT from 11 on, where the types in the file decide.

Before:  float32 tensors
After:   float16 tensors, but float32 input, output, scales of frozen maps, and the steps that `trt_precision` names
         from opset 19 also float16 scales around INT8 products, so that no Cast stands between them and their Q/DQ
Exact:   no: FP16's 11 bits; what stays float32 is computed in it without a detour through float16

Made by ONNX Runtime's own converter, which comes in its package. NVIDIA's `modelopt.onnx.autocast` takes no graph with
DequantizeLinear and wants CUDA's packages; `onnxconverter-common` is what ONNX Runtime's converter grew out of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from eamdeploy.convert.ort_tools import import_tool
from eamdeploy.engines.trt.precision import Step, steps_to_keep
from eamdeploy.graph.operator_set import operator_set
from eamdeploy.graph.weights import fits_one_file, infer_shapes

_KINDS = {
    "LayerNormalization": "normalization",
    "Softmax": "softmax",
    "ReduceMean": "mean",
    "Sqrt": "square root",
    "Add": "add",
    "Sub": "subtract",
    "Mul": "multiply",
    "Pow": "power",
    "Div": "divide",
    "Reshape": "view",
    "Cast": "view",
    "Identity": "view",
}
HALF_SCALES_OPSET = 19


def to_half(model: onnx.ModelProto, kinds: Sequence[str]) -> onnx.ModelProto:
    """`model` with float16 tensors, but for what `kinds` names, Q/DQ, input and output.

    Args:
        kinds: as for `steps_to_keep`.
    """
    named = onnx.ModelProto()
    named.CopyFrom(model)
    for index, node in enumerate(named.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    steps = _steps(named)
    large = not fits_one_file(named)
    float16 = import_tool("transformers.float16")
    half: onnx.ModelProto = float16.convert_float_to_float16(
        infer_shapes(named) if large else named,
        keep_io_types=True,
        disable_shape_infer=large,
        op_block_list=list(float16.DEFAULT_OP_BLOCK_LIST),
        node_block_list=[
            *(named.graph.node[index].name for index in steps_to_keep(steps, kinds)),
            *_with_float_scales(named),
        ],
    )
    nodes = _sorted(_without_detours(list(half.graph.node), {item.name for item in half.graph.output}))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del half.graph.node[:], half.graph.value_info[:]
    half.graph.node.extend(copies)
    return half


def has_decomposed_norms(model: onnx.ModelProto) -> bool:
    """Whether a LayerNorm is spelled out in `model`: TensorRT before 8.6 and operator sets before 17 know no other."""
    steps = _steps(model)
    return any(steps[index].kind != "normalization" for index in steps_to_keep(steps, ("normalization",)))


def _steps(model: onnx.ModelProto) -> list[Step]:
    return [
        Step(_KINDS.get(node.op_type, node.op_type), tuple(node.input), tuple(node.output)) for node in model.graph.node
    ]


def _with_float_scales(model: onnx.ModelProto) -> list[str]:
    """Names of the QuantizeLinear and DequantizeLinear nodes whose scales stay float32.

    Those of frozen maps do: a row of many codes has a scale that float16 would round too much. Those around an INT8
    product don't, if float16 has the same numbers and the operator set has float16 scales.
    """
    graph = model.graph
    opset = operator_set(model)
    constants = {item.name: item for item in graph.initializer}
    quantized = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    factors = {name for node in graph.node if node.op_type == "MatMul" for name in node.input}
    kept = []
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        around = node.op_type == "QuantizeLinear" or node.input[0] in quantized or node.output[0] in factors
        scale = constants.get(node.input[1])
        values = None if scale is None else numpy_helper.to_array(scale)
        fits = values is not None and np.array_equal(values.astype(np.float16), values)
        if opset < HALF_SCALES_OPSET or not around or not fits:
            kept.append(node.name)
    return kept


def _without_detours(nodes: list[onnx.NodeProto], results: set[str]) -> list[onnx.NodeProto]:
    """The nodes without casts that the converter made twice, or back and forth between two float32 steps.

    It wraps each step that stays float32 for itself: a square would pass through float16 on its way to the mean, and
    overflow there; and a tensor that two such steps read gets the same Cast twice, by one name (no valid graph) or, in
    ONNX Runtime 1.23, by two.
    """
    unique = {node.output[0]: node for node in nodes if _casts_to(node) is not None}
    others = [node for node in nodes if _casts_to(node) is None]
    for node in others:
        for index, name in enumerate(node.input):
            back = unique.get(name)
            forth = None if back is None else unique.get(back.input[0])
            if back is None or forth is None:
                continue
            types = (_casts_to(forth), _casts_to(back))
            if types == (onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT):
                node.input[index] = forth.input[0]
    firsts: dict[tuple[str, int | None], str] = {}
    for cast in unique.values():
        firsts.setdefault((cast.input[0], _casts_to(cast)), cast.output[0])
    for node in others:
        for index, name in enumerate(node.input):
            if name in unique:
                node.input[index] = firsts[unique[name].input[0], _casts_to(unique[name])]
    kept = [*others, *unique.values()]
    while True:
        read = {name for node in kept for name in node.input} | results
        needed = [node for node in kept if _casts_to(node) is None or node.output[0] in read]
        if len(needed) == len(kept):
            return kept
        kept = needed


def _casts_to(node: onnx.NodeProto) -> int | None:
    """The type that a Cast makes; None for any other node."""
    return next((item.i for item in node.attribute if item.name == "to"), None) if node.op_type == "Cast" else None


def _sorted(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes, each after those whose outputs it reads and otherwise in the order they had."""
    producers = {name: index for index, node in enumerate(nodes) for name in node.output}
    done: set[int] = set()
    order: list[onnx.NodeProto] = []
    pending = list(range(len(nodes)))[::-1]
    while pending:
        index = pending[-1]
        before = [producers[name] for name in nodes[index].input if name in producers and producers[name] not in done]
        if index not in done and before:
            pending += before
            continue
        pending.pop()
        if index not in done:
            done.add(index)
            order.append(nodes[index])
    return order
