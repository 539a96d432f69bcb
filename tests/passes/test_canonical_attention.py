from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import timm_graphs
from attention_graphs import (
    GRID_IMAGES,
    IMAGES,
    POSITION_BIAS,
    Floats,
    GraphBuilder,
    Layout,
    N,
    Scale,
    Spelling,
    WindowBlock,
    Windows,
    forward,
    run_unoptimized,
    window_mask,
)
from onnx import numpy_helper
from timm_graphs import DEPTH, EXPORTS, Export

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.parity.gate import TOLERANCES, ParityReport, compare
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


@pytest.mark.parametrize("batch", [1, 2, "batch"])
@pytest.mark.parametrize(
    ("bias", "mask", "added"),
    [
        (None, None, 0),
        (POSITION_BIAS, None, 1),
        (POSITION_BIAS, window_mask(4, (1, 1, 1, 1)), 1),
        (POSITION_BIAS, window_mask(4), 1),
        (None, window_mask(4, (0, 1, 1, 2)), 2),
    ],
    ids=["plain", "bias", "one mask", "a mask for each window", "masks by kind"],
)
def test_bias_and_mask_become_one_constant(
    bias: Floats | None, mask: Floats | None, added: int, batch: int | str
) -> None:
    """A mask that differs between windows splits them off the batch and joins them again, but for one image."""
    block = WindowBlock(Windows(shift=(1, 2)), bias, mask)
    stock = block.model(batch)
    graph = to_graph(stock)
    spelled = 14 + (bias is not None) + 3 * (mask is not None)
    split = 2 if mask is not None and (mask != mask[0]).any() and batch != 1 else 0
    result = rewrite(graph, 1)
    assert result.nodes_after - result.nodes_before == CANONICAL_NODES + added + split - spelled
    model = to_model(graph)
    images = GRID_IMAGES[: 1 if batch == 1 else 2]
    assert parity(stock, model, images).passed
    report = compare(block.forward(images), run_unoptimized(model, images), TOLERANCES["f32-reassoc"])
    assert report.passed, report
    attention = [tensor for tensor in graph.tensors().values() if "/canonical/" in tensor.name]
    assert max(len(tensor.shape or ()) for tensor in attention) == (5 if split else 4)
    again = rewrite(graph, 0)
    assert [skip.reason for skip in again.skipped] == ["already canonical"]


def test_perturbed_mask_fails_the_parity() -> None:
    stock = WindowBlock(Windows(shift=(1, 2)), POSITION_BIAS, window_mask(4)).model()
    graph = to_graph(stock)
    rewrite(graph, 1)
    model = to_model(graph)
    (bias,) = (item for item in model.graph.initializer if item.name.endswith("/bias"))
    values = numpy_helper.to_array(bias)
    assert values.shape == (4, 3, 6, 6)
    assert parity(stock, model, GRID_IMAGES).passed
    bias.CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=0), bias.name))
    assert not parity(stock, model, GRID_IMAGES).passed


@pytest.mark.parametrize("export", EXPORTS[:3], ids=str)
def test_second_run_changes_nothing(export: Export) -> None:
    graph = export.graph()
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
    graph = Export("vit", "torchscript", 2, 17).graph()
    assert any(len(tensor.shape or ()) == 5 for tensor in graph.tensors().values())
    rewrite(graph, DEPTH)
    assert all(len(tensor.shape or ()) <= 4 for tensor in graph.tensors().values())


def test_bias_and_mask_become_one_sum_even_where_all_else_is_canonical() -> None:
    g = GraphBuilder()
    rng = np.random.default_rng(5)
    bias, mask = (rng.normal(0, 1, (N, N)).astype(np.float32) for _ in range(2))
    scores = g.op("Add", g.op("Add", g.op("MatMul", g.queries(), g.keys()), bias), mask)
    stock = g.classify(g.project(g.merge_heads(g.op("MatMul", g.op("Softmax", scores, axis=-1), g.values()))))
    graph = to_graph(stock)
    assert rewrite(graph, 1).skipped == ()
    (softmax,) = [node for node in graph.nodes if node.op == "Softmax"]
    (add,) = softmax.inputs[0].inputs
    assert (add.op, add.inputs[0].inputs[0].op) == ("Add", "MatMul")
    report = parity(stock, to_model(graph), IMAGES)
    assert report.passed, report


def test_attention_that_is_refused_is_an_error_with_the_reason() -> None:
    g = GraphBuilder()
    scores = g.op("Relu", g.op("MatMul", g.queries(), g.keys()))
    masked = g.merge_heads(g.op("MatMul", g.op("Softmax", scores, axis=-1), g.values()))
    graph = to_graph(g.classify(g.project(masked)))
    with pytest.raises(UnsupportedGraph, match=r"canonical_attention failed.*expected 1 places; got 0.*come from Relu"):
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
