from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from attention_graphs import IMAGES, D, GraphBuilder, N, run_unoptimized
from rewriting import changed, left_alone, ops, rewritten, same

from eamdeploy.passes.decompose_layer_norm import DecomposeLayerNorm

_RNG = np.random.default_rng(5)
GAIN, SHIFT = _RNG.normal(1, 0.5, D).astype(np.float32), _RNG.normal(0, 0.5, D).astype(np.float32)


def normalized(g: GraphBuilder) -> str:
    return g.op("LayerNormalization", g.x, GAIN, SHIFT, epsilon=1e-3)


def without_a_bias(g: GraphBuilder) -> str:
    return g.op("LayerNormalization", g.x, GAIN)


def by_a_positive_axis(g: GraphBuilder) -> str:
    return g.op("LayerNormalization", g.x, GAIN, SHIFT, axis=2)


def over_two_axes(g: GraphBuilder) -> str:
    return g.op("LayerNormalization", g.x, np.ones((N, D), np.float32), axis=1)


def with_its_mean(g: GraphBuilder) -> str:
    result, mean = g.ops("LayerNormalization", 2, g.x, GAIN)
    return g.op("Add", result, mean)


def drawn(draw: Callable[[GraphBuilder], str], opset: int = 17) -> onnx.ModelProto:
    g = GraphBuilder("batch", opset)
    return g.classify(draw(g))


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("draw", [normalized, without_a_bias, by_a_positive_axis], ids=lambda draw: draw.__name__)
def test_the_norm_is_spelled_out(draw: Callable[[GraphBuilder], str], opset: int) -> None:
    stock = drawn(draw, opset)
    expected = run_unoptimized(stock, IMAGES)
    model, result = rewritten(stock, DecomposeLayerNorm(), 1)
    assert (result.name, result.skipped) == ("decompose_layer_norm", ())
    biased = draw is not without_a_bias
    assert ops(model)["LayerNormalization"] == 0
    assert result.nodes_after - result.nodes_before == 7 + biased
    assert same(expected, model, IMAGES)
    epsilon = next(item.name for item in model.graph.initializer if item.name.endswith("/epsilon"))
    assert not same(expected, changed(model, epsilon, lambda value: value + np.float32(0.1)), IMAGES)


@pytest.mark.parametrize(
    ("draw", "reason"),
    [(over_two_axes, "more than the last axis"), (with_its_mean, "mean or deviation is read")],
)
def test_a_near_miss_is_left_alone_with_the_reason(draw: Callable[[GraphBuilder], str], reason: str) -> None:
    (given,) = left_alone(drawn(draw), DecomposeLayerNorm())
    assert reason in given
