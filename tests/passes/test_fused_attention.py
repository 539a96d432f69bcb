from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import pytest
from attention_graphs import (
    HEAD_DIM,
    IMAGES,
    WEIGHTS,
    B,
    Floats,
    GraphBuilder,
    H,
    Linear,
    N,
    ints,
    run_unoptimized,
    scalar,
)
from rewriting import left_alone, ops, rewritten, same
from timm_graphs import (
    EXPORTS,
    SWIN_EXPORTS,
    Export,
    images_of,
    planned_modules,
    random_maps,
    sites_of,
    tokens_of,
    torch_logits,
)

from eamdeploy.graph.frozen import IntegerMaps
from eamdeploy.graph.model import to_model
from eamdeploy.parity.gate import TOLERANCES, compare
from eamdeploy.passes.base import run_passes
from eamdeploy.passes.fused_attention import DOMAIN, OPERATOR, FusedAttention
from eamdeploy.passes.order import plan_passes

BIAS = np.random.default_rng(2).normal(0, 1, (1, H, N, N)).astype(np.float32)


def by_heads(g: GraphBuilder, linear: Linear, perm: Sequence[int] = (0, 2, 1, 3)) -> str:
    """As `graph.emit` writes them: batch and tokens are taken over."""
    return g.op("Transpose", g.op("Reshape", g.linear(g.x, linear), ints(0, 0, H, HEAD_DIM)), perm=list(perm))


def scores(g: GraphBuilder) -> str:
    """Of queries that hold the scale."""
    return g.op("MatMul", by_heads(g, WEIGHTS.query), by_heads(g, WEIGHTS.key, (0, 2, 3, 1)))


def attention(g: GraphBuilder, scores: str, bias: Floats | str | None = None) -> onnx.ModelProto:
    """In canonical form, by hand."""
    scores = scores if bias is None else g.op("Add", scores, bias)
    return mixed(g, g.op("Softmax", scores, axis=-1))


def mixed(g: GraphBuilder, maps: str) -> onnx.ModelProto:
    return g.classify(g.project(g.merge_heads(g.op("MatMul", maps, by_heads(g, WEIGHTS.value)))))


def exported(export: Export, frozen: dict[int, IntegerMaps]) -> onnx.ModelProto:
    """The export after all other passes."""
    graph = export.graph()
    run_passes(graph, plan_passes(planned_modules(export.variant, frozen)))
    return to_model(graph)


@pytest.mark.parametrize("bias", [None, BIAS, BIAS[:, :1]], ids=["no bias", "bias of heads", "one bias"])
@pytest.mark.parametrize("batch", [B, "b"])
def test_attention_is_one_operator_that_computes_the_same(bias: Floats | None, batch: int | str) -> None:
    g = GraphBuilder(batch=batch)
    stock = attention(g, scores(g), bias)
    model, _ = rewritten(stock, FusedAttention(), 1)
    before, after = ops(stock), ops(model)
    assert (after[OPERATOR], after["Softmax"], before["Transpose"] - after["Transpose"]) == (1, 0, 4)
    assert [opset.domain for opset in model.opset_import if opset.domain] == [DOMAIN]
    assert same(run_unoptimized(stock, IMAGES), model, IMAGES)


@pytest.mark.parametrize("export", [e for e in EXPORTS if "norm" not in e.variant and "rms" not in e.variant], ids=str)
def test_every_export_of_a_vit_with_some_heads_frozen(export: Export) -> None:
    """Live beside frozen heads in the first module, all live in the second (the last, for some of the tokens)."""
    frozen = {0: random_maps((1,), tokens_of(export.variant))}
    before = exported(export, frozen)
    model, result = rewritten(before, FusedAttention(), ops(before)["Softmax"])
    assert result.rewritten >= 2 and ops(model)["Softmax"] == 0 and ops(model)["Concat"] == ops(before)["Concat"]
    n = export.batch or 2
    logits = run_unoptimized(model, images_of(export.variant, n))
    assert compare(torch_logits(export.variant, frozen, n), logits, TOLERANCES["f32-reassoc"]).passed


@pytest.mark.parametrize("export", SWIN_EXPORTS, ids=str)
def test_every_export_of_a_swin(export: Export) -> None:
    """Shifted windows have biases of their own, which the operator takes only where the batch is fixed to 1."""
    before = exported(export, {})
    model, result = rewritten(before, FusedAttention(), count := fusable(export))
    assert ops(model)[OPERATOR] == count and count + len(result.skipped) == len(sites_of(export.variant))
    n = export.batch or 2
    logits = run_unoptimized(model, images_of(export.variant, n))
    assert compare(torch_logits(export.variant, {}, n), logits, TOLERANCES["f32-reassoc"]).passed


def fusable(export: Export) -> int:
    """Modules whose windows share their bias, or all where the model takes one image at a time."""
    sites = sites_of(export.variant)
    return len(sites) if export.batch == 1 else sum(len(set(site.classes or ())) <= 1 for site in sites)


def test_normalized_heads_are_left_alone() -> None:
    before = exported(Export("qk-norm", "torchscript", None, 17), {})
    reasons = left_alone(before, FusedAttention())
    assert len(reasons) == len(sites_of("qk-norm")) and set(reasons) <= {
        "its heads are normalized or moved in another way"
    }


def scaled(g: GraphBuilder) -> onnx.ModelProto:
    return attention(g, g.op("Mul", scores(g), scalar(2)))


def bias_of_the_image(g: GraphBuilder) -> onnx.ModelProto:
    return attention(g, scores(g), g.op("Exp", scores(g)))


def map_read_twice(g: GraphBuilder) -> onnx.ModelProto:
    maps = g.op("Softmax", scores(g), axis=-1)
    return mixed(g, g.op("MatMul", maps, maps))


def other_bias_for_each_image(g: GraphBuilder) -> onnx.ModelProto:
    return attention(g, scores(g), np.concatenate([BIAS, 2 * BIAS]))


def three_dimensions(g: GraphBuilder) -> onnx.ModelProto:
    return attention(g, scores(g), BIAS[0])


def batch_written_out(g: GraphBuilder) -> onnx.ModelProto:
    return attention(g, g.op("MatMul", g.split_heads(g.linear(g.x, WEIGHTS.query)), g.keys()))


@pytest.mark.parametrize(
    ("spelled", "reason"),
    [
        (scaled, "its scores are no product of queries and keys"),
        (bias_of_the_image, "what is added to its scores is computed from the image"),
        (map_read_twice, " has 2 consumers, not one"),
        (other_bias_for_each_image, "its bias differs between images"),
        (three_dimensions, "its bias is no constant of four dimensions"),
        (batch_written_out, "its heads are not split from the channels alone"),
    ],
)
def test_what_it_refuses(spelled: Callable[[GraphBuilder], onnx.ModelProto], reason: str) -> None:
    (found,) = left_alone(spelled(GraphBuilder()), FusedAttention())
    assert found.endswith(reason)
