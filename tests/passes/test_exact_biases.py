"""The passes that fold a constant of attention away: scale_into_query, drop_key_bias, fold_value_bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import timm_graphs
from attention_graphs import IMAGES, WEIGHTS, D, GraphBuilder, Spelling, forward, run_unoptimized
from onnx import numpy_helper
from timm_graphs import DEPTH, Export

from eamdeploy.graph.attention import Attention, find_attention
from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.parity.gate import TOLERANCES, compare
from eamdeploy.passes.base import PassResult, PlannedPass, run_passes
from eamdeploy.passes.canonical_attention import CanonicalAttention
from eamdeploy.passes.drop_key_bias import DropKeyBias
from eamdeploy.passes.fold_value_bias import FoldValueBias
from eamdeploy.passes.scale_into_query import ScaleIntoQuery

PASSES = (ScaleIntoQuery, DropKeyBias, FoldValueBias)
PLAIN = Export("vit", "torchscript", 2, 17)
NORMED = Export("qk-norm", "torchscript", 2, 17)
UNBIASED = Export("no-qkv-bias", "torchscript", 2, 17)


def rewrite(stock: onnx.ModelProto, rewrite_pass: Any, expected: int | None) -> tuple[onnx.ModelProto, PassResult]:
    graph = to_graph(stock)
    results = run_passes(graph, [PlannedPass(CanonicalAttention(), None), PlannedPass(rewrite_pass, expected)])
    return to_model(graph), results[1]


@pytest.mark.parametrize("make_pass", PASSES, ids=lambda p: p.name)
@pytest.mark.parametrize("export", [PLAIN, Export("vit", "dynamo", None, 18)], ids=str)
def test_it_removes_one_node_of_each_attention_and_computes_the_same(make_pass: Any, export: Export) -> None:
    stock = export.model()
    model, result = rewrite(stock, make_pass(), DEPTH)
    assert result.nodes_after - result.nodes_before == -DEPTH
    images = timm_graphs.IMAGES
    report = compare(run_unoptimized(stock, images), run_unoptimized(model, images), TOLERANCES["f32-reassoc"])
    assert report.passed, report


@pytest.mark.parametrize("make_pass", PASSES, ids=lambda p: p.name)
def test_second_run_changes_nothing(make_pass: Any) -> None:
    graph = to_graph(rewrite(PLAIN.model(), make_pass(), DEPTH)[0])
    before = to_model(graph).SerializeToString(deterministic=True)
    (result,) = run_passes(graph, [PlannedPass(make_pass(), 0)])
    assert len(result.skipped) == DEPTH
    assert to_model(graph).SerializeToString(deterministic=True) == before


def test_all_three_together_leave_queries_with_a_bias_and_nothing_else() -> None:
    graph = PLAIN.graph()
    run_passes(graph, [PlannedPass(p, DEPTH) for p in (CanonicalAttention(), *(make() for make in PASSES))])
    for attention in find_attention(graph):
        assert isinstance(attention, Attention)
        assert attention.scale == 1
        assert attention.query.bias is not None and attention.key.bias is None and attention.value.bias is None


@pytest.mark.parametrize("make_pass", [ScaleIntoQuery, DropKeyBias], ids=lambda p: p.name)
@pytest.mark.parametrize("layout", ["split", "gather", "separate"])
def test_hand_written_attention_computes_what_numpy_says(make_pass: Any, layout: Any) -> None:
    spelling = Spelling(layout)
    model, _ = rewrite(spelling.model(), make_pass(), 1)
    report = compare(forward([spelling.weights]), run_unoptimized(model, IMAGES), TOLERANCES["f32-reassoc"])
    assert report.passed, report


NEAR_MISSES = [
    (ScaleIntoQuery, NORMED, "queries are normalized before they are scaled"),
    (DropKeyBias, NORMED, "keys are normalized behind their bias"),
    (DropKeyBias, UNBIASED, "keys have no bias"),
    (FoldValueBias, UNBIASED, "values have no bias"),
]


@pytest.mark.parametrize(("make_pass", "export", "reason"), NEAR_MISSES, ids=lambda x: getattr(x, "name", str(x)))
def test_near_misses_are_left_alone_with_the_reason(make_pass: Any, export: Export, reason: str) -> None:
    _, result = rewrite(export.model(), make_pass(), 0)
    assert [skip.reason for skip in result.skipped] == [reason] * DEPTH


def test_unscaled_scores_are_left_alone() -> None:
    g = GraphBuilder()
    unscaled = g.split_heads(g.linear(g.x, WEIGHTS.query))
    stock = g.classify(g.project(g.mix(unscaled, g.keys(), g.values())))
    _, result = rewrite(stock, ScaleIntoQuery(), 0)
    assert [skip.reason for skip in result.skipped] == ["not scaled"]


@pytest.mark.parametrize("behind", ["nothing", "an image's own sum", "a bias per token"])
def test_value_bias_without_a_constant_bias_behind_the_projection_stays(behind: str) -> None:
    g = GraphBuilder()
    out = g.project(g.mix(g.queries(), g.keys(), g.values()))
    if behind == "an image's own sum":
        out = g.op("Add", out, g.x)
    elif behind == "a bias per token":
        out = g.op("Add", out, np.ones((6, D), np.float32))
    else:
        out = g.op("Relu", out)
    _, result = rewrite(g.classify(out), FoldValueBias(), 0)
    assert [skip.reason for skip in result.skipped] == ["no constant bias stands behind the output projection"]


def test_a_shared_projection_bias_is_not_overwritten() -> None:
    """Both blocks of the ViT could share one initializer: the pass gives each a bias of its own."""
    stock = PLAIN.model()
    shared = next(i.name for i in stock.graph.initializer if i.name.endswith("blocks.0.attn.proj.bias"))
    other = next(i.name for i in stock.graph.initializer if i.name.endswith("blocks.1.attn.proj.bias"))
    for node in stock.graph.node:
        node.input[:] = [shared if name == other else name for name in node.input]
    model, _ = rewrite(stock, FoldValueBias(), DEPTH)
    images = timm_graphs.IMAGES
    report = compare(run_unoptimized(stock, images), run_unoptimized(model, images), TOLERANCES["f32-reassoc"])
    assert report.passed, report


@pytest.mark.parametrize("name", ["q_weight", "q_bias", "k_weight", "v_weight"])
def test_perturbed_weight_is_noticed(name: str) -> None:
    stock = PLAIN.model()
    model, _ = rewrite(stock, ScaleIntoQuery(), DEPTH)
    tensor = next(item for item in model.graph.initializer if item.name.endswith(f"scale_into_query/{name}"))
    values = numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[0] += 0.1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    images = timm_graphs.IMAGES
    report = compare(run_unoptimized(stock, images), run_unoptimized(model, images), TOLERANCES["f32-reassoc"])
    assert not report.passed
