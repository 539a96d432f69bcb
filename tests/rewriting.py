"""Run one pass on a small graph and compare before and after, for tests of passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from attention_graphs import Floats, run_unoptimized
from numpy.typing import NDArray
from onnx import numpy_helper

from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.parity.gate import TOLERANCES, compare
from eamdeploy.passes.base import Pass, PassResult, PlannedPass, run_passes


def rewrite(graph: gs.Graph, rewrite_pass: Pass[Any], expected: int) -> PassResult:
    """What the pass did to `graph`, at so many places."""
    (result,) = run_passes(graph, [PlannedPass(rewrite_pass, expected)])
    return result


def rewritten(
    stock: onnx.ModelProto, rewrite_pass: Pass[Any], expected: int, *before: Pass[Any]
) -> tuple[onnx.ModelProto, PassResult]:
    """`stock` after the passes `before` and `rewrite_pass`, checked, and what the last one did.

    A second run of it changes nothing.
    """
    graph = to_graph(stock)
    run_passes(graph, [PlannedPass(each, None) for each in before])
    result = rewrite(graph, rewrite_pass, expected)
    model = to_model(graph)
    once = serialized(graph)
    again = rewrite(graph, rewrite_pass, 0)
    assert again.nodes_before == again.nodes_after and serialized(graph) == once, "a second run changes something"
    return model, result


def left_alone(stock: onnx.ModelProto, rewrite_pass: Pass[Any], *before: Pass[Any]) -> list[str]:
    """The reasons why the pass changes nothing of `stock` after the passes `before`."""
    graph = to_graph(stock)
    run_passes(graph, [PlannedPass(each, None) for each in before])
    once = serialized(graph)
    result = rewrite(graph, rewrite_pass, 0)
    assert serialized(graph) == once
    return [skip.reason for skip in result.skipped]


def serialized(graph: gs.Graph) -> bytes:
    return bytes(to_model(graph).SerializeToString(deterministic=True))


def ops(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each operator."""
    return Counter(node.op_type for node in model.graph.node)


def initializers(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


def assert_bit_exact(stock: onnx.ModelProto, model: onnx.ModelProto, images: Floats) -> None:
    np.testing.assert_array_equal(run_unoptimized(model, images), run_unoptimized(stock, images))


def same(reference: Floats, model: onnx.ModelProto, images: Floats) -> bool:
    """Whether `model` computes `reference` up to float32 reassociation."""
    return compare(reference, run_unoptimized(model, images), TOLERANCES["f32-reassoc"]).passed


def changed(model: onnx.ModelProto, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> onnx.ModelProto:
    """A copy of `model` with another value of the initializer `name`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(item for item in copy.graph.initializer if item.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return copy


def swapped(values: NDArray[Any]) -> NDArray[Any]:
    """`values` with the first two exchanged."""
    values[[0, 1]] = values[[1, 0]]
    return values
