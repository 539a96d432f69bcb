from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from attention_graphs import IMAGES, D, GraphBuilder, run_unoptimized, scalar
from timm_graphs import DEPTH, Export

from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.passes.base import PassResult, PlannedPass, run_passes
from eamdeploy.passes.fusable_gelu import FusableGelu

ROOT_HALF = 0.5**0.5


def one_plus_erf(g: GraphBuilder) -> str:
    return g.op("Add", g.op("Erf", g.op("Mul", g.x, scalar(ROOT_HALF))), scalar(1))


def halved_first(g: GraphBuilder) -> str:
    """As dynamo writes it."""
    return g.op("Mul", g.x, g.op("Mul", scalar(0.5), one_plus_erf(g)))


def halved_first_turned_round(g: GraphBuilder) -> str:
    return g.op("Mul", g.op("Mul", one_plus_erf(g), scalar(0.5)), g.x)


def halved_last(g: GraphBuilder) -> str:
    return g.op("Mul", g.op("Mul", g.x, one_plus_erf(g)), scalar(0.5))


def thirds(g: GraphBuilder) -> str:
    return g.op("Mul", g.x, g.op("Mul", scalar(1 / 3), one_plus_erf(g)))


def half_of_each_channel(g: GraphBuilder) -> str:
    return g.op("Mul", g.x, g.op("Mul", np.full(D, 0.5, np.float32), one_plus_erf(g)))


def erf_read_twice(g: GraphBuilder) -> str:
    error = g.op("Erf", g.x)
    return g.op("Add", g.op("Mul", g.x, g.op("Mul", g.op("Add", error, scalar(1)), scalar(0.5))), error)


def half_read_twice(g: GraphBuilder) -> str:
    half = g.op("Mul", scalar(0.5), one_plus_erf(g))
    return g.op("Add", g.op("Mul", g.x, half), half)


def half_squared(g: GraphBuilder) -> str:
    half = g.op("Mul", scalar(0.5), one_plus_erf(g))
    return g.op("Mul", half, half)


def half_times_a_constant(g: GraphBuilder) -> str:
    return g.op("Mul", np.full(D, 3, np.float32), g.op("Mul", scalar(0.5), one_plus_erf(g)))


def half_added(g: GraphBuilder) -> str:
    return g.op("Add", g.x, g.op("Mul", scalar(0.5), one_plus_erf(g)))


def erf_alone(g: GraphBuilder) -> str:
    return g.op("Erf", g.x)


NEAR_MISSES: dict[Callable[[GraphBuilder], str], str] = {
    halved_last: "already multiplied with x before it is halved",
    thirds: "another constant than 0.5",
    half_of_each_channel: "another constant than 0.5",
    erf_read_twice: "not followed by a sum and a product of their own",
    half_read_twice: "the halved sum is not multiplied with x",
    half_squared: "the halved sum is not multiplied with x",
    half_times_a_constant: "the halved sum is not multiplied with x",
    half_added: "the halved sum is not multiplied with x",
    erf_alone: "not followed by a sum and a product of their own",
}


def drawn(draw: Callable[[GraphBuilder], str]) -> onnx.ModelProto:
    g = GraphBuilder("batch")
    return g.classify(draw(g))


def rewrite(graph: gs.Graph, expected: int) -> PassResult:
    (result,) = run_passes(graph, [PlannedPass(FusableGelu(), expected)])
    return result


@pytest.mark.parametrize("draw", [halved_first, halved_first_turned_round], ids=lambda draw: draw.__name__)
def test_halving_moves_behind_the_product_bit_for_bit(draw: Callable[[GraphBuilder], str]) -> None:
    model = drawn(draw)
    graph = to_graph(model)
    result = rewrite(graph, 1)
    assert (result.name, result.skipped, result.nodes_after - result.nodes_before) == ("fusable_gelu", (), 0)
    rewritten = to_model(graph)
    np.testing.assert_array_equal(run_unoptimized(rewritten, IMAGES), run_unoptimized(model, IMAGES))
    again = rewrite(to_graph(rewritten), 0)
    assert [skip.reason for skip in again.skipped] == ["already multiplied with x before it is halved"]


@pytest.mark.parametrize("draw", NEAR_MISSES, ids=lambda draw: draw.__name__)
def test_near_miss_is_left_alone_with_the_reason(draw: Callable[[GraphBuilder], str]) -> None:
    graph = to_graph(drawn(draw))
    before = to_model(graph).SerializeToString(deterministic=True)
    (skip,) = rewrite(graph, 0).skipped
    assert NEAR_MISSES[draw] in skip.reason
    assert to_model(graph).SerializeToString(deterministic=True) == before


def test_onnxruntime_fuses_dynamos_gelu_only_after_the_rewrite(tmp_path: Path) -> None:
    graph = Export("vit", "dynamo", None, 18).graph()
    assert fused_gelus(to_model(graph), tmp_path) == 0
    rewrite(graph, DEPTH)
    assert fused_gelus(to_model(graph), tmp_path) == DEPTH


def fused_gelus(model: onnx.ModelProto, folder: Path) -> int:
    """How many GELUs ONNX Runtime runs as one kernel."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(folder / "optimized.onnx")
    return sum(node.op_type in ("Gelu", "BiasGelu") for node in optimized.graph.node)
