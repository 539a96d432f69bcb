from __future__ import annotations

import numpy as np
import onnx
import pytest
from attention_graphs import IMAGES, GraphBuilder, H, N, ints, run_unoptimized
from rewriting import initializers, left_alone, ops, rewritten

from eamdeploy.graph.model import to_graph
from eamdeploy.passes.integer_map_products import IntegerMapProducts, frozen_values

RNG = np.random.default_rng(0)
SQUARES = (RNG.integers(1, 12, (H * N, N)) ** 2).astype(np.uint8)  # up to 121: as they are
WIDE = (RNG.integers(1, 16, (H * N, N)) ** 2).astype(np.uint8)  # up to 225: quantized anew


def model(integers: np.ndarray = SQUARES, *, side: int = 0, twice: bool = False) -> onnx.ModelProto:
    """Maps times values, as `graph.emit` writes wholly frozen heads."""
    g = GraphBuilder()
    scales = (1 / integers.sum(axis=1)).astype(np.float32)
    rows = g.op("DequantizeLinear", integers, scales, np.zeros(len(integers), integers.dtype), axis=0)
    maps = g.op("Reshape", rows, ints(1, H, N, N))
    values = g.values()
    context = g.op("MatMul", maps, values) if side == 0 else g.op("MatMul", g.op("MatMul", g.map(), maps), values)
    if twice:
        context = g.op("Add", context, g.op("MatMul", maps, g.op("Neg", values)))
        context = g.op("Add", context, g.op("MatMul", maps, values))
    return g.classify(g.project(g.merge_heads(context)))


def ranges(stock: onnx.ModelProto, limit: float = 16.0) -> dict[str, tuple[float, float]]:
    return dict.fromkeys(frozen_values(to_graph(stock)), (-limit, limit))


@pytest.mark.parametrize("integers", [SQUARES, WIDE], ids=["fit", "wide"])
def test_the_product_is_one_of_integers_and_scaled_behind(integers: np.ndarray) -> None:
    stock = model(integers)
    changed, _ = rewritten(stock, IntegerMapProducts(ranges(stock)), 1)
    before, after = ops(stock), ops(changed)
    assert (after["QuantizeLinear"], after["DequantizeLinear"]) == (1, 2) and after["MatMul"] == before["MatMul"]
    stored = [item for item in initializers(changed).values() if item.dtype == np.uint8 and item.ndim == 4]
    assert [item.shape for item in stored] == [(1, H, N, N)] and stored[0].max() <= 127
    if integers is SQUARES:
        np.testing.assert_array_equal(stored[0].reshape(integers.shape), integers)
    reference, got = run_unoptimized(stock, IMAGES), run_unoptimized(changed, IMAGES)
    assert 0 < np.abs(got - reference).max() < 0.05 * np.ptp(reference)


def test_the_scaled_result_has_the_products_name() -> None:
    """By which its range is known: of the pooled tokens of a single head, which a linear layer reads."""
    stock = model()
    (values,) = frozen_values(to_graph(stock))
    (context,) = [node.output[0] for node in stock.graph.node if values in node.input]
    changed, _ = rewritten(stock, IntegerMapProducts(ranges(stock)), 1)
    (scaled,) = [node for node in changed.graph.node if node.op_type == "Mul" and node.output[0] == context]
    (product,) = [node for node in changed.graph.node if node.output[0] == scaled.input[0]]
    assert product.op_type == "MatMul"


def test_a_finer_range_of_the_values_is_nearer() -> None:
    stock = model()
    reference = run_unoptimized(stock, IMAGES)
    errors = []
    for limit in (16.0, 64.0, 256.0):
        changed, _ = rewritten(stock, IntegerMapProducts(ranges(stock, limit)), 1)
        errors.append(float(np.abs(run_unoptimized(changed, IMAGES) - reference).max()))
    assert errors[0] < errors[1] < errors[2]


def test_what_it_refuses() -> None:
    (reason,) = left_alone(model(), IntegerMapProducts({}))
    assert reason.startswith("no range is known of ")
    for other in (model(side=1), model(twice=True)):
        assert left_alone(other, IntegerMapProducts(ranges(other))) == [
            "no product reads it alone, as its left operand"
        ]
    assert frozen_values(to_graph(model(side=1))) == []
