from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from attention_graphs import (
    GRID_IMAGES,
    IMAGES,
    POSITION_BIAS,
    B,
    Floats,
    GraphBuilder,
    H,
    N,
    WindowBlock,
    Windows,
    ints,
    run_unoptimized,
    scalar,
    window_mask,
)
from rewriting import changed, initializers, left_alone, ops, rewritten, same
from timm_graphs import Export, images_of

from eamdeploy.passes.zero_mask import ZeroMask

SHIFTED = Windows(shift=(1, 2))
CAUSAL = np.triu(np.full((N, N), -100, np.float32), 1)


def masked(mask: Floats, at: Callable[[GraphBuilder, str], str] | None = None) -> GraphBuilder:
    """A graph whose attention adds `mask` to its scores, or what `at` makes of them."""
    g = GraphBuilder()
    scores = g.op("MatMul", g.queries(), g.keys())
    scores = g.op("Add", scores, mask) if at is None else at(g, scores)
    g.x = g.project(g.merge_heads(g.op("MatMul", g.op("Softmax", scores, axis=-1), g.values())))
    return g


@pytest.mark.parametrize("bias", [None, POSITION_BIAS], ids=["mask alone", "with a position bias"])
@pytest.mark.parametrize("batch", [B, 1, "batch"])
def test_masked_scores_underflow_to_zero(batch: int | str, bias: Floats | None) -> None:
    stock = WindowBlock(SHIFTED, bias, window_mask(4)).model(batch)
    model, result = rewritten(stock, ZeroMask(), 1)
    assert (result.name, result.nodes_after - result.nodes_before) == ("zero_mask", 0)
    (mask,) = (array for name, array in initializers(model).items() if name.endswith("/mask"))
    np.testing.assert_array_equal(mask, np.where(window_mask(4) == 0, 0, -10000)[None, :, None])
    assert mask.dtype == np.float32
    images = GRID_IMAGES[: 1 if batch == 1 else B]
    assert same(run_unoptimized(stock, images), model, images)


@pytest.mark.parametrize("variant", ["swin", "swin-padded"])
def test_masks_of_exports_are_lowered(variant: str) -> None:
    stock = Export(variant, "torchscript", 2, 17).model()
    model, result = rewritten(stock, ZeroMask(), 1 if variant == "swin" else 2)
    assert result.skipped == () and ops(model) == ops(stock) - (ops(stock) - ops(model))
    images = images_of(variant)
    assert same(run_unoptimized(stock, images), model, images)


def test_mask_that_others_read_too_keeps_its_values() -> None:
    g = GraphBuilder()
    mask = g.constant(CAUSAL)
    scores = g.op("Add", g.op("MatMul", g.queries(), g.keys()), mask)
    mixed = g.project(g.merge_heads(g.op("MatMul", g.op("Softmax", scores, axis=-1), g.values())))
    pairs = g.op("Add", g.op("MatMul", g.x, g.op("Transpose", g.x, perm=[0, 2, 1])), mask)  # [B,N,N]
    stock = g.classify(g.op("Add", mixed, g.op("ReduceMean", pairs, axes=[1, 2])))
    model, result = rewritten(stock, ZeroMask(), 1)
    assert [skip.reason for skip in result.skipped] == ["not only a softmax reads the sum"]
    assert same(run_unoptimized(stock, IMAGES), model, IMAGES)
    assert sorted(array.min() for array in initializers(model).values() if array.shape == (N, N)) == [-10000, -100]


def test_other_mask_is_noticed() -> None:
    stock = WindowBlock(SHIFTED, None, window_mask(4)).model()
    model, _ = rewritten(stock, ZeroMask(), 1)
    (name,) = (name for name in initializers(model) if name.endswith("/mask"))
    reference = run_unoptimized(stock, GRID_IMAGES)
    wrong = changed(model, name, lambda mask: np.roll(mask, 1, axis=1))
    assert same(reference, model, GRID_IMAGES) and not same(reference, wrong, GRID_IMAGES)


# --- near misses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "constant",
    [
        POSITION_BIAS,
        np.where(CAUSAL == 0, 0, 100).astype(np.float32),
        np.where(CAUSAL == 0, 0, -63).astype(np.float32),
        np.where(CAUSAL == 0, 1, -100).astype(np.float32),
        np.zeros((N, N), np.float32),
        np.full((N, N), -100, np.float32),
        np.where(np.arange(N)[:, None] == 2, -100, CAUSAL).astype(np.float32),
        scalar(-100),
        np.full((H, N, 1), -100, np.float32),
    ],
    ids=["bias", "raised", "63", "no zero", "zero", "lowered", "a row lowered whole", "scalar", "broadcast"],
)
def test_other_constants_are_no_masks(constant: Floats) -> None:
    g = masked(constant)
    assert left_alone(g.classify(g.x), ZeroMask()) == []


def read_twice(g: GraphBuilder, scores: str) -> str:
    summed = g.op("Add", scores, CAUSAL)
    return g.op("Add", summed, g.op("Relu", summed))


def scaled_behind(g: GraphBuilder, scores: str) -> str:
    return g.op("Mul", g.op("Add", scores, CAUSAL), scalar(0.001))


@pytest.mark.parametrize("at", [read_twice, scaled_behind], ids=lambda at: at.__name__)
def test_mask_behind_which_no_softmax_alone_stands_is_left_alone(at: Callable[[GraphBuilder, str], str]) -> None:
    g = masked(CAUSAL, at)
    assert left_alone(g.classify(g.x), ZeroMask()) == ["not only a softmax reads the sum"]


def test_low_constant_that_is_added_elsewhere_is_left_alone() -> None:
    g = GraphBuilder()
    low = np.zeros((N, 10), np.float32)
    low[:, 3] = -100
    stock = g.classify(g.op("Relu", g.op("Add", g.x, low)))
    assert left_alone(stock, ZeroMask()) == ["not only a softmax reads the sum"]


@pytest.mark.parametrize("low", [-10000, -np.inf])
def test_mask_that_is_low_enough_stays(low: float) -> None:
    g = masked(np.where(CAUSAL == 0, 0, low).astype(np.float32))
    assert left_alone(g.classify(g.x), ZeroMask()) == ["already low enough"]


def test_mask_through_reshapes_and_further_sums_is_found() -> None:
    def in_images(g: GraphBuilder, scores: str) -> str:
        split = g.op("Add", g.op("Reshape", scores, ints(1, B, H, N, N)), CAUSAL)
        return g.op("Add", g.op("Reshape", split, ints(B, H, N, N)), POSITION_BIAS)

    g = masked(CAUSAL, in_images)
    stock = g.classify(g.x)
    model, _ = rewritten(stock, ZeroMask(), 1)
    assert same(run_unoptimized(stock, IMAGES), model, IMAGES)
