"""Write heads of low rank: a few pooled tokens instead of all of them.

    pool (integers) ──DequantizeLinear── P [M,Σr,N] ──MatMul── [B·W,Σr,D]
                                              x ───────┘            │
              ┌── Slice, one for each head ─────────────────────────┘
      [B·W,r,D] ──MatMul Wv──(Add)──MatMul Wo── [B·W,r,D] ──Concat── [B·W,Σr,D]
                                                                         │
    mix (integers) ──DequantizeLinear── U [M,R,Σr] ──MatMul──────────────┘ ──▶ [B·W,R,D]

The result is what these heads add to the output projection's. One product makes the pooled tokens
of all heads, and one adds up what all heads say. Between the two, every head has linear layers of
its own, of r tokens each; where Wv·Wo has fewer weights than the two, the head has this one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.attention import Attention
from eamdeploy.graph.emit_parts import by_window, emit_rows, in_windows
from eamdeploy.graph.frozen import IntegerFactors, Rows, mix_rows, pool_rows
from eamdeploy.graph.writer import GraphWriter


def emit_factors(
    writer: GraphWriter,
    attention: Attention,
    groups: Sequence[IntegerFactors],
    output: NDArray[np.float32],
) -> gs.Variable:
    """What the heads in `groups` add to the output projection's result, `[B·W, R, D]`.

    Args:
        groups: at least one, for the rows that `attention` has, see `IntegerFactors.of_rows`.
        output: the output projection's weight `[H, d, D]`.
    """
    windows = groups[0].windows
    pool = _emit(writer, "pool", pool_rows(groups))
    pooled = _apply(writer, "pooled", attention, pool, windows, attention.x)
    heads = [(head, group.rank) for group in groups for head in group.heads]
    ends = list(accumulate(rank for _, rank in heads))
    parts = []
    for (head, rank), end in zip(heads, ends, strict=True):
        tokens = pooled
        if len(heads) > 1:
            bounds = [writer.integers(f"{name}.{head}", n) for name, n in _slice(end - rank, end)]
            shape = [pooled.shape[0], rank, pooled.shape[2]]
            tokens = writer.node(f"pooled.{head}", "Slice", [pooled, *bounds], shape)
        parts.append(_project(writer, head, attention, tokens, output[head]))
    answers = parts[0]
    if len(parts) > 1:
        shape = [answers.shape[0], ends[-1], answers.shape[2]]
        answers = writer.node("pooled_answers", "Concat", parts, shape, axis=1)
    mixes = [_emit(writer, f"mix.{group.rank}", mix_rows(group)) for group in groups]
    mix = mixes[0]
    if len(mixes) > 1:
        mix = writer.node("mix", "Concat", mixes, [*mix.shape[:2], ends[-1]], axis=2)
    return _apply(writer, "unpooled", attention, mix, windows, answers)


def _slice(start: int, end: int) -> tuple[tuple[str, int], ...]:
    return ("pooled_start", start), ("pooled_end", end), ("pooled_axis", 1)


def _emit(writer: GraphWriter, name: str, rows: Rows) -> gs.Tensor:
    return emit_rows(writer, name, rows.integers, rows.scales, rows.shape)


def _apply(
    writer: GraphWriter,
    name: str,
    attention: Attention,
    constants: gs.Tensor,
    windows: tuple[int, ...],
    x: gs.Tensor,
) -> gs.Variable:
    """Constants `[M, R, K]`, chosen by window, times `x` `[B·W, K, D]`: `[B·W, R, D]`."""
    chosen, rows = by_window(writer, name, constants, windows), constants.shape[1]

    def multiply(tokens: gs.Tensor) -> gs.Variable:
        shape = [*tokens.shape[:-2], rows, tokens.shape[-1]]
        return writer.node(name, "MatMul", [chosen, tokens], shape)

    return in_windows(writer, name, attention, x, len(set(windows)), multiply)


def _project(
    writer: GraphWriter,
    head: int,
    attention: Attention,
    tokens: gs.Tensor,
    output: NDArray[np.float32],
) -> gs.Variable:
    """What a head makes of pooled tokens `[B·W, r, D]`, through values and output projection."""
    value = attention.value.take([head])
    weight, bias = value.weight[:, 0], None if value.bias is None else value.bias[0]  # [D, d], [d]
    if weight.shape[0] * output.shape[1] <= weight.size + output.size:
        exact = output.astype(np.float64)
        joined = (weight.astype(np.float64) @ exact).astype(np.float32)
        joined_bias = None if bias is None else (bias.astype(np.float64) @ exact).astype(np.float32)
        return _linear(writer, f"vo_pooled.{head}", tokens, joined, joined_bias)
    values = _linear(writer, f"v_pooled.{head}", tokens, weight, bias)
    return _linear(writer, f"o_pooled.{head}", values, output, None)


def _linear(
    writer: GraphWriter,
    name: str,
    x: gs.Tensor,
    weight: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
) -> gs.Variable:
    shape = [*x.shape[:2], weight.shape[1]]
    result = writer.node(name, "MatMul", [x, writer.constant(f"{name}_weight", weight)], shape)
    if bias is None:
        return result
    constant = writer.constant(f"{name}_bias", bias)
    return writer.node(f"{name}_biased", "Add", [result, constant], shape)
