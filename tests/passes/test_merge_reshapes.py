from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from attention_graphs import GRID, GRID_IMAGES, GRID_POSITIONS, B, D, GraphBuilder, ints
from rewriting import assert_bit_exact, changed, initializers, left_alone, ops, rewritten
from timm_graphs import Export, images_of

from eamdeploy.passes.gather_tokens import GatherTokens
from eamdeploy.passes.merge_reshapes import MergeReshapes
from eamdeploy.passes.static_shapes import StaticShapes
from eamdeploy.passes.window_order import WindowOrder

DYNAMIC = "batch"
T = GRID[0] * GRID[1]


def reshaped(g: GraphBuilder, tensor: str, *shapes: tuple[int, ...]) -> str:
    for shape in shapes:
        tensor = g.op("Reshape", tensor, ints(*shape))
    return tensor


def drawn(draw: Callable[[GraphBuilder], str], batch: int | str = DYNAMIC) -> onnx.ModelProto:
    """What is drawn, an elementwise function of the tokens in any shape, as tokens that are told apart."""
    g = GraphBuilder(batch, grid=GRID)
    tokens = g.op("Relu", draw(g))
    flat = g.op("Gather", tokens, ints(*range(T)), axis=1)
    return g.classify(g.op("Mul", flat, GRID_POSITIONS))


def two(g: GraphBuilder) -> str:
    return reshaped(g, g.op("Relu", g.x), (-1, *GRID, D), (-1, T, D))


def three(g: GraphBuilder) -> str:
    return reshaped(g, g.op("Relu", g.x), (-1, 6, D), (-1, *GRID, D), (-1, T, D))


def three_that_change_something(g: GraphBuilder) -> str:
    wide = reshaped(g, g.op("Relu", g.x), (-1, 6, D), (-1, *GRID, D), (-1, T * D))
    return reshaped(g, g.op("Relu", wide), (-1, T, D))


def nothing_to_do(g: GraphBuilder) -> str:
    return reshaped(g, g.op("Relu", g.x), (-1, T, D))


def read_halfway(g: GraphBuilder) -> str:
    first = reshaped(g, g.op("Relu", g.x), (-1, T // 2, 2 * D))
    other = reshaped(g, g.op("Sigmoid", first), (-1, T, D))
    return g.op("Add", reshaped(g, first, (-1, T, D)), other)


def behind_a_zero(g: GraphBuilder) -> str:
    """The zero is in the reshape that goes."""
    return reshaped(g, g.op("Relu", g.x), (0, 2, -1, D), (-1, T, D))


FIRES: dict[Callable[[GraphBuilder], str], tuple[int, int]] = {
    two: (1, 2),
    three: (2, 3),
    three_that_change_something: (2, 2),
    nothing_to_do: (1, 1),
    read_halfway: (1, 1),
    behind_a_zero: (1, 2),
}
"""Places, and how many nodes go."""


@pytest.mark.parametrize("batch", [B, DYNAMIC])
@pytest.mark.parametrize("draw", FIRES, ids=lambda draw: draw.__name__)
def test_chains_of_reshapes_are_shortened_bit_for_bit(draw: Callable[[GraphBuilder], str], batch: int | str) -> None:
    expected, gone = FIRES[draw]
    stock = drawn(draw, batch)
    model, result = rewritten(stock, MergeReshapes(), expected)
    assert (result.name, result.nodes_before - result.nodes_after) == ("merge_reshapes", gone)
    assert ops(stock)["Reshape"] - ops(model)["Reshape"] == gone
    assert_bit_exact(stock, model, GRID_IMAGES)


def test_fixed_batch_is_the_shape_that_is_there() -> None:
    stock = drawn(lambda g: reshaped(g, g.op("Relu", g.x), (B, T, D)), B)
    model, _ = rewritten(stock, MergeReshapes(), 1)
    assert_bit_exact(stock, model, GRID_IMAGES)


def test_export_computes_the_same_bit_for_bit() -> None:
    stock = Export("swin", "torchscript", None, 17).model()
    before = (StaticShapes(), GatherTokens(), WindowOrder())
    model, result = rewritten(stock, MergeReshapes(), 7, *before)
    assert result.nodes_before - result.nodes_after == 10
    assert_bit_exact(stock, model, images_of("swin"))


def test_other_shape_is_noticed() -> None:
    stock = drawn(three_that_change_something)
    model, _ = rewritten(stock, MergeReshapes(), 2)
    names = {node.input[1] for node in model.graph.node if node.op_type == "Reshape"}
    name = next(n for n in names if initializers(model)[n].tolist() == [-1, T, D])
    wrong = changed(model, name, lambda shape: shape * [1, 2, 1] // [1, 1, 2])
    with pytest.raises(Exception):  # noqa: B017 (the graph behind it has no such tokens)
        assert_bit_exact(stock, wrong, GRID_IMAGES)


def size_taken_over(g: GraphBuilder) -> str:
    """The 0 stands for 12, of the tensor in between; of the one before it would be 24."""
    wide = reshaped(g, g.op("Relu", g.x), (-1, T // 2, 2 * D), (0, 0, 2 * D))
    return reshaped(g, g.op("Relu", wide), (-1, T, D))


def computed(g: GraphBuilder) -> str:
    first = reshaped(g, g.op("Relu", g.x), (-1, T // 2, 2 * D))
    return g.op("Reshape", first, g.op("Shape", g.x))


def one(g: GraphBuilder) -> str:
    return reshaped(g, g.op("Relu", reshaped(g, g.op("Relu", g.x), (-1, T * D))), (-1, T, D))


@pytest.mark.parametrize("draw", [size_taken_over, computed, one], ids=lambda draw: draw.__name__)
def test_near_miss_is_left_alone(draw: Callable[[GraphBuilder], str]) -> None:
    assert left_alone(drawn(draw), MergeReshapes()) == []


def test_reshape_to_another_batch_is_none_too_many() -> None:
    """[B,T,D] with a dynamic batch is not [2,T,D]."""
    g = GraphBuilder(DYNAMIC, grid=GRID)
    stock = g.model({g.op("Relu", reshaped(g, g.op("Relu", g.x), (2, T, D))): None})
    assert len(stock.graph.node) == 7
    stock.graph.output[0].name = stock.graph.node[-1].output[0] = "logits"
    assert left_alone(stock, MergeReshapes()) == []
    assert np.prod(GRID) == T
