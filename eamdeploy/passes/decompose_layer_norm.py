"""Spell LayerNormalization out, for a TensorRT that does not know it.

Before:  LayerNormalization(x, scale, bias), over the last axis
After:   c = x − mean(x) ; c / √(mean(c·c) + ε) · scale + bias
Shapes:  x [..., D]  scale [D]  bias [D]
Needs:   the last axis; no use of the mean and the deviation that the operator also gives
Exact:   up to float32 rounding
Source:  ONNX, LayerNormalization-17; TensorRT knows it from 8.6
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from eamdeploy.graph.nodes import redirect
from eamdeploy.graph.skip import Skip
from eamdeploy.graph.writer import GraphWriter

_AXES_ARE_INPUTS = 18  # of ReduceMean, from this opset


@dataclass(frozen=True)
class _Match:
    node: gs.Node


class DecomposeLayerNorm:
    """LayerNormalization as the operators that it stands for."""

    name = "decompose_layer_norm"

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """Every LayerNormalization."""
        return [_match(node) for node in graph.nodes if node.op == "LayerNormalization"]

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """What read the node's result reads the new nodes'."""
        node, (x, scale, *bias) = match.node, match.node.inputs
        writer = GraphWriter(graph, f"{node.name}/decomposed")
        (old, *_), shape = node.outputs, x.shape
        mean = _mean(graph, writer, "mean", x)
        centred = writer.node("centred", "Sub", [x, mean], shape)
        square = writer.node("square", "Mul", [centred, centred], shape)
        variance = _mean(graph, writer, "variance", square)
        epsilon = writer.constant("epsilon", np.array(node.attrs.get("epsilon", 1e-5), np.float32))
        shifted = writer.node("variance_shifted", "Add", [variance, epsilon], variance.shape)
        deviation = writer.node("deviation", "Sqrt", [shifted], variance.shape)
        result = writer.node("normalized", "Div", [centred, deviation], shape)
        result = writer.node("scaled", "Mul", [result, scale], shape)
        for tensor in bias:
            result = writer.node("biased", "Add", [result, tensor], shape)
        redirect(old, result)


def _mean(graph: gs.Graph, writer: GraphWriter, name: str, x: gs.Tensor) -> gs.Variable:
    shape = None if x.shape is None else [*x.shape[:-1], 1]
    if graph.opset >= _AXES_ARE_INPUTS:
        return writer.node(name, "ReduceMean", [x, writer.integers(f"{name}_axes", -1)], shape, keepdims=1)
    return writer.node(name, "ReduceMean", [x], shape, axes=[-1], keepdims=1)


def _match(node: gs.Node) -> _Match | Skip:
    x = node.inputs[0]
    rank = None if x.shape is None else len(x.shape)
    if node.attrs.get("axis", -1) not in (-1, None if rank is None else rank - 1):
        return Skip("normalizes more than the last axis", node.name)
    if any(tensor.outputs for tensor in node.outputs[1:]):
        return Skip("its mean or deviation is read", node.name)
    return _Match(node)
