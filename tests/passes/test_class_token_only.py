from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from attention_graphs import (
    EPSILON,
    IMAGES,
    POSITION_BIAS,
    WEIGHTS,
    B,
    D,
    Floats,
    GraphBuilder,
    H,
    N,
    floats,
    ints,
    run_unoptimized,
    scalar,
)
from numpy.typing import NDArray
from rewriting import changed, initializers, left_alone, ops, rewritten, same
from timm_graphs import (
    EXPORTS,
    Export,
    images_of,
    planned_modules,
    random_maps,
    sites_of,
    tokens_of,
    torch_logits,
)
from tiny_models import make_model

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.attention import Attention, find_attention
from eamdeploy.graph.frozen import IntegerMaps
from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.host.stock_export import export_stock
from eamdeploy.parity.gate import TOLERANCES, compare
from eamdeploy.passes.base import run_passes
from eamdeploy.passes.canonical_attention import CanonicalAttention
from eamdeploy.passes.class_token_only import ClassTokenOnly
from eamdeploy.passes.freeze_heads import check_accounted
from eamdeploy.passes.order import plan_passes
from eamdeploy.passes.static_shapes import StaticShapes

FC1, FC2 = (np.random.default_rng(5).normal(0, 0.5, shape).astype(np.float32) for shape in ((D, 7), (7, D)))
GAIN = np.linspace(0.5, 2, D).astype(np.float32)
LAST = np.iinfo(np.int64).max


def norm(g: GraphBuilder, x: str) -> str:
    if g.opset > 16:
        return g.op("LayerNormalization", x, GAIN, axis=-1, epsilon=EPSILON)
    centred = g.op("Sub", x, g.mean(x, -1))
    square = g.mean(g.op("Pow", centred, scalar(2)), -1)
    return g.op("Mul", g.op("Div", centred, g.op("Sqrt", g.op("Add", square, scalar(EPSILON)))), GAIN)


def block(g: GraphBuilder, bias: Floats | None = None) -> str:
    """The tokens [B,N,D] of a whole block behind the last norm; `g.x` becomes the norm of its input."""
    residual, g.x = g.x, norm(g, g.x)
    scores = g.op("MatMul", g.queries(), g.keys())
    scores = scores if bias is None else g.op("Add", scores, bias)
    context = g.merge_heads(g.op("MatMul", g.op("Softmax", scores, axis=-1), g.values()))
    x = g.op("Add", residual, g.op("MatMul", context, WEIGHTS.out))
    hidden = g.op("Add", g.op("MatMul", norm(g, x), FC1), floats(*range(7)))
    hidden = g.op("Mul", hidden, g.op("Sigmoid", hidden))
    return norm(g, g.op("Add", x, g.op("MatMul", hidden, FC2)))


def first(g: GraphBuilder, x: str) -> str:
    return g.op("Unsqueeze", g.op("Gather", x, np.array(0), axis=1), ints(1))


def last(g: GraphBuilder, x: str) -> str:
    return g.op("Unsqueeze", g.op("Gather", x, np.array(-1), axis=-2), ints(1))


def list_of_one(g: GraphBuilder, x: str) -> str:
    return g.op("Gather", x, ints(2), axis=1)


def out_of_order(g: GraphBuilder, x: str) -> str:
    return g.op("Mul", g.op("Gather", x, ints(4, 0, 4), axis=1), floats(1, 2, 3)[:, None])


def a_slice(g: GraphBuilder, x: str) -> str:
    return g.op("Slice", x, ints(1), ints(3), ints(1))


def slice_with_steps(g: GraphBuilder, x: str) -> str:
    return g.op("Mul", g.op("Slice", x, ints(-1), ints(-LAST), ints(-2), ints(-3)), floats(1, 2)[:, None])


def two_readers(g: GraphBuilder, x: str) -> str:
    """As a distilled DeiT: each of two heads reads its token."""
    heads = [g.op("Mul", g.op("Gather", x, np.array(i), axis=1), GAIN + i) for i in (1, 0)]
    return g.op("Unsqueeze", g.op("Add", *heads), ints(1))


CHOICES: dict[Callable[[GraphBuilder, str], str], tuple[int, ...]] = {
    first: (0,),
    last: (N - 1,),
    list_of_one: (2,),
    out_of_order: (0, 4),
    a_slice: (1, 2),
    slice_with_steps: (2, 5),
    two_readers: (0, 1),
}


def model(choose: Callable[[GraphBuilder, str], str], g: GraphBuilder | None = None) -> onnx.ModelProto:
    g = g or GraphBuilder()
    return g.classify(choose(g, block(g)))


def attention_of(model: onnx.ModelProto) -> Attention:
    (attention,) = find_attention(to_graph(model))
    assert isinstance(attention, Attention)
    return attention


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [B, "batch"])
@pytest.mark.parametrize("choose", CHOICES, ids=lambda choose: choose.__name__)
def test_only_the_chosen_tokens_have_queries(choose: Any, batch: int | str) -> None:
    stock = model(choose, GraphBuilder(batch))
    new, result = rewritten(stock, ClassTokenOnly(), 1, StaticShapes(), CanonicalAttention())
    assert result.skipped == ()
    attention = attention_of(new)
    assert (attention.query_tokens, attention.tokens) == (CHOICES[choose], N)
    assert same(run_unoptimized(stock, IMAGES), new, IMAGES)
    # two gathers more, and where the chosen tokens stand in order, no choice behind
    assert result.nodes_after - result.nodes_before == (1 if choose in (list_of_one, a_slice) else 2)


@pytest.mark.parametrize("choose", [first, out_of_order], ids=lambda choose: choose.__name__)
def test_everything_behind_attention_has_so_many_tokens(choose: Any) -> None:
    new, _ = rewritten(model(choose), ClassTokenOnly(), 1, CanonicalAttention())
    rows = len(CHOICES[choose])
    inferred = onnx.shape_inference.infer_shapes(new, strict_mode=True, data_prop=True)
    shapes = {item.name: [d.dim_value for d in item.type.tensor_type.shape.dim] for item in inferred.graph.value_info}
    nodes = {node.op_type: shapes[node.output[0]] for node in new.graph.node if node.op_type in ("Softmax", "Sigmoid")}
    assert nodes == {"Softmax": [B, H, rows, N], "Sigmoid": [B, rows, 7]}


@pytest.mark.parametrize("batch", [1, B, "batch"])
def test_decomposed_norms_are_token_by_token_too(batch: int | str) -> None:
    images = IMAGES[: 1 if batch == 1 else B]
    stock = model(first, GraphBuilder(batch, opset=16))
    new, _ = rewritten(stock, ClassTokenOnly(), 1, CanonicalAttention())
    assert "LayerNormalization" not in ops(stock) and same(run_unoptimized(stock, images), new, images)


def test_position_bias_keeps_the_rows_of_the_chosen_tokens() -> None:
    g = GraphBuilder()
    stock = g.classify(out_of_order(g, block(g, POSITION_BIAS)))
    new, _ = rewritten(stock, ClassTokenOnly(), 1, CanonicalAttention())
    bias = attention_of(new).bias
    assert bias is not None
    np.testing.assert_array_equal(bias.values[0], POSITION_BIAS[:, [0, 4]])
    assert same(run_unoptimized(stock, IMAGES), new, IMAGES)


def test_attention_that_is_not_canonical_yet_becomes_so() -> None:
    stock = model(first)
    new, _ = rewritten(stock, ClassTokenOnly(), 1)
    assert same(run_unoptimized(stock, IMAGES), new, IMAGES)


@pytest.mark.parametrize("name", ["q_tokens_indices", "joined.0_indices"])
def test_another_token_is_noticed(name: str) -> None:
    stock = model(first)
    new, _ = rewritten(stock, ClassTokenOnly(), 1, CanonicalAttention())
    (full,) = (constant for constant in initializers(new) if constant.endswith(name))
    wrong = changed(new, full, lambda indices: indices + 1)
    assert not same(run_unoptimized(stock, IMAGES), wrong, IMAGES)


def test_shared_choice_index_is_not_overwritten() -> None:
    """The same constant names a token here and a channel there."""
    g = GraphBuilder()
    index = g.constant(np.array(2))
    chosen = g.op("Gather", block(g), index, axis=1)
    stock = g.classify(
        g.op(
            "Unsqueeze", g.op("Add", chosen, g.op("Unsqueeze", g.op("Gather", chosen, index, axis=1), ints(1))), ints(1)
        )
    )
    new, _ = rewritten(stock, ClassTokenOnly(), 1, CanonicalAttention())
    assert same(run_unoptimized(stock, IMAGES), new, IMAGES)


# --- near misses -----------------------------------------------------------------------------------------------------


def mean(g: GraphBuilder, x: str) -> str:
    return x


def half_and_one(g: GraphBuilder, x: str) -> str:
    return g.op("Slice", x, ints(0), ints(4), ints(1))


def patches(g: GraphBuilder, x: str) -> str:
    """As average pooling leaves the class token out."""
    return g.op("Slice", x, ints(1), ints(LAST), ints(1))


def choice_of_channels(g: GraphBuilder, x: str) -> str:
    return g.op("Pad", g.op("Gather", x, ints(0, 1), axis=2), ints(0, 0, 0, 0, 0, D - 2))


def choice_of_images(g: GraphBuilder, x: str) -> str:
    return g.op("Gather", x, ints(0, 1), axis=0)


def slice_of_tokens_and_channels(g: GraphBuilder, x: str) -> str:
    return g.op("Pad", g.op("Slice", x, ints(0, 0), ints(1, 1), ints(1, 2)), ints(0, 0, 0, 0, 0, D - 1))


def computed_choice(g: GraphBuilder, x: str) -> str:
    best = g.op("ArgMax", g.op("ReduceSum", "image", ints(0, 1, 2), keepdims=0), axis=0, keepdims=1)
    return g.op("Gather", x, best, axis=1)


def another_branch(g: GraphBuilder, x: str) -> str:
    return g.op("Add", first(g, x), g.mean(x, 1))


def reshaped(g: GraphBuilder, x: str) -> str:
    return first(g, g.op("Reshape", x, ints(B, N, D)))


def constant_of_each_token(g: GraphBuilder, x: str) -> str:
    return first(g, g.op("Mul", x, floats(*range(N))[:, None]))


def another_count_of_tokens(g: GraphBuilder, x: str) -> str:
    """One token of the image, added to all."""
    return first(g, g.op("Add", x, g.op("Gather", g.x, ints(1), axis=1)))


NEAR_MISSES: dict[Callable[[GraphBuilder, str], str], str] = {
    mean: "all of its tokens matter to ReduceMean",
    half_and_one: "4 of 6 tokens are read",
    patches: "5 of 6 tokens are read",
    choice_of_channels: "all of its tokens matter to Gather",
    choice_of_images: "all of its tokens matter to Gather",
    slice_of_tokens_and_channels: "all of its tokens matter to Slice",
    computed_choice: "all of its tokens matter to Gather",
    another_branch: "all of its tokens matter to ReduceMean",
    reshaped: "all of its tokens matter to Reshape",
    constant_of_each_token: "all of its tokens matter to Mul",
    another_count_of_tokens: "Gather_45, which joins its tokens, has another shape",
}


@pytest.mark.parametrize("choose", NEAR_MISSES, ids=lambda choose: choose.__name__)
def test_near_misses_are_left_alone_with_the_reason(choose: Any) -> None:
    (reason,) = left_alone(model(choose), ClassTokenOnly(), CanonicalAttention())
    expected = NEAR_MISSES[choose]
    assert reason == expected or ("joins" in expected and reason.endswith(expected.partition(",")[2]))


def test_tokens_that_the_graph_gives_out_are_left_alone() -> None:
    g = GraphBuilder()
    stock = g.model({block(g): [B, N, D]})
    stock.graph.node[-1].output[0] = stock.graph.output[0].name = "logits"
    assert left_alone(stock, ClassTokenOnly()) == ["its tokens are an output of the graph"]


def test_only_the_last_of_two_blocks_is_rewritten() -> None:
    g = GraphBuilder()
    g.x = block(g)
    stock = g.classify(first(g, block(g)))
    new, result = rewritten(stock, ClassTokenOnly(), 1, CanonicalAttention())
    assert [skip.reason for skip in result.skipped] == ["all of its tokens matter to Reshape"]
    assert same(run_unoptimized(stock, IMAGES), new, IMAGES)


def test_what_is_no_attention_is_skipped_with_its_reason() -> None:
    g = GraphBuilder()
    stock = g.classify(first(g, g.op("Softmax", g.op("Relu", g.x), axis=-1)))
    assert left_alone(stock, ClassTokenOnly()) == ["its scores come from Relu, not from a product of queries and keys"]


# --- what torch exports ----------------------------------------------------------------------------------------------

Granularity = str
KINDS = ("head", "row", "entry")


def mask_of(granularity: Granularity, tokens: int, read: int) -> NDArray[np.bool_] | None:
    """Of three heads, [3,N] or [3,N,N]: what is read of them is frozen in part, not at all, and whole."""
    if granularity == "head":
        return None
    mask = np.random.default_rng(3).random((3, tokens) if granularity == "row" else (3, tokens, tokens)) < 0.5
    mask[0, :read], mask[0, 0], mask[1, :read], mask[2, :read] = False, True, False, True
    if granularity == "entry":
        mask[0, 0, : tokens // 2] = False
    return mask


def frozen_maps(variant: str, granularity: Granularity) -> dict[int, IntegerMaps]:
    read, tokens = sites_of(variant)[-1].read_tokens, tokens_of(variant)
    mask = mask_of(granularity, tokens, len(read or ()))
    heads = (0, 1, 2) if mask is not None else (0, 2)
    return {
        0: random_maps((1,), tokens, 1, mask=None if mask is None else mask[:1]),
        1: random_maps(heads, tokens, 2, mask=mask),
    }


@pytest.mark.parametrize("export", EXPORTS, ids=str)
def test_all_passes_on_an_export_compute_what_torch_does(export: Export) -> None:
    graph = export.graph()
    modules = planned_modules(export.variant)
    results = {result.name: result for result in run_passes(graph, plan_passes(modules))}
    read = sites_of(export.variant)[-1].read_tokens
    assert results["class_token_only"].rewritten == (read is not None)
    found = [item for item in find_attention(graph) if isinstance(item, Attention)]
    assert [item.query_tokens for item in found] == [None, read]
    n = export.batch or 2
    assert same(torch_logits(export.variant, {})[:n], to_model(graph), images_of(export.variant)[:n])


@pytest.mark.parametrize("granularity", KINDS)
@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("variant", ["vit", "distilled", "registers", "layer-scale", "qk-norm", "avg-pool"])
def test_frozen_parts_of_a_map_that_nothing_reads_leave_the_file(
    variant: str, batch: int | None, granularity: Granularity
) -> None:
    maps = frozen_maps(variant, granularity)
    modules = planned_modules(variant, maps)
    graph = Export(variant, "torchscript", batch, 17).graph()
    run_passes(graph, plan_passes(modules))
    model = to_model(graph)
    check_accounted(model, modules)
    assert same(torch_logits(variant, maps), model, images_of(variant))
    read = sites_of(variant)[-1].read_tokens
    if read is None:
        return
    constants = {name: value for name, value in initializers(model).items() if name.startswith("blocks.1.attn/")}
    one_row = granularity == "row" and len(read) == 1  # of each head, frozen or not
    whole = 2 if granularity == "head" or one_row else 1
    assert constants["blocks.1.attn/map_integers"].shape == (whole * len(read), tokens_of(variant))
    partial = {name.partition("/")[2] for name in constants if "partial" in name or "entries" in name}
    assert bool(partial) == (granularity != "head" and not one_row)


def test_every_granularity_is_another_function() -> None:
    """Else the parity above would prove nothing."""
    logits = [torch_logits("distilled", maps) for maps in ({}, *(frozen_maps("distilled", kind) for kind in KINDS))]
    for index, one in enumerate(logits):
        assert not any(compare(one, other, TOLERANCES["f32-reassoc"]).passed for other in logits[:index])


def test_module_whose_frozen_rows_nothing_reads_is_live() -> None:
    mask = np.ones((1, 17), np.bool_)
    mask[0, 0] = False
    maps = {1: random_maps((1,), 17, mask=mask)}
    modules = planned_modules("vit", maps)
    graph = Export("vit", "torchscript", 2, 17).graph()
    run_passes(graph, plan_passes(modules))
    model = to_model(graph)
    check_accounted(model, modules)
    assert "DequantizeLinear" not in ops(model)
    assert same(torch_logits("vit", maps), model, images_of("vit"))
    assert same(torch_logits("vit", {}), model, images_of("vit")), "the model is the unfrozen one"


def test_another_row_of_the_map_is_noticed() -> None:
    maps = frozen_maps("vit", "head")
    modules = planned_modules("vit", maps)
    graph = Export("vit", "torchscript", 2, 17).graph()
    run_passes(graph, plan_passes(modules))
    other = maps[1].integers[:, 0, 1]  # row 1 of both heads
    wrong = changed(to_model(graph), "blocks.1.attn/map_integers", lambda _: other)
    with pytest.raises(UnsupportedGraph, match=r"frozen heads of blocks\.1\.attn are not in"):
        check_accounted(wrong, modules)
    assert not same(torch_logits("vit", maps), wrong, images_of("vit"))


def test_average_of_the_patches_reads_too_many_tokens() -> None:
    torch_model = make_model(changes={"global_pool": "avg"})
    stock = export_stock(torch_model, (32, 32), batch=2, opset=17, exporter="torchscript").model
    reasons = left_alone(stock, ClassTokenOnly(), CanonicalAttention())
    assert reasons == ["all of its tokens matter to Reshape", "16 of 17 tokens are read"]


def test_windows_are_put_together_behind_attention() -> None:
    reasons = left_alone(Export("swin", "torchscript", 2, 17).model(), ClassTokenOnly(), CanonicalAttention())
    assert len(reasons) == 4 and all(reason.startswith("all of its tokens matter to ") for reason in reasons)
