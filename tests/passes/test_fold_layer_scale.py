from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from attention_graphs import IMAGES, B, D, GraphBuilder, N, floats, ints, run_unoptimized, scalar
from rewriting import changed, initializers, left_alone, ops, rewritten, same
from timm_graphs import DEPTH, Export, images_of

from eamdeploy.passes.fold_layer_scale import FoldLayerScale

_RNG = np.random.default_rng(4)
WEIGHT = _RNG.normal(0, 1, (D, D)).astype(np.float32)
BIAS, GAMMA = (_RNG.normal(0, 1, D).astype(np.float32) for _ in range(2))

Draw = Callable[[GraphBuilder], str]


def model(draw: Draw, batch: int | str = B) -> onnx.ModelProto:
    g = GraphBuilder(batch)
    return g.classify(g.op("Add", g.x, draw(g)))


def product(g: GraphBuilder) -> str:
    return g.op("MatMul", g.x, WEIGHT)


def linear(g: GraphBuilder) -> str:
    return g.op("Add", product(g), BIAS)


def behind_a_bias(g: GraphBuilder) -> str:
    return g.op("Mul", linear(g), GAMMA)


def in_front_of_nothing_else(g: GraphBuilder) -> str:
    return g.op("Mul", GAMMA, g.op("Add", BIAS, product(g)))


def behind_a_product(g: GraphBuilder) -> str:
    return g.op("Mul", product(g), GAMMA)


@pytest.mark.parametrize("batch", [B, "batch"])
@pytest.mark.parametrize(
    "draw", [behind_a_bias, in_front_of_nothing_else, behind_a_product], ids=lambda draw: draw.__name__
)
def test_factors_become_part_of_the_linear_layer(draw: Draw, batch: int | str) -> None:
    stock = model(draw, batch)
    new, result = rewritten(stock, FoldLayerScale(), 1)
    assert (result.nodes_after - result.nodes_before, result.skipped) == (-1, ())
    assert ops(new)["Mul"] == 0 and same(run_unoptimized(stock, IMAGES), new, IMAGES)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_perturbed_constant_is_noticed(name: str) -> None:
    stock = model(behind_a_bias)
    new, _ = rewritten(stock, FoldLayerScale(), 1)
    (full,) = (each for each in initializers(new) if each.endswith(f"/fold_layer_scale/{name}"))
    assert not same(run_unoptimized(stock, IMAGES), changed(new, full, lambda values: values * 1.1), IMAGES)


def test_shared_weights_are_not_overwritten() -> None:
    def twice(g: GraphBuilder) -> str:
        weight, bias = g.constant(WEIGHT), g.constant(BIAS)
        layers = [g.op("Add", g.op("MatMul", g.x, weight), bias) for _ in range(2)]
        return g.op("Add", g.op("Mul", layers[0], GAMMA), g.op("Relu", layers[1]))

    stock = model(twice)
    new, _ = rewritten(stock, FoldLayerScale(), 1)
    assert same(run_unoptimized(stock, IMAGES), new, IMAGES)


def behind_a_relu(g: GraphBuilder) -> str:
    return g.op("Mul", g.op("Relu", linear(g)), GAMMA)


def behind_a_sum_of_tokens(g: GraphBuilder) -> str:
    return g.op("Mul", g.op("Add", product(g), g.x), GAMMA)


def behind_a_bias_of_tokens(g: GraphBuilder) -> str:
    return g.op("Mul", g.op("Add", product(g), np.ones((N, D), np.float32)), GAMMA)


def behind_a_product_of_variables(g: GraphBuilder) -> str:
    return g.op("Mul", g.op("MatMul", g.x, g.op("MatMul", g.op("Transpose", g.x, perm=[0, 2, 1]), g.x)), GAMMA)


def of_what_depends_on_no_channel(g: GraphBuilder) -> str:
    return g.op("Mul", g.op("MatMul", g.x, WEIGHT[:, :1]), GAMMA)


def linear_read_twice(g: GraphBuilder) -> str:
    layer = linear(g)
    return g.op("Add", layer, g.op("Mul", layer, GAMMA))


def product_read_twice(g: GraphBuilder) -> str:
    layer = product(g)
    return g.op("Add", layer, g.op("Mul", g.op("Add", layer, BIAS), GAMMA))


NEAR_MISSES: dict[Draw, str] = {
    behind_a_relu: "no linear layer stands in front of it",
    behind_a_sum_of_tokens: "no linear layer stands in front of it",
    behind_a_bias_of_tokens: "no linear layer stands in front of it",
    behind_a_product_of_variables: "no linear layer stands in front of it",
    of_what_depends_on_no_channel: "it has another number of channels than the linear layer",
    linear_read_twice: "something else reads the linear layer",
    product_read_twice: "something else reads the linear layer",
}


@pytest.mark.parametrize("draw", NEAR_MISSES, ids=lambda draw: draw.__name__)
def test_near_misses_are_left_alone_with_the_reason(draw: Draw) -> None:
    assert left_alone(model(draw), FoldLayerScale()) == [NEAR_MISSES[draw]]


@pytest.mark.parametrize("factors", [scalar(2), floats(2), np.ones((N, D), np.float32)], ids=["0-d", "1", "of tokens"])
def test_other_factors_are_not_learned_ones_of_channels(factors: Any) -> None:
    assert left_alone(model(lambda g: g.op("Mul", linear(g), factors)), FoldLayerScale()) == []


def test_factors_in_front_of_a_linear_layer_are_no_match() -> None:
    stock = model(lambda g: g.op("MatMul", g.op("Mul", g.op("Reshape", g.x, ints(B, N, D)), GAMMA), WEIGHT))
    assert left_alone(stock, FoldLayerScale()) == ["no linear layer stands in front of it"]


@pytest.mark.parametrize(
    "export",
    [
        *(Export("layer-scale", "torchscript", batch, 17) for batch in (None, 2)),
        Export("layer-scale", "dynamo", None, 18),
    ],
    ids=str,
)
def test_both_of_each_block_are_folded(export: Export) -> None:
    stock = export.model()
    new, result = rewritten(stock, FoldLayerScale(), 2 * DEPTH)
    assert result.nodes_after - result.nodes_before == -2 * DEPTH
    assert same(run_unoptimized(stock, images_of("layer-scale")), new, images_of("layer-scale"))


@pytest.mark.parametrize("variant", ["vit", "swin"])
def test_models_without_layer_scale_have_none(variant: str) -> None:
    assert left_alone(Export(variant, "torchscript", 2, 17).model(), FoldLayerScale()) == []
