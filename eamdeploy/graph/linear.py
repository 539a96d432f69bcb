"""Questions to linear layers, which are MatMul nodes with a constant."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from eamdeploy.graph.layout import LAYOUT_OPS


def is_classifier(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether nothing but the addition of a bias lies between the product and the model's output."""
    tensor = node.outputs[0]
    while len(tensor.outputs) == 1 and tensor.outputs[0].op in ("Add", *LAYOUT_OPS):
        tensor = tensor.outputs[0].outputs[0]
    return any(tensor is output for output in graph.outputs)
