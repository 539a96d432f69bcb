"""Rules about attention that TensorRT should fuse into one kernel; breaking one costs time, not the build.

Attention here is a Softmax between two products: MatMul, then additions, masks and factors, Softmax, then MatMul.
Source: docs/tensorrt.md, Fused attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from eamdeploy.engines.trt.versions import Capabilities
from eamdeploy.lint.base import Place, Rule
from eamdeploy.lint.view import GraphView, is_scalar, name_of

_PASS_ON = ("Cast", "Dropout", "Identity", "QuantizeLinear", "DequantizeLinear", "Reshape", "Expand")
_BEFORE = ("Add", "Sub", "Where", "Mul", "Div", *_PASS_ON)
_AFTER = ("Where", "Mul", "Add", "Concat", "ScatterND", "ScatterElements", *_PASS_ON)
_LEAST_HEAD, _LARGEST_HEAD, _HEAD_STEP = 16, 256, 8


@dataclass(frozen=True)
class _Softmax:
    """A softmax in attention.

    Attributes:
        between: nodes from the product to the softmax, the nearest first.
        product: of queries and keys.
    """

    node: onnx.NodeProto
    between: tuple[onnx.NodeProto, ...]
    product: onnx.NodeProto


def _softmaxes(graph: GraphView) -> Iterator[_Softmax]:
    """Every Softmax that a product leads to."""
    for node in graph.ops("Softmax"):
        found = _to_product(graph, node.input[0], ())
        if found is not None:
            yield _Softmax(node, *found)


def _to_product(
    graph: GraphView, name: str, passed: tuple[onnx.NodeProto, ...]
) -> tuple[tuple[onnx.NodeProto, ...], onnx.NodeProto] | None:
    node = graph.writer.get(name)
    if node is None or name in graph.initializers:
        return None
    if node.op_type == "MatMul":  # of two computed operands; else it is a linear layer
        return None if any(source in graph.initializers for source in node.input) else (passed, node)
    if node.op_type not in _BEFORE:
        return None
    routes = (_to_product(graph, source, (*passed, node)) for source in node.input)
    return next((route for route in routes if route is not None), None)


def _scale(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for softmax in _softmaxes(graph):
        for node in softmax.between:
            if node.op_type in ("Mul", "Div") and any(is_scalar(graph.value(name)) for name in node.input):
                yield Place(name_of(node), "the scores are scaled after the product of queries and keys")


def _consumers(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for softmax in _softmaxes(graph):
        readers = graph.readers.get(softmax.node.output[0], [])
        if len(readers) > 1:
            names = ", ".join(map(name_of, readers))
            yield Place(
                name_of(softmax.node), f"the softmax has {len(readers)} readers ({names}), expected one product"
            )


def _mixed(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    """Something between the softmax and the product with the values, such as frozen entries put in place."""
    for softmax in _softmaxes(graph):
        (name,) = softmax.node.output
        while len(readers := graph.readers.get(name, [])) == 1 and readers[0].op_type in _AFTER:
            if readers[0].op_type not in _PASS_ON:
                where = f"between the softmax {name_of(softmax.node)} and the product with the values"
                what = f"{readers[0].op_type} {where}: frozen and live attention share one product"
                yield Place(name_of(readers[0]), what)
                break
            name = readers[0].output[0]


def _head_size(graph: GraphView, can: Capabilities) -> Iterator[Place]:
    for softmax in _softmaxes(graph):
        shape = graph.shapes.get(softmax.product.input[0])
        size = shape[-1] if shape else None
        if isinstance(size, int) and not (_LEAST_HEAD <= size <= _LARGEST_HEAD and size % _HEAD_STEP == 0):
            yield Place(name_of(softmax.product), f"head size: expected 16 … 256, a multiple of 8, got {size}")


RULES = (
    Rule("attention-scale", _scale, "all", "Scale queries or keys before the product.", "warning"),
    Rule("attention-readers", _consumers, "all", "Let one product alone read the softmax.", "warning"),
    Rule("attention-mixed", _mixed, "all", "Freeze whole heads or rows: live ones then stay one attention.", "warning"),
    Rule("attention-head-size", _head_size, "all", "Choose a model with another head size.", "warning"),
)
