from __future__ import annotations

import re
from collections.abc import Callable
from typing import get_args

import numpy as np
import onnx
import pytest
from attention_graphs import (
    EPSILON,
    HEAD_DIM,
    POSITION_BIAS,
    SCALE,
    WEIGHTS,
    B,
    C,
    D,
    Floats,
    GraphBuilder,
    H,
    Layout,
    Linear,
    N,
    Norm,
    Scale,
    Spelling,
    WindowBlock,
    Windows,
    floats,
    ints,
    make_weights,
    scalar,
    window_mask,
)

from eamdeploy.graph.attention import Attention, Projection, distinct, find_attention
from eamdeploy.graph.model import to_graph
from eamdeploy.graph.skip import Skip

DYNAMIC = "batch"


def find(model: onnx.ModelProto) -> list[Attention | Skip]:
    return find_attention(to_graph(model))


def only_attention(model: onnx.ModelProto) -> Attention:
    (found,) = find(model)
    assert isinstance(found, Attention), found
    return found


def only_skip(model: onnx.ModelProto) -> Skip:
    (found,) = find(model)
    assert isinstance(found, Skip), "taken for attention"
    return found


def assert_projection(found: Projection, drawn: Linear) -> None:
    np.testing.assert_array_equal(found.weight, drawn.weight)
    bias = found.bias  # zeros when a joint linear layer has a bias for others only
    np.testing.assert_array_equal(
        np.zeros((H, HEAD_DIM)) if bias is None else bias, 0 if drawn.bias is None else drawn.bias
    )


def assert_found(spelling: Spelling) -> None:
    found = only_attention(spelling.model())
    for got, drawn in zip(
        (found.query, found.key, found.value),
        (spelling.weights.query, spelling.weights.key, spelling.weights.value),
        strict=True,
    ):
        assert_projection(got, drawn)
    assert (found.heads, found.tokens, found.head_dim) == (H, N, HEAD_DIM)
    assert found.scale == pytest.approx(SCALE, rel=1e-6)
    np.testing.assert_array_equal(found.projection.inputs[1].values, spelling.weights.out)
    assert found.projection.inputs[0] is found.merged
    assert (found.query_norm is None) == (found.key_norm is None) == (spelling.norm is None)


# --- the same attention, spelled in many ways ------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [B, 1, DYNAMIC])
@pytest.mark.parametrize("layout", get_args(Layout))
def test_every_layout_is_the_same_attention(layout: Layout, batch: int | str) -> None:
    assert_found(Spelling(layout, batch=batch))


@pytest.mark.parametrize("scale", get_args(Scale))
def test_scale_is_found_wherever_it_stands(scale: Scale) -> None:
    assert_found(Spelling("separate" if scale == "linear" else "split", scale))


@pytest.mark.parametrize("layout", ["split", "separate"])
@pytest.mark.parametrize("biased", [(False, False, False), (True, False, True), (False, True, False)])
def test_biases_are_optional(layout: Layout, biased: tuple[bool, bool, bool]) -> None:
    assert_found(Spelling(layout, biased=biased))


def test_absent_bias_is_none_not_zeros() -> None:
    found = only_attention(Spelling("separate", biased=(True, False, False)).model())
    assert found.query.bias is not None and found.key.bias is None and found.value.bias is None


@pytest.mark.parametrize("batch", [B, DYNAMIC])
@pytest.mark.parametrize("norm", get_args(Norm))
def test_norm_of_queries_and_keys_is_kept_as_it_is_written(norm: Norm, batch: int | str) -> None:
    assert_found(Spelling(norm=norm, batch=batch))
    found = only_attention(Spelling(norm=norm, batch=batch).model())
    for kept, gain in zip((found.query_norm, found.key_norm), Spelling().weights.gains, strict=True):
        assert kept is not None
        arrays = [t.values for node in kept.nodes for t in node.inputs if hasattr(t, "values")]
        assert any(np.array_equal(array, gain) for array in arrays)
        assert kept.nodes[-1].outputs[0] is kept.result
        assert any(tensor is kept.source for tensor in kept.nodes[0].inputs)


@pytest.mark.parametrize("norm", get_args(Norm))
def test_norm_straight_in_front_of_the_product_is_found(norm: Norm) -> None:
    assert_found(Spelling(norm=norm, scale="scores"))


def test_projection_takes_heads_in_the_order_asked_for() -> None:
    found = only_attention(Spelling().model()).value.take([2, 0])
    np.testing.assert_array_equal(found.weight, WEIGHTS.value.weight[:, [2, 0]])
    np.testing.assert_array_equal(found.bias, WEIGHTS.value.bias[[2, 0]])  # type: ignore[index]


def test_attentions_come_in_topological_order_with_the_skips_between_them() -> None:
    g = GraphBuilder()
    modules = [make_weights(1), make_weights(2)]
    softmaxes = []
    for weights in modules:
        g.x = g.project(g.mix(g.queries(weights), g.keys(weights), g.values(weights)), weights.out)
        g.x = g.op("Softmax", g.x, axis=-1)
        softmaxes.append(g.x)
    one, first_skip, two, second_skip = find(g.classify(g.x))
    assert isinstance(one, Attention) and isinstance(two, Attention)
    assert_projection(one.query, modules[0].query)
    assert_projection(two.query, modules[1].query)
    assert [s.node for s in (first_skip, second_skip) if isinstance(s, Skip)] == softmaxes


def of_two_queries(g: GraphBuilder, some: str) -> onnx.ModelProto:
    """Attention of which only the tokens `some` [B,2,D] have queries."""
    query = g.op("Reshape", g.linear(some, WEIGHTS.query), ints(B, 2, H, HEAD_DIM))
    scores = g.op("Mul", g.op("MatMul", g.op("Transpose", query, perm=[0, 2, 1, 3]), g.keys()), scalar(SCALE))
    scores = g.op("Add", scores, POSITION_BIAS[:, :2])
    context = g.op("MatMul", g.op("Softmax", scores, axis=-1), g.values())
    merged = g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), ints(B, 2, C))
    return g.classify(g.op("MatMul", merged, WEIGHTS.out))


def test_queries_of_some_tokens_are_found() -> None:
    g = GraphBuilder()
    found = only_attention(of_two_queries(g, g.op("Gather", g.x, ints(4, 0), axis=1)))
    assert (found.query_tokens, found.rows, found.tokens) == ((4, 0), 2, N)
    assert found.x.name == g.x and found.scale == pytest.approx(SCALE, rel=1e-6)
    for got, drawn in zip(
        (found.query, found.key, found.value), (WEIGHTS.query, WEIGHTS.key, WEIGHTS.value), strict=True
    ):
        assert_projection(got, drawn)
    assert found.bias is not None
    np.testing.assert_array_equal(found.bias.values[0], POSITION_BIAS[:, :2])
    np.testing.assert_array_equal(found.bias.of_rows([1]).values[0], POSITION_BIAS[:, 1:2])


@pytest.mark.parametrize("kind", ["another tensor's", "counted from the end", "computed", "of images", "a slice"])
def test_queries_of_other_tokens_are_cross_attention(kind: str) -> None:
    g = GraphBuilder()
    flat = g.op("Reshape", "image", ints(B, -1))
    some = {
        "another tensor's": lambda: g.op("Gather", g.op("Relu", g.x), ints(4, 0), axis=1),
        "counted from the end": lambda: g.op("Gather", g.x, ints(-1, 0), axis=1),
        "computed": lambda: g.op("Gather", g.x, g.op("ArgMax", flat, axis=1, keepdims=0), axis=1),
        "of images": lambda: g.op("Gather", g.op("Slice", g.x, ints(0), ints(2), ints(1)), ints(1, 0), axis=0),
        "a slice": lambda: g.op("Slice", g.x, ints(0), ints(2), ints(1)),
    }[kind]()
    assert "cross-attention" in only_skip(of_two_queries(g, some)).reason


def test_graph_without_a_softmax_has_none() -> None:
    g = GraphBuilder()
    assert find(g.classify(g.x)) == []


# --- windows, position bias and mask ---------------------------------------------------------------------------------

SHIFTED = Windows(shift=(1, 2))


@pytest.mark.parametrize("batch", [B, 1, DYNAMIC])
@pytest.mark.parametrize(
    ("mask", "kinds"),
    [
        (None, (0, 0, 0, 0)),
        (window_mask(4), (0, 1, 2, 3)),
        (window_mask(4, (0, 1, 1, 0)), (0, 1, 1, 0)),
        (window_mask(4, (2, 2, 2, 2)), (0, 0, 0, 0)),
    ],
    ids=["no mask", "all differ", "some are alike", "all are alike"],
)
def test_bias_and_mask_are_read_off_for_every_kind_of_window(
    mask: Floats | None, kinds: tuple[int, ...], batch: int | str
) -> None:
    found = only_attention(WindowBlock(SHIFTED, POSITION_BIAS, mask).model(batch))
    assert (found.windows, found.heads, found.tokens) == (4, H, N)
    assert found.bias is not None and found.bias.kinds == kinds
    added = POSITION_BIAS[None] + (0 if mask is None else mask[:, None])
    for window, kind in enumerate(kinds):
        np.testing.assert_array_equal(found.bias.values[kind], added[window % len(added)])
    assert_projection(found.value, WEIGHTS.value)


def test_mask_without_a_position_bias_is_a_bias_of_all_heads() -> None:
    found = only_attention(WindowBlock(SHIFTED, None, window_mask(4, (0, 1, 1, 0))).model())
    assert found.bias is not None
    np.testing.assert_array_equal(found.bias.values, np.repeat(window_mask(2)[:, None], H, axis=1))
    taken = found.bias.take([2, 0])
    assert taken.values.shape == (2, 2, N, N) and taken.kinds == found.bias.kinds


def test_windows_without_bias_have_none() -> None:
    found = only_attention(WindowBlock(Windows()).model())
    assert found.bias is None and found.windows == 4


def test_sum_with_zeros_is_no_bias() -> None:
    assert only_attention(WindowBlock(SHIFTED, np.zeros((H, N, N), np.float32)).model()).bias is None


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_factor_behind_the_bias_scales_it_too(scale: float) -> None:
    g = GraphBuilder()
    biased = g.op("Add", g.op("MatMul", g.queries(), g.keys()), POSITION_BIAS)
    found = only_attention(g.classify(with_map(g, g.op("Softmax", g.op("Mul", biased, scalar(scale)), axis=-1))))
    assert found.scale == pytest.approx(SCALE * scale) and found.bias is not None
    np.testing.assert_allclose(found.bias.values[0], POSITION_BIAS * scale, rtol=1e-6)


def test_bias_computed_from_constants_is_a_constant() -> None:
    g = GraphBuilder()
    bias = g.op("Transpose", np.ascontiguousarray(POSITION_BIAS.transpose(1, 2, 0)), perm=[2, 0, 1])
    scores = g.op("Add", bias, g.op("MatMul", g.queries(), g.keys()))
    model = g.classify(with_map(g, g.op("Softmax", scores, axis=-1)))
    found = only_attention(model)
    assert found.bias is not None
    np.testing.assert_array_equal(found.bias.values[0], POSITION_BIAS)


def test_equal_arrays_are_counted_once_in_the_order_of_appearance() -> None:
    a, b = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    values, kinds = distinct(np.stack([b, a, b, a, a]))
    assert kinds == (0, 1, 0, 1, 1)
    np.testing.assert_array_equal(values, np.stack([b, a]))


# --- near misses: one for each reason to refuse ----------------------------------------------------------------------


def with_map(g: GraphBuilder, attention: str) -> str:
    """[B,N,D]: the tokens, mixed by this map."""
    return g.project(g.merge_heads(g.op("MatMul", attention, g.values())))


def with_context(g: GraphBuilder, context: str) -> str:
    return g.project(g.merge_heads(context))


def context_of(g: GraphBuilder) -> str:
    """[B,H,N,d]."""
    return g.op("MatMul", g.map(), g.values())


def read_again(g: GraphBuilder, tokens: str, tensor: str, rank: int) -> str:
    """`tokens`, and the mean of `tensor` in each of them."""
    mean = g.op("ReduceMean", tensor, axes=list(range(1, rank)), keepdims=0)
    return g.op("Add", tokens, g.op("Reshape", mean, ints(B, 1, 1)))


def softmax_over_queries(g: GraphBuilder) -> str:
    return with_map(g, g.op("Softmax", g.op("MatMul", g.queries(), g.keys()), axis=2))


def mask_computed_from_the_image(g: GraphBuilder) -> str:
    computed = g.op("Unsqueeze", g.op("MatMul", g.x, np.ones((D, N), np.float32)), ints(1))  # [B,1,N,N]
    scores = g.op("Add", g.op("MatMul", g.queries(), g.keys()), computed)
    return with_map(g, g.op("Softmax", scores, axis=-1))


def mask_for_each_image(g: GraphBuilder) -> str:
    masks = np.arange(B, dtype=np.float32).reshape(B, 1, 1, 1)
    return with_map(g, g.op("Softmax", g.op("Add", g.op("MatMul", g.queries(), g.keys()), masks), axis=-1))


def infinite_mask(g: GraphBuilder) -> str:
    mask = np.triu(np.full((N, N), -np.inf, np.float32), 1)
    return with_map(g, g.op("Softmax", g.op("Add", g.op("MatMul", g.queries(), g.keys()), mask), axis=-1))


def scores_transposed(g: GraphBuilder) -> str:
    scores = g.op("Transpose", g.op("MatMul", g.queries(), g.keys()), perm=[0, 1, 3, 2])
    return with_map(g, g.op("Softmax", scores, axis=-1))


def temperature_per_head(g: GraphBuilder) -> str:
    scores = g.op("Mul", g.op("MatMul", g.queries(), g.keys()), np.ones((H, 1, 1), np.float32))
    return with_map(g, g.op("Softmax", scores, axis=-1))


def softmax_of_the_image(g: GraphBuilder) -> str:
    return read_again(g, g.x, g.op("Softmax", "image", axis=-1), 4)


def relu_on_the_queries(g: GraphBuilder) -> str:
    return g.project(g.mix(g.op("Relu", g.queries()), g.keys(), g.values()))


def projection_computed_from_the_image(g: GraphBuilder) -> str:
    matrix = g.op("MatMul", np.ones((D, N), np.float32), g.x)  # [B,D,D]
    wide = g.op("Slice", g.op("Concat", matrix, matrix, axis=2), ints(0), ints(C), ints(2))
    return g.project(g.mix(g.queries(), g.keys(), g.split_heads(g.op("MatMul", g.x, wide))))


def keys_constant(g: GraphBuilder) -> str:
    return g.project(g.mix(g.queries(), g.constant(np.ones((1, H, HEAD_DIM, N), np.float32)), g.values()))


def map_read_twice(g: GraphBuilder) -> str:
    attention = g.map()
    return read_again(g, with_map(g, attention), attention, 4)


def map_transposed(g: GraphBuilder) -> str:
    return with_map(g, g.op("Transpose", g.map(), perm=[0, 1, 3, 2]))


def map_on_the_right(g: GraphBuilder) -> str:
    values = g.split_heads(g.linear(g.x, WEIGHTS.value), (0, 2, 3, 1))  # [B,H,d,N]
    return with_context(g, g.op("Transpose", g.op("MatMul", values, g.map()), perm=[0, 1, 3, 2]))


def values_scaled(g: GraphBuilder) -> str:
    return g.project(g.mix(g.queries(), g.keys(), g.op("Mul", g.values(), scalar(2))))


def values_normalized(g: GraphBuilder) -> str:
    return g.project(g.mix(g.queries(), g.keys(), layer_norm(g, g.values())))


def keys_of_another_input(g: GraphBuilder) -> str:
    queries = g.queries()
    g.x = g.op("Relu", g.x)
    return g.project(g.mix(queries, g.keys(), g.values()))


def heads_averaged(g: GraphBuilder) -> str:
    mean = g.op("ReduceMean", context_of(g), axes=[1], keepdims=0)  # [B,N,d]
    return g.project(mean, np.ones((HEAD_DIM, D), np.float32))


def context_scaled(g: GraphBuilder) -> str:
    return with_context(g, g.op("Mul", context_of(g), scalar(2)))


def context_read_twice(g: GraphBuilder) -> str:
    context = context_of(g)
    return read_again(g, with_context(g, context), context, 4)


def merged_read_twice(g: GraphBuilder) -> str:
    merged = g.merge_heads(context_of(g))
    return read_again(g, g.project(merged), merged, 3)


def relu_on_the_merged_heads(g: GraphBuilder) -> str:
    return g.project(g.op("Relu", g.merge_heads(context_of(g))))


def output_projection_computed_from_the_image(g: GraphBuilder) -> str:
    out = g.op("MatMul", np.ones((C, N), np.float32), g.x)  # [B,C,D]
    return g.project(g.merge_heads(context_of(g)), out)


def output_projection_per_image(g: GraphBuilder) -> str:
    return g.project(g.merge_heads(context_of(g)), np.ones((B, C, D), np.float32))


def merged_on_the_right(g: GraphBuilder) -> str:
    product = g.op("MatMul", np.ones((D, N), np.float32), g.merge_heads(context_of(g)))  # [B,D,C]
    return g.op("Add", g.x, g.op("ReduceMean", product, axes=[1, 2]))


def merged_dimension_by_dimension(g: GraphBuilder) -> str:
    return g.project(g.op("Reshape", g.op("Transpose", context_of(g), perm=[0, 2, 3, 1]), ints(B, N, C)))


def merged_without_transposing(g: GraphBuilder) -> str:
    return g.project(g.op("Reshape", context_of(g), ints(B, N, C)))


def merged_with_dimensions_reversed(g: GraphBuilder) -> str:
    return with_context(g, reverse_dimensions(g, context_of(g)))


def reverse_dimensions(g: GraphBuilder, tensor: str) -> str:
    """[B,H,N,d] with d from last to first."""
    return g.op("Slice", tensor, ints(-1), ints(-HEAD_DIM - 1), ints(3), ints(-1))


def merged_flat(g: GraphBuilder) -> str:
    flat = g.op("MatMul", g.op("Reshape", g.merge_heads(context_of(g)), ints(B * N, C)), WEIGHTS.out)
    return g.op("Add", g.x, g.op("Reshape", flat, ints(B, N, D)))


def layer_norm(g: GraphBuilder, tensor: str, axis: int = -1, gain: Floats = WEIGHTS.gains[0]) -> str:
    return g.op("LayerNormalization", tensor, gain, axis=axis, epsilon=EPSILON)


def unscaled_queries(g: GraphBuilder) -> str:
    """[B,H,N,d]."""
    return g.split_heads(g.linear(g.x, WEIGHTS.query))


def with_queries(g: GraphBuilder, queries: str) -> str:
    return g.project(g.mix(queries, g.keys(), g.values()))


def factor_before_a_norm(g: GraphBuilder) -> str:
    scaled = g.op("Mul", g.linear(g.x, WEIGHTS.query), scalar(2))
    return with_queries(g, layer_norm(g, g.split_heads(scaled)))


def two_linear_layers_added(g: GraphBuilder) -> str:
    return with_queries(g, g.op("Add", unscaled_queries(g), g.values()))


def norm_over_the_tokens(g: GraphBuilder) -> str:
    queries = unscaled_queries(g)
    return with_queries(g, g.op("Sub", queries, g.op("ReduceMean", queries, axes=[2])))


def norm_of_heads_together(g: GraphBuilder) -> str:
    return with_queries(g, layer_norm(g, unscaled_queries(g), 2))


def gain_per_head(g: GraphBuilder) -> str:
    return with_queries(g, g.op("Mul", layer_norm(g, unscaled_queries(g)), np.ones((H, 1, HEAD_DIM), np.float32)))


def gain_per_head_inside_the_norm(g: GraphBuilder) -> str:
    return with_queries(g, layer_norm(g, unscaled_queries(g), gain=np.ones((H, 1, HEAD_DIM), np.float32)))


def two_norms(g: GraphBuilder) -> str:
    once = g.op("Transpose", layer_norm(g, unscaled_queries(g)), perm=[0, 1, 3, 2])
    return with_queries(g, g.op("Transpose", layer_norm(g, once, gain=floats(*[1] * N)), perm=[0, 1, 3, 2]))


def heads_swapped_behind_a_norm(g: GraphBuilder) -> str:
    return with_queries(g, g.op("Gather", layer_norm(g, unscaled_queries(g)), ints(1, 0, 2), axis=1))


def dimensions_reversed_behind_a_norm(g: GraphBuilder) -> str:
    return with_queries(g, reverse_dimensions(g, layer_norm(g, unscaled_queries(g))))


def norm_on_another_shape(g: GraphBuilder) -> str:
    flat = g.op("Reshape", unscaled_queries(g), ints(B, H * N, HEAD_DIM))
    return with_queries(g, g.op("Reshape", layer_norm(g, flat), ints(B, H, N, HEAD_DIM)))


def values_longer_than_keys(g: GraphBuilder) -> str:
    longer = HEAD_DIM + 1
    values = g.split_heads(g.op("MatMul", g.x, np.ones((D, H * longer), np.float32)), shape=(H, longer))
    tokens_first = g.op("Transpose", g.op("MatMul", g.map(), values), perm=[0, 2, 1, 3])
    return g.project(g.op("Reshape", tokens_first, ints(B, N, H * longer)), np.ones((H * longer, D), np.float32))


def three_axes(g: GraphBuilder) -> str:
    queries, values = (g.linear(g.x, linear) for linear in (WEIGHTS.query, WEIGHTS.value))
    keys = g.op("Transpose", g.linear(g.x, WEIGHTS.key), perm=[0, 2, 1])
    context = g.op("MatMul", g.op("Softmax", g.op("MatMul", queries, keys), axis=-1), values)
    return g.project(g.op("Reshape", context, ints(B, N, C)))


def tokens_reversed(g: GraphBuilder) -> str:
    return with_queries(g, g.op("Slice", g.queries(), ints(N), ints(-N - 1), ints(2), ints(-1)))


def dimensions_of_one_token_swapped(g: GraphBuilder) -> str:
    flat = g.op("Reshape", g.linear(g.x, WEIGHTS.query), ints(B, N * C))
    swapped = g.op("Gather", flat, ints(1, 0, *range(2, N * C)), axis=1)
    return with_queries(g, g.split_heads(g.op("Reshape", swapped, ints(B, N, C))))


def heads_cut_across_tokens(g: GraphBuilder) -> str:
    return with_queries(g, g.op("Reshape", g.linear(g.x, WEIGHTS.query), ints(B, H, N, HEAD_DIM)))


def x_flat(g: GraphBuilder) -> str:
    tokens, g.x = g.x, g.op("Reshape", g.x, ints(B * N, D))
    merged = g.merge_heads(context_of(g))
    g.x = tokens
    return g.project(merged)


def scores_with_one_more_axis(g: GraphBuilder) -> str:
    scores = g.op("Add", g.op("MatMul", g.queries(), g.keys()), np.ones((1, 1, 1, 1, 1), np.float32))
    context = g.op("MatMul", g.op("Softmax", scores, axis=-1), g.values())  # [1,B,H,N,d]
    return g.project(g.op("Reshape", g.op("Transpose", context, perm=[0, 1, 3, 2, 4]), ints(B, N, C)))


def images_side_by_side(g: GraphBuilder) -> str:
    """The tokens of both images as those of three."""
    tokens, g.x = g.x, g.op("Reshape", g.x, ints(3, 4, D))

    def heads(linear: Linear, *perm: int) -> str:
        return g.op("Transpose", g.op("Reshape", g.linear(g.x, linear), ints(3, 4, H, HEAD_DIM)), perm=list(perm))

    scores = g.op("MatMul", heads(WEIGHTS.query, 0, 2, 1, 3), heads(WEIGHTS.key, 0, 2, 3, 1))
    context = g.op("MatMul", g.op("Softmax", scores, axis=-1), heads(WEIGHTS.value, 0, 2, 1, 3))
    merged = g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), ints(3, 4, C))
    g.x = tokens
    return g.op("Add", g.x, g.op("Reshape", g.op("MatMul", merged, WEIGHTS.out), ints(B, N, D)))


NEAR_MISSES: dict[Callable[[GraphBuilder], str], str] = {
    softmax_over_queries: "softmax over axis 2, not over the keys",
    mask_computed_from_the_image: "something that depends on the image is added",
    mask_for_each_image: "the images of a batch get different biases or masks",
    infinite_mask: "its bias or mask is not finite",
    scores_with_one_more_axis: "scores change places in front of the softmax",
    images_side_by_side: "3 maps of each head are no whole number of windows per image",
    scores_transposed: "its scores come from Transpose, not from a product",
    temperature_per_head: "its scores come from Mul, not from a product",
    softmax_of_the_image: "image is a constant or an input of the graph",
    relu_on_the_queries: "comes from Relu, not from a linear layer",
    projection_computed_from_the_image: "comes from MatMul, not from a linear layer",
    keys_constant: "constant_.* is a constant or an input",
    map_read_twice: "has 2 consumers, not one",
    map_transposed: "the map feeds Transpose, not a product with values",
    map_on_the_right: "the map feeds MatMul, not a product with values",
    values_scaled: "values are normalized or scaled",
    values_normalized: "values are normalized or scaled",
    keys_of_another_input: "cross-attention",
    heads_averaged: "heads are not merged behind the product",
    context_scaled: "heads are not merged behind the product",
    context_read_twice: "has 2 consumers, not one",
    merged_read_twice: "has 2 consumers, not one",
    relu_on_the_merged_heads: "the merged heads feed Relu, not a constant output projection",
    output_projection_computed_from_the_image: "feed MatMul, not a constant output projection",
    output_projection_per_image: "feed MatMul, not a constant output projection",
    merged_on_the_right: "feed MatMul, not a constant output projection",
    merged_dimension_by_dimension: "not merged side by side",
    merged_without_transposing: "not merged side by side",
    merged_with_dimensions_reversed: "not merged side by side",
    merged_flat: "not merged side by side",
    factor_before_a_norm: "a factor in front of a norm",
    two_linear_layers_added: "reads 2 tensors, not one",
    norm_over_the_tokens: "ReduceMean in front of the product is not a norm over one head's vector",
    norm_of_heads_together: "LayerNormalization in front of the product is not a norm",
    gain_per_head: "Mul in front of the product is not a norm",
    gain_per_head_inside_the_norm: "LayerNormalization in front of the product is not a norm",
    two_norms: "comes from LayerNormalization, not from a linear layer",
    heads_swapped_behind_a_norm: "heads or tokens change places behind the norm",
    dimensions_reversed_behind_a_norm: "heads or tokens change places behind the norm",
    norm_on_another_shape: "a norm works on another shape",
    values_longer_than_keys: "differ in heads or size",
    three_axes: "has 3 dimensions, not 4",
    tokens_reversed: "tokens or images are mixed",
    dimensions_of_one_token_swapped: "tokens or images are mixed",
    heads_cut_across_tokens: "tokens or images are mixed",
    x_flat: r"a linear layer writes \[12, 15\], the product reads 2 × 6 tokens",
}


@pytest.mark.parametrize("draw", NEAR_MISSES, ids=lambda draw: draw.__name__)
def test_near_miss_is_left_alone_with_the_reason(draw: Callable[[GraphBuilder], str]) -> None:
    g = GraphBuilder()
    skip = only_skip(g.classify(draw(g)))
    assert re.search(NEAR_MISSES[draw], skip.reason), skip.reason
    assert skip.node in {node.name for node in g.nodes}


def test_plain_attention_of_the_same_builder_is_found() -> None:
    g = GraphBuilder()
    found = only_attention(g.classify(with_context(g, context_of(g))))
    assert_projection(found.query, WEIGHTS.query)
    assert found.x.name == g.x


def test_one_query_for_all_keys_is_refused_even_where_the_batch_is_one() -> None:
    g = GraphBuilder(1)
    first = g.op("Slice", g.queries(), ints(0), ints(1), ints(2))  # [1,H,1,d]
    context = g.op("MatMul", g.op("Softmax", g.op("MatMul", first, g.keys()), axis=-1), g.values())
    merged = g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), ints(1, 1, C))
    skip = only_skip(g.classify(g.project(merged)))
    assert skip.reason == "a linear layer writes [1, 6, 15], the product reads 1 × 1 tokens"


def test_mixed_up_module_does_not_hide_the_ones_around_it() -> None:
    g = GraphBuilder()
    g.x = with_context(g, context_of(g))
    g.x = tokens_reversed(g)
    g.x = with_context(g, context_of(g))
    assert [type(item) for item in find(g.classify(g.x))] == [Attention, Skip, Attention]


@pytest.mark.parametrize("biased", [False, True])
def test_softmax_behind_the_classifier_is_skipped(biased: bool) -> None:
    g = GraphBuilder()
    pooled = g.op("ReduceMean", with_context(g, context_of(g)), axes=[1], keepdims=0)
    logits = g.op("MatMul", pooled, np.ones((D, 4), np.float32))
    if biased:
        logits = g.op("Add", logits, floats(1, 2, 3, 4))
    probabilities = g.op("Softmax", logits, axis=-1)
    attention, skip = find(g.model({probabilities: [B, 4]}))
    assert isinstance(attention, Attention) and isinstance(skip, Skip)
    assert "in front of the product" in skip.reason
