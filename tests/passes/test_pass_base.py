from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from eamdeploy.errors import CheckpointError, UnsupportedGraph
from eamdeploy.graph.skip import Skip
from eamdeploy.passes.base import PassResult, PlannedPass, run_passes


def variable(name: str) -> gs.Variable:
    return gs.Variable(name, np.float32, [1, 4])


def chain() -> gs.Graph:
    """image ─Relu→ one ─Relu→ two ─Sigmoid→ logits"""
    tensors = [variable(name) for name in ("image", "one", "two", "logits")]
    nodes = [
        gs.Node(op, name=f"{op}_{i}", inputs=[tensors[i]], outputs=[tensors[i + 1]])
        for i, op in enumerate(("Relu", "Relu", "Sigmoid"))
    ]
    return gs.Graph(nodes, inputs=tensors[:1], outputs=tensors[-1:])


def rename(graph: gs.Graph, node: gs.Node) -> None:
    node.op = "Tanh"


@dataclass
class EveryRelu:
    """Matches every Relu, skips the rest and does `edit` to what it matches."""

    edit: Callable[[gs.Graph, gs.Node], None] = rename
    name: str = "every_relu"

    def match(self, graph: gs.Graph) -> list[gs.Node | Skip]:
        return [node if node.op == "Relu" else Skip("not a Relu", node.name) for node in graph.nodes]

    def rewrite(self, graph: gs.Graph, match: gs.Node) -> None:
        self.edit(graph, match)


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def test_result_says_what_was_done() -> None:
    graph = chain()
    assert run_passes(graph, [PlannedPass(EveryRelu(), 2), PlannedPass(EveryRelu(name="again"), 0)]) == [
        PassResult("every_relu", 2, (Skip("not a Relu", "Sigmoid_2"),), 3, 3),
        PassResult("again", 0, tuple(Skip("not a Relu", name) for name in ("Relu_0", "Relu_1", "Sigmoid_2")), 3, 3),
    ]
    assert ops(graph) == ["Tanh", "Tanh", "Sigmoid"]


def test_empty_plan_changes_nothing() -> None:
    graph = chain()
    assert run_passes(graph, []) == []
    assert ops(graph) == ["Relu", "Relu", "Sigmoid"]


@pytest.mark.parametrize("expected", [0, 1, 3])
def test_other_number_of_places_is_an_error_and_nothing_is_rewritten(expected: int) -> None:
    graph = chain()
    message = rf"pass every_relu failed.*expected {expected} places; got 2 \(Sigmoid_2: not a Relu\)"
    with pytest.raises(UnsupportedGraph, match=message):
        run_passes(graph, [PlannedPass(EveryRelu(), expected)])
    assert ops(graph) == ["Relu", "Relu", "Sigmoid"]


def test_error_says_so_when_nothing_was_skipped() -> None:
    graph = chain()
    graph.nodes[2].op = "Relu"
    with pytest.raises(UnsupportedGraph, match=r"got 3 \(nothing was skipped\)"):
        run_passes(graph, [PlannedPass(EveryRelu(), 2)])


def test_pass_without_an_expected_number_takes_what_it_finds() -> None:
    (result,) = run_passes(chain(), [PlannedPass(EveryRelu(), None)])
    assert result.rewritten == 2


def test_error_names_the_passes_that_had_already_run() -> None:
    plan = [
        PlannedPass(EveryRelu(name="first"), 2),
        PlannedPass(EveryRelu(name="second"), 0),
        PlannedPass(EveryRelu(name="third"), 1),
        PlannedPass(EveryRelu(name="fourth"), 0),
    ]
    with pytest.raises(UnsupportedGraph, match=r"pass third failed \(passes before it: first, second\): "):
        run_passes(chain(), plan)
    with pytest.raises(UnsupportedGraph, match=r"pass third failed \(passes before it: none\): "):
        run_passes(chain(), plan[2:])


def test_any_of_our_errors_is_put_down_to_the_pass_with_its_cause() -> None:
    def refuse(graph: gs.Graph, node: gs.Node) -> None:
        raise CheckpointError("odd weights")

    with pytest.raises(UnsupportedGraph, match=r"pass every_relu failed.*odd weights") as caught:
        run_passes(chain(), [PlannedPass(EveryRelu(refuse), 2)])
    assert isinstance(caught.value.__cause__, CheckpointError)


def test_bug_in_a_pass_keeps_its_own_kind() -> None:
    def stumble(graph: gs.Graph, node: gs.Node) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_passes(chain(), [PlannedPass(EveryRelu(stumble), 2)])


def test_dead_nodes_are_removed_and_the_rest_is_sorted() -> None:
    def replace(graph: gs.Graph, node: gs.Node) -> None:
        """Reads the same, from a new node at the end of the list."""
        result = variable(f"{node.name}/new")
        consumer = node.outputs[0].outputs[0]
        graph.nodes.append(gs.Node("Tanh", name=f"{node.name}/new", inputs=list(node.inputs), outputs=[result]))
        consumer.inputs = [result]

    graph = chain()
    (result,) = run_passes(graph, [PlannedPass(EveryRelu(replace), 2)])
    assert ops(graph) == ["Tanh", "Tanh", "Sigmoid"]
    assert (result.nodes_before, result.nodes_after) == (3, 3)


def test_broken_graph_is_put_down_to_the_pass_that_broke_it() -> None:
    def dangle(graph: gs.Graph, node: gs.Node) -> None:
        node.inputs = [variable("nowhere")]

    plan = [PlannedPass(EveryRelu(lambda *_: None, "idle"), 2), PlannedPass(EveryRelu(dangle, "dangle"), 2)]
    with pytest.raises(UnsupportedGraph, match=r"pass dangle failed \(passes before it: idle\).*reads nowhere"):
        run_passes(chain(), [*plan, PlannedPass(EveryRelu(name="never"), 0)])


def test_pass_that_exposes_an_inner_tensor_is_refused() -> None:
    """An attention map that is also an output would keep what was rewritten alive."""

    def expose(graph: gs.Graph, node: gs.Node) -> None:
        graph.outputs.append(node.outputs[0])

    with pytest.raises(UnsupportedGraph, match=r"pass every_relu failed.*not the contract's"):
        run_passes(chain(), [PlannedPass(EveryRelu(expose), 2)])
