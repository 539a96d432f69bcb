"""The parts that attention in a graph is written from: projections, maps, constants by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.attention import Attention, Projection
from eamdeploy.graph.writer import GraphWriter


def attention_map(writer: GraphWriter, suffix: str, attention: Attention, heads: Sequence[int]) -> gs.Variable:
    """softmax(s·q·kᵀ + bias) of `heads`, `[B·W, heads, R, N]`."""
    x = attention.x
    if attention.query_tokens is not None:
        shape, tokens = [x.shape[0], attention.rows, x.shape[2]], np.array(attention.query_tokens)
        x = writer.gather(f"q{suffix}_tokens", x, tokens, axis=1, shape=shape)
    query = scaled_query(writer, suffix, attention, project(writer, f"q{suffix}", x, attention.query, heads))
    keys = transposed_keys(writer, suffix, attention, heads)
    bias = None if attention.bias is None else attention.bias.values[:, list(heads)]
    return softmax_scores(writer, suffix, attention, query, keys, bias)


def scaled_query(writer: GraphWriter, suffix: str, attention: Attention, query: gs.Tensor) -> gs.Tensor:
    """`query` normalized, where attention does so, and multiplied with the scale."""
    if attention.query_norm is not None:
        query = writer.copy_norm(f"q{suffix}_norm", attention.query_norm, query)
    if attention.scale == 1:
        return query
    scale = writer.constant(f"scale{suffix}", np.array(attention.scale, dtype=np.float32))
    return writer.node(f"q{suffix}_scaled", "Mul", [query, scale], query.shape)


def transposed_keys(writer: GraphWriter, suffix: str, attention: Attention, heads: Sequence[int]) -> gs.Tensor:
    """Keys as `[B·W, heads, d, N]`; with a norm, which wants d last, one more transpose."""
    name = f"k{suffix}"
    if attention.key_norm is None:
        return project(writer, name, attention.x, attention.key, heads, perm=(0, 2, 3, 1))
    keys = project(writer, name, attention.x, attention.key, heads)
    normed = writer.copy_norm(f"{name}_norm", attention.key_norm, keys)
    shape = [attention.x.shape[0], len(heads), attention.head_dim, attention.tokens]
    return writer.node(f"{name}_transposed_again", "Transpose", [normed], shape, perm=[0, 1, 3, 2])


def softmax_scores(
    writer: GraphWriter,
    suffix: str,
    attention: Attention,
    query: gs.Tensor,
    keys: gs.Tensor,
    bias: NDArray[np.float32] | None,
) -> gs.Variable:
    """softmax(q·kᵀ + bias) of queries `[B·W, P, R, d]` and keys `[B·W, P, d, N]`, with bias `[K, P, R, N]`."""
    shape = [*query.shape[:3], attention.tokens]
    scores = writer.node(f"scores{suffix}", "MatMul", [query, keys], shape)
    if attention.bias is not None and bias is not None:
        name, kinds = f"scores{suffix}_biased", attention.bias.kinds
        addend = by_window(writer, f"bias{suffix}", writer.constant(f"bias{suffix}", bias), kinds)
        scores = in_windows(
            writer, name, attention, scores, len(set(kinds)), lambda x: writer.node(name, "Add", [x, addend], x.shape)
        )
    return writer.node(f"softmax{suffix}", "Softmax", [scores], shape, axis=-1)


def apply_maps(
    writer: GraphWriter, name: str, attention: Attention, maps: gs.Tensor, windows: tuple[int, ...], values: gs.Tensor
) -> gs.Variable:
    """Constant maps `[M, P, R, N]`, chosen by window, times values `[B·W, P, N, d]`: `[B·W, P, R, d]`."""
    chosen = by_window(writer, f"{name}_maps", maps, windows)
    rows = maps.shape[2]

    def multiply(x: gs.Tensor) -> gs.Variable:
        return writer.node(name, "MatMul", [chosen, x], [*x.shape[:-2], rows, attention.head_dim])

    return in_windows(writer, name, attention, values, len(set(windows)), multiply)


def emit_maps(
    writer: GraphWriter, name: str, integers: NDArray[np.unsignedinteger], scales: NDArray[np.float32]
) -> gs.Tensor:
    """Maps `[M, P, R, N]` from integers `[P, M, R, N]`, one constant, and scales `[P, M, R]`, one per row."""
    by_map = integers.swapaxes(0, 1)
    rows = by_map.reshape(-1, by_map.shape[-1])
    return emit_rows(writer, name, rows, scales.swapaxes(0, 1).reshape(-1), by_map.shape)


def emit_rows(
    writer: GraphWriter,
    name: str,
    integers: NDArray[np.unsignedinteger],
    scales: NDArray[np.float32],
    shape: tuple[int, ...],
) -> gs.Tensor:
    """Integers `[rows, N]`, one constant, times one scale for each row, in another `shape`."""
    quantized = [
        writer.constant(f"{name}_integers", integers),
        writer.constant(f"{name}_scales", np.where(scales == 0, 1, scales)),
        writer.constant(f"{name}_zero_points", np.zeros(len(integers), dtype=integers.dtype)),
    ]
    values = writer.node(f"{name}_rows", "DequantizeLinear", quantized, integers.shape, axis=0)
    return writer.reshape(name, values, shape)


def by_window(writer: GraphWriter, name: str, constants: gs.Tensor, kinds: tuple[int, ...]) -> gs.Tensor:
    """`constants` `[K, …]` as one for each window `[W, …]`; a single one serves all windows by broadcasting."""
    if len(set(kinds)) == 1 or kinds == tuple(range(len(kinds))):
        return constants
    shape = [len(kinds), *constants.shape[1:]]
    return writer.gather(f"{name}_by_window", constants, np.array(kinds), axis=0, shape=shape)


def in_windows(
    writer: GraphWriter,
    name: str,
    attention: Attention,
    x: gs.Tensor,
    kinds: int,
    compute: Callable[[gs.Tensor], gs.Variable],
) -> gs.Variable:
    """`compute` on `x` `[B·W, …]` as `[B, W, …]` where windows need different constants, and back."""
    if kinds == 1 or writer.images == 1:
        return compute(x)
    tail = x.shape[1:]
    split = writer.reshape(f"{name}_split", x, (-1, attention.windows, *tail))
    result = compute(split)
    return writer.reshape(f"{name}_joined", result, (-1, *result.shape[2:]), x.shape[0])


def project(
    writer: GraphWriter,
    name: str,
    x: gs.Tensor,
    projection: Projection,
    heads: Sequence[int],
    perm: tuple[int, ...] = (0, 2, 1, 3),
) -> gs.Variable:
    """x·W + b of `heads` as `[B·W, heads, N, d]`, or in another order of the axes B·W, N, heads, d by `perm`.

    Args:
        x: `[B·W, N, D]`; for queries perhaps of some tokens only.
    """
    chosen = projection.take(list(heads))
    head_dim = chosen.weight.shape[2]
    width = len(heads) * head_dim
    flat = [*x.shape[:2], width]
    weight = writer.constant(f"{name}_weight", chosen.weight.reshape(-1, width))
    result = writer.node(name, "MatMul", [x, weight], flat)
    if chosen.bias is not None:
        bias = writer.constant(f"{name}_bias", chosen.bias.reshape(width))
        result = writer.node(f"{name}_biased", "Add", [result, bias], flat)
    split = [*x.shape[:2], len(heads), head_dim]
    shape = writer.integers(f"{name}_shape", 0, 0, len(heads), head_dim)
    by_token = writer.node(f"{name}_heads", "Reshape", [result, shape], split)
    return writer.node(f"{name}_transposed", "Transpose", [by_token], [split[axis] for axis in perm], perm=list(perm))
