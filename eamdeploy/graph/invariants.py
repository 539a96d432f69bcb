"""What must hold for every graph between two passes."""

from __future__ import annotations

from collections import Counter

import onnx_graphsurgeon as gs

from eamdeploy.errors import UnsupportedGraph

INPUT_NAME = "image"
OUTPUT_NAME = "logits"


def check_invariants(graph: gs.Graph) -> None:
    """Nothing happens if `graph` is whole and keeps the ONNX contract of docs/design.md.

    Raises:
        UnsupportedGraph: a tensor is read but never written, written twice or shares its name with another, a node
            stands before what it reads, or the inputs and outputs are not `image` and `logits`.
    """
    ends = ([t.name for t in graph.inputs], [t.name for t in graph.outputs])
    if ends != ([INPUT_NAME], [OUTPUT_NAME]):
        raise UnsupportedGraph(
            "the graph's inputs and outputs are not the contract's", expected=([INPUT_NAME], [OUTPUT_NAME]), got=ends
        )
    written = {id(tensor) for tensor in graph.inputs}
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Variable) and not tensor.is_empty() and id(tensor) not in written:
                raise UnsupportedGraph(f"node {node.name} reads {tensor.name}, which nothing before it writes")
        for tensor in node.outputs:
            if id(tensor) in written:
                raise UnsupportedGraph(f"node {node.name} writes {tensor.name} a second time")
            written.add(id(tensor))
    for tensor in graph.outputs:
        if id(tensor) not in written:
            raise UnsupportedGraph(f"nothing writes the output {tensor.name}")
    distinct = {id(tensor): tensor.name for tensor in _all_tensors(graph)}
    twice = [name for name, count in Counter(distinct.values()).items() if name and count > 1]
    if twice:
        raise UnsupportedGraph(f"two tensors share the name {twice[0]}")


def _all_tensors(graph: gs.Graph) -> list[gs.Tensor]:
    return [*graph.inputs, *(t for node in graph.nodes for t in (*node.inputs, *node.outputs))]
