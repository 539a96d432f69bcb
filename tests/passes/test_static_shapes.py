from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from attention_graphs import GRID, GRID_IMAGES, C, D, GraphBuilder, N, WindowBlock, Windows, ints
from rewriting import assert_bit_exact, changed, initializers, left_alone, ops, rewritten
from timm_graphs import Export, images_of

from eamdeploy.graph.model import to_graph
from eamdeploy.passes.static_shapes import StaticShapes

DYNAMIC = "batch"


def test_computed_shapes_become_constants_and_what_computed_them_is_gone() -> None:
    stock = WindowBlock().model(DYNAMIC)
    assert {"Shape", "Gather", "Unsqueeze", "Concat"} <= set(ops(stock))
    model, result = rewritten(stock, StaticShapes(), 2)
    assert (result.name, result.skipped) == ("static_shapes", ())
    assert result.nodes_before - result.nodes_after == 2 * 4
    assert ops(stock) - ops(model) == Counter(Shape=2, Gather=2, Unsqueeze=2, Concat=2)
    shapes = [array.tolist() for name, array in initializers(model).items() if name.endswith("/static_shape")]
    assert sorted(shapes) == [[-1, *GRID, D], [-1, GRID[0] * GRID[1], D]]
    assert_bit_exact(stock, model, GRID_IMAGES)


def test_export_without_shape_arithmetic_computes_the_same() -> None:
    stock = Export("swin", "torchscript", None, 17).model()
    computed = [n for n in to_graph(stock).nodes if n.op == "Reshape" and not hasattr(n.inputs[1], "values")]
    model, result = rewritten(stock, StaticShapes(), len(computed))
    assert len(computed) > 20 and result.skipped == ()
    assert ops(model)["Shape"] == 4, "what the slices of patch merging compute is left to gather_tokens"
    assert result.nodes_before - result.nodes_after > 90
    assert_bit_exact(stock, model, images_of("swin"))


def test_wrong_shape_is_noticed() -> None:
    stock = WindowBlock(Windows(shift=(1, 2))).model(DYNAMIC)
    model, _ = rewritten(stock, StaticShapes(), 2)
    name = next(name for name in initializers(model) if name.endswith("/static_shape"))
    turned = changed(model, name, lambda shape: shape[[0, 2, 1, 3]])
    with pytest.raises(AssertionError):
        assert_bit_exact(stock, turned, GRID_IMAGES)


def test_constant_shapes_are_no_places() -> None:
    assert left_alone(WindowBlock().model(), StaticShapes()) == []


def test_shape_with_two_sizes_that_depend_on_the_batch_is_left_alone() -> None:
    g = GraphBuilder(DYNAMIC)
    flat = g.op("Reshape", g.x, ints(-1, D))
    pairs = g.op("MatMul", flat, g.op("Transpose", flat, perm=[1, 0]))  # [B·N,B·N]
    shaped = g.op("Reshape", pairs, g.op("Shape", pairs))
    mean = g.op("Reshape", g.op("ReduceMean", shaped, axes=[0, 1]), ints(1, 1, 1))
    reasons = left_alone(g.classify(g.op("Add", g.x, mean)), StaticShapes())
    assert reasons == ["2 axes of its shape depend on the batch"]


def test_shape_that_nothing_tells_is_left_alone() -> None:
    g = GraphBuilder(DYNAMIC)
    reshaped = g.op("Reshape", g.x, g.sizes(C // 3, D * N // (C // 3)))
    graph = to_graph(g.model({g.op("Relu", reshaped): None}))
    graph.tensors()[reshaped].shape = None
    (skip,) = StaticShapes().match(graph)
    assert getattr(skip, "reason", "") == "its shape is not known"


def test_batch_stays_the_only_size_that_is_not_known() -> None:
    g = GraphBuilder(DYNAMIC)
    transposed = g.op("Transpose", g.op("Reshape", g.x, g.sizes(N, 2, D // 2)), perm=[2, 0, 1, 3])  # batch second
    shaped = g.op("Reshape", transposed, g.op("Shape", transposed))
    back = g.op("Reshape", g.op("Transpose", shaped, perm=[1, 2, 0, 3]), ints(-1, N, D))
    stock = g.classify(back)
    model, _ = rewritten(stock, StaticShapes(), 2)
    shapes = [a.tolist() for name, a in initializers(model).items() if name.endswith("/static_shape")]
    assert [2, -1, N, D // 2] in shapes
    rng = np.random.default_rng(5)
    assert_bit_exact(stock, model, rng.normal(size=(3, 3, 2, 3)).astype(np.float32))
