from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from attention_graphs import (
    EPSILON,
    GRID,
    GRID_IMAGES,
    GRID_POSITIONS,
    WEIGHTS,
    B,
    D,
    GraphBuilder,
    ints,
    run_unoptimized,
)
from numpy.typing import NDArray
from rewriting import assert_bit_exact, changed, initializers, left_alone, ops, rewritten, same
from timm_graphs import Export, images_of

from eamdeploy.passes.gather_tokens import GatherTokens
from eamdeploy.passes.merge_gathers import MergeGathers
from eamdeploy.passes.static_shapes import StaticShapes
from eamdeploy.passes.window_order import WindowOrder

DYNAMIC = "batch"
T = GRID[0] * GRID[1]
P, Q = (np.random.default_rng(seed).permutation(T) for seed in (1, 2))
BEFORE = (StaticShapes(), GatherTokens(), WindowOrder())


def moved(g: GraphBuilder, tokens: str, order: NDArray[np.integer]) -> str:
    return g.op("Gather", tokens, order.astype(np.int64), axis=1)


def linear(g: GraphBuilder, tokens: str) -> str:
    return g.op("MatMul", g.op("Relu", g.linear(tokens, WEIGHTS.query)), WEIGHTS.out)


def norm(g: GraphBuilder, tokens: str) -> str:
    return g.op("LayerNormalization", tokens, np.linspace(0.5, 2, D).astype(np.float32), epsilon=EPSILON)


def weighed(g: GraphBuilder, tokens: str) -> str:
    """So that the mean behind it tells one order from another."""
    return g.op("Mul", tokens, GRID_POSITIONS)


def drawn(draw: Callable[[GraphBuilder], str], batch: int | str = DYNAMIC) -> onnx.ModelProto:
    g = GraphBuilder(batch, grid=GRID)
    return g.classify(draw(g))


def gather_after_gather(g: GraphBuilder) -> str:
    return weighed(g, moved(g, norm(g, moved(g, g.x, P)), Q))


def residual_in_one_order(g: GraphBuilder) -> str:
    x = moved(g, g.x, P)
    return weighed(g, moved(g, g.op("Add", x, linear(g, norm(g, x))), Q))


def undone(g: GraphBuilder) -> str:
    return weighed(g, moved(g, linear(g, moved(g, g.x, P)), np.argsort(P)))


def several_gathers_behind(g: GraphBuilder) -> str:
    x = norm(g, moved(g, g.x, P))
    return weighed(g, g.op("Sub", moved(g, x, Q), moved(g, linear(g, x), np.argsort(P))))


def three_in_a_row(g: GraphBuilder) -> str:
    return weighed(g, moved(g, linear(g, moved(g, norm(g, moved(g, g.x, P)), Q)), P))


def undone_then_moved_again(g: GraphBuilder) -> str:
    return weighed(g, moved(g, linear(g, moved(g, norm(g, moved(g, g.x, P)), np.argsort(P))), Q))


def fewer_tokens(g: GraphBuilder) -> str:
    """As patch merging takes them."""
    kept = moved(g, norm(g, moved(g, g.x, P)), Q[:6])
    return g.op("Mul", kept, GRID_POSITIONS[:6])


def tokens_from_the_end(g: GraphBuilder) -> str:
    return weighed(g, moved(g, norm(g, moved(g, g.x, P)), Q - T))


def through_views(g: GraphBuilder) -> str:
    image = norm(g, g.op("Reshape", moved(g, g.x, P), ints(-1, *GRID, D)))
    return weighed(g, moved(g, g.op("Reshape", linear(g, image), ints(-1, T, D)), Q))


FIRES: dict[Callable[[GraphBuilder], str], tuple[int, list[NDArray[np.int64]]]] = {
    gather_after_gather: (1, [P[Q]]),
    residual_in_one_order: (1, [P[Q]]),
    undone: (1, []),
    several_gathers_behind: (1, [P[Q]]),
    three_in_a_row: (2, [P[Q][P]]),
    undone_then_moved_again: (2, [Q]),
    fewer_tokens: (1, [P[Q[:6]]]),
    tokens_from_the_end: (1, [P[Q]]),
    through_views: (1, [P[Q]]),
}
"""Places, and the gathers that are left."""


@pytest.mark.parametrize("batch", [B, DYNAMIC])
@pytest.mark.parametrize("draw", FIRES, ids=lambda draw: draw.__name__)
def test_gathers_meet_bit_for_bit(draw: Callable[[GraphBuilder], str], batch: int | str) -> None:
    expected, left = FIRES[draw]
    stock = drawn(draw, batch)
    model, result = rewritten(stock, MergeGathers(), expected)
    before = ops(stock)["Gather"]
    assert result.name == "merge_gathers"
    assert result.nodes_before - result.nodes_after == before - len(left)
    gathers = [node for node in model.graph.node if node.op_type == "Gather"]
    indices = [initializers(model)[node.input[1]] for node in gathers]
    assert len(indices) == len(left) and all(np.array_equal(a, b) for a, b in zip(indices, left, strict=True))
    assert_bit_exact(stock, model, GRID_IMAGES)


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax"])
def test_reduction_over_all_tokens_needs_no_order(op: str, opset: int) -> None:
    """A mean up to the order of its additions, a maximum bit for bit."""
    g = GraphBuilder(DYNAMIC, opset, GRID)
    image = g.op("Reshape", norm(g, moved(g, g.x, P)), ints(-1, *GRID, D))
    axes: dict[str, object] = {"axes": [1, 2]} if opset < 18 else {}
    pooled = g.op(op, image, *(() if axes else (ints(1, 2),)), keepdims=0, **axes)
    stock = g.classify(g.op("Reshape", pooled, ints(-1, 1, D)))
    model, result = rewritten(stock, MergeGathers(), 1)
    assert result.nodes_before - result.nodes_after == 1 and not ops(model)["Gather"]
    if op == "ReduceMax":
        assert_bit_exact(stock, model, GRID_IMAGES)
    assert same(run_unoptimized(stock, GRID_IMAGES), model, GRID_IMAGES)


@pytest.mark.parametrize(
    ("export", "expected", "gathers"),
    [
        (Export("swin", "torchscript", None, 17), 2, 3),
        (Export("swin-padded", "torchscript", 2, 17), 0, 9),
    ],
    ids=str,
)
def test_reverse_of_a_block_meets_the_partition_of_the_next(export: Export, expected: int, gathers: int) -> None:
    stock = export.model()
    model, result = rewritten(stock, MergeGathers(), expected, *BEFORE)
    constants = initializers(model)
    of_tokens = [n for n in model.graph.node if n.op_type == "Gather" and constants[n.input[1]].ndim == 1]
    assert len(of_tokens) == gathers
    assert {skip.reason for skip in result.skipped} <= {"the order of its tokens matters to MatMul"} | {
        "the order of its tokens matters to Reshape"
    }
    images = images_of(export.variant)
    assert same(run_unoptimized(stock, images), model, images)


def test_other_order_is_noticed() -> None:
    stock = drawn(residual_in_one_order)
    model, _ = rewritten(stock, MergeGathers(), 1)
    (name,) = (name for name in initializers(model) if "/after/" in name)
    wrong = changed(model, name, lambda a: np.roll(a, 1))
    reference = run_unoptimized(stock, GRID_IMAGES)
    assert same(reference, model, GRID_IMAGES) and not same(reference, wrong, GRID_IMAGES)


# --- near misses -----------------------------------------------------------------------------------------------------


def tokens_twice(g: GraphBuilder) -> str:
    first = moved(g, g.x, np.where(P == 0, 1, P))
    return weighed(g, moved(g, norm(g, first), Q[:6].repeat(4)))


def positions(g: GraphBuilder) -> str:
    return moved(g, weighed(g, moved(g, g.x, P)), Q[:6].repeat(4))


def tokens_mixed(g: GraphBuilder) -> str:
    matrix = np.random.default_rng(6).normal(0, 0.3, (T, T)).astype(np.float32)
    return g.op("MatMul", matrix, norm(g, moved(g, g.x, P)))


def residual_in_two_orders(g: GraphBuilder) -> str:
    summed = g.op("Add", g.x, linear(g, moved(g, g.x, P)))
    return weighed(g, moved(g, summed, Q[:6].repeat(4)))


def image_added(g: GraphBuilder) -> str:
    """The input of the graph, which nothing writes."""
    half = g.op("Slice", g.op("MatMul", g.x, np.ones((D, 6), np.float32)), ints(0), ints(12), ints(1))
    image = g.op("Reshape", moved(g, half, np.arange(12)[::-1]), ints(-1, 3, *GRID))
    tokens = g.op("Reshape", g.op("Add", image, "image"), ints(-1, 12, 6))
    return g.op("Relu", moved(g, g.op("MatMul", tokens, np.ones((6, D), np.float32)), np.arange(12)[1:]))


def mean_of_each_window(g: GraphBuilder) -> str:
    windows = g.op("Reshape", norm(g, moved(g, g.x, P)), ints(-1, 6, D))
    means = g.op("Reshape", g.op("ReduceMean", windows, axes=[1]), ints(-1, 4, D))
    return g.op("Mul", means, GRID_POSITIONS[:4])


def gather_inside_windows(g: GraphBuilder) -> str:
    windows = g.op("Reshape", norm(g, moved(g, g.x, P)), ints(-1, 6, D))
    turned = g.op("Gather", windows, ints(5, 4, 3, 2, 1, 0), axis=1)
    return weighed(g, g.op("Reshape", g.op("Relu", turned), ints(-1, T, D)))


def mean_of_rows(g: GraphBuilder) -> str:
    image = g.op("Reshape", moved(g, g.x, P), ints(-1, *GRID, D))
    rows = g.op("ReduceMean", image, axes=[1], keepdims=0)
    return g.op("Mul", rows, GRID_POSITIONS[: GRID[1]])


NEAR_MISSES: dict[Callable[[GraphBuilder], str], list[str]] = {
    tokens_twice: [],
    positions: ["the order of its tokens matters to Mul"],
    tokens_mixed: ["the order of its tokens matters to MatMul"],
    residual_in_two_orders: ["Add behind it reads tokens in another order too"],
    image_added: ["Add behind it reads tokens in another order too"],
    mean_of_each_window: ["the order of its tokens matters to ReduceMean"],
    gather_inside_windows: ["the order of its tokens matters to Gather", "the order of its tokens matters to Mul"],
    mean_of_rows: ["the order of its tokens matters to ReduceMean"],
}


@pytest.mark.parametrize("draw", NEAR_MISSES, ids=lambda draw: draw.__name__)
def test_near_miss_is_left_alone_with_the_reason(draw: Callable[[GraphBuilder], str]) -> None:
    assert left_alone(drawn(draw), MergeGathers()) == NEAR_MISSES[draw]
