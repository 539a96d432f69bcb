from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import timm_graphs
from attention_graphs import IMAGES, Floats, GraphBuilder, Layout, N, Scale, Spelling, forward, run_unoptimized
from onnx import numpy_helper
from timm_graphs import DEPTH, EXPORTS, Export

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.parity import TOLERANCES, ParityReport, compare
from eamdeploy.passes.base import PassResult, PlannedPass, run_passes
from eamdeploy.passes.canonical_attention import CanonicalAttention

CANONICAL_NODES = 18
SPELLED_NODES = {"split": 15, "slice": 17, "gather": 14, "separate": 19, "interleaved": 12}


def rewrite(graph: gs.Graph, expected: int) -> PassResult:
    (result,) = run_passes(graph, [PlannedPass(CanonicalAttention(), expected)])
    return result


def parity(stock: onnx.ModelProto, rewritten: onnx.ModelProto, images: Floats) -> ParityReport:
    return compare(run_unoptimized(stock, images), run_unoptimized(rewritten, images), TOLERANCES["f32-reassoc"])


@pytest.mark.parametrize("export", EXPORTS, ids=str)
def test_exports_are_rewritten_and_compute_the_same(export: Export) -> None:
    stock = export.model()
    graph = to_graph(stock)
    result = rewrite(graph, DEPTH)
    assert (result.name, result.rewritten, result.skipped) == ("canonical_attention", DEPTH, ())
    model = to_model(graph)
    ops = Counter(node.op_type for node in model.graph.node)
    assert ops["Softmax"] == DEPTH and not {"Split", "Squeeze"} & set(ops)
    report = parity(stock, model, timm_graphs.IMAGES[: export.batch])
    assert report.passed, report


@pytest.mark.parametrize("layout", get_args(Layout))
def test_node_count_changes_from_the_spelling_to_the_canonical_form(layout: Layout) -> None:
    result = rewrite(to_graph(Spelling(layout).model()), 1)
    assert result.nodes_after - result.nodes_before == CANONICAL_NODES - SPELLED_NODES[layout]


SPELLINGS = [
    *(Spelling(layout, batch=batch) for layout in get_args(Layout) for batch in (2, "batch")),
    *(Spelling("separate", scale) for scale in get_args(Scale)),
    Spelling("separate", biased=(True, False, True)),
    Spelling(biased=(False, False, False)),
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_hand_written_spellings_compute_what_numpy_says(spelling: Spelling) -> None:
    graph = to_graph(spelling.model())
    rewrite(graph, 1)
    report = compare(forward([spelling.weights]), run_unoptimized(to_model(graph), IMAGES), TOLERANCES["f32-reassoc"])
    assert report.passed, report


@pytest.mark.parametrize("batch", [2, "batch"])
@pytest.mark.parametrize("norm", ["layer", "layer-spelled", "rms-spelled"])
def test_norms_compute_the_same(norm: str, batch: int | str) -> None:
    stock = Spelling(norm=norm, batch=batch).model()  # type: ignore[arg-type]
    graph = to_graph(stock)
    rewrite(graph, 1)
    report = parity(stock, to_model(graph), IMAGES)
    assert report.passed, report


@pytest.mark.parametrize("export", EXPORTS[:3], ids=str)
def test_second_run_changes_nothing(export: Export) -> None:
    graph = to_graph(export.model())
    rewrite(graph, DEPTH)
    before = to_model(graph).SerializeToString(deterministic=True)
    result = rewrite(graph, 0)
    assert [skip.reason for skip in result.skipped] == ["already canonical"] * DEPTH
    assert to_model(graph).SerializeToString(deterministic=True) == before


def test_nodes_without_names_do_not_clash() -> None:
    stock = Export("vit", "torchscript", 2, 17).model()
    for node in stock.graph.node:
        node.name = ""
    graph = to_graph(stock)
    rewrite(graph, DEPTH)
    report = parity(stock, to_model(graph), timm_graphs.IMAGES)
    assert report.passed, report


def test_no_tensor_around_attention_has_five_axes() -> None:
    graph = to_graph(Export("vit", "torchscript", 2, 17).model())
    assert any(len(tensor.shape or ()) == 5 for tensor in graph.tensors().values())
    rewrite(graph, DEPTH)
    assert all(len(tensor.shape or ()) <= 4 for tensor in graph.tensors().values())


def test_attention_that_is_refused_is_an_error_with_the_reason() -> None:
    g = GraphBuilder()
    scores = g.op("Add", g.op("MatMul", g.queries(), g.keys()), np.zeros((N, N), np.float32))
    masked = g.merge_heads(g.op("MatMul", g.op("Softmax", scores, axis=-1), g.values()))
    graph = to_graph(g.classify(g.project(masked)))
    with pytest.raises(UnsupportedGraph, match=r"canonical_attention failed.*expected 1 places; got 0.*come from Add"):
        rewrite(graph, 1)


def test_perturbed_weight_fails_the_parity_that_the_rewrite_passes() -> None:
    stock = Export("vit", "torchscript", 2, 17).model()
    graph = to_graph(stock)
    rewrite(graph, DEPTH)
    model = to_model(graph)
    names = [
        item.name for item in model.graph.initializer if item.name.endswith(("/q_weight", "/k_weight", "/v_weight"))
    ]
    assert len(names) == 3 * DEPTH
    for name in names:
        perturbed = onnx.ModelProto()
        perturbed.CopyFrom(model)
        tensor = next(item for item in perturbed.graph.initializer if item.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[5, 7] += 0.1
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        assert parity(stock, model, timm_graphs.IMAGES).passed
        assert not parity(stock, perturbed, timm_graphs.IMAGES).passed, name
