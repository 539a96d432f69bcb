from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from attention_graphs import Spelling
from timm_graphs import Export

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.invariants import check_invariants
from eamdeploy.graph.model import to_graph


def variable(name: str) -> gs.Variable:
    return gs.Variable(name, np.float32, [1, 4])


def node(source: gs.Tensor, result: gs.Tensor) -> gs.Node:
    return gs.Node("Relu", name=f"make_{result.name}", inputs=[source], outputs=[result])


def chain() -> gs.Graph:
    """image → inner → logits"""
    image, inner, logits = (variable(name) for name in ("image", "inner", "logits"))
    return gs.Graph([node(image, inner), node(inner, logits)], inputs=[image], outputs=[logits])


@pytest.mark.parametrize("export", [Export("vit", "dynamo", None, 18), Export("vit", "torchscript", 2, 17)], ids=str)
def test_exports_are_whole(export: Export) -> None:
    check_invariants(export.graph())


def test_hand_built_graphs_are_whole() -> None:
    check_invariants(chain())
    check_invariants(to_graph(Spelling(norm="layer-spelled").model()))


def test_absent_optional_inputs_are_no_dangling_reads() -> None:
    graph = chain()
    graph.nodes[0].inputs += [gs.Variable.empty(), gs.Variable.empty()]
    check_invariants(graph)


def test_tensor_that_nothing_writes_is_named() -> None:
    graph = chain()
    del graph.nodes[0]
    with pytest.raises(UnsupportedGraph, match="make_logits reads inner, which nothing before it writes"):
        check_invariants(graph)


def test_node_before_what_it_reads_is_named() -> None:
    graph = chain()
    graph.nodes.reverse()
    with pytest.raises(UnsupportedGraph, match="make_logits reads inner, which nothing before it writes"):
        check_invariants(graph)


def test_tensor_written_twice_is_named() -> None:
    graph = chain()
    second = gs.Node("Relu", name="again", inputs=[graph.inputs[0]])
    second.outputs.append(graph.nodes[0].outputs[0])
    graph.nodes.insert(1, second)
    with pytest.raises(UnsupportedGraph, match="again writes inner a second time"):
        check_invariants(graph)


def test_input_that_a_node_overwrites_is_named() -> None:
    graph = chain()
    graph.nodes.append(node(graph.nodes[0].outputs[0], graph.inputs[0]))
    with pytest.raises(UnsupportedGraph, match="make_image writes image a second time"):
        check_invariants(graph)


def test_output_that_nothing_writes_is_named() -> None:
    graph = chain()
    graph.nodes[1].outputs[0] = variable("elsewhere")
    with pytest.raises(UnsupportedGraph, match="nothing writes the output logits"):
        check_invariants(graph)


def test_two_tensors_of_one_name_are_refused() -> None:
    graph = chain()
    graph.nodes.append(node(graph.inputs[0], variable("inner")))
    with pytest.raises(UnsupportedGraph, match="two tensors share the name inner"):
        check_invariants(graph)


def test_constant_and_variable_of_one_name_are_refused() -> None:
    graph = chain()
    graph.nodes[1].inputs.append(gs.Constant("inner", np.zeros(1, np.float32)))
    with pytest.raises(UnsupportedGraph, match="two tensors share the name inner"):
        check_invariants(graph)


@pytest.mark.parametrize("change", ["input name", "output name", "second input", "second output", "no output"])
def test_other_inputs_and_outputs_than_the_contracts_are_refused(change: str) -> None:
    graph = chain()
    if change == "input name":
        graph.inputs[0].name = "pixels"
    elif change == "output name":
        graph.outputs[0].name = "scores"
    elif change == "second input":
        graph.inputs.append(variable("mask"))
    elif change == "second output":
        graph.outputs.append(graph.nodes[0].outputs[0])
    else:
        graph.outputs.clear()
    with pytest.raises(UnsupportedGraph, match="inputs and outputs are not the contract's"):
        check_invariants(graph)
