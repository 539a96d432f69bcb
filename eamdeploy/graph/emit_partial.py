"""Write attention of heads of which only some rows, or only some entries, are frozen.

Entries: every score is computed, then the frozen entries are put in place.

    softmax(s·q·kᵀ + bias) ──Mul──Add──MatMul──▶ context           A ← (1 − mask)·A(x) + mask·F
    1 − mask (booleans) ──────┘    │     └── v
    mask·F (integers) ──DequantizeLinear

A Where would do the same in one node, and takes a third longer on ONNX Runtime CPU.

Rows: only live rows have queries, scores and a softmax; a Gather puts live and frozen rows in order.

    x ──Gather live rows [B·W,P,R,D]──MatMul Wq── q ──MatMul kᵀ──Softmax──MatMul v── [B·W,P,R,d] ┐
    frozen rows (integers) ──DequantizeLinear── [M,P,Z,N] ──MatMul v── [B·W,P,Z,d] ───────── Concat ── Gather

The heads of one product need the same number of rows: R is the most live rows that any head has, Z the most frozen
ones; a head with fewer repeats one, and the last Gather leaves that out.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.attention import Attention
from eamdeploy.graph.emit_parts import (
    apply_maps,
    attention_map,
    by_window,
    emit_maps,
    in_windows,
    project,
    scaled_query,
    softmax_scores,
    transposed_keys,
)
from eamdeploy.graph.frozen import IntegerMaps, padded
from eamdeploy.graph.writer import GraphWriter


def entries_context(writer: GraphWriter, attention: Attention, frozen: IntegerMaps) -> gs.Variable:
    """(mask·F + (1 − mask)·softmax(s·q·kᵀ + bias))·v, `[B·W, P, R, d]`."""
    assert frozen.mask is not None and not frozen.by_row, "some entries are frozen"
    live = attention_map(writer, "_partial", attention, frozen.heads)
    maps = emit_maps(writer, "entries", frozen.integers, frozen.scales)
    constants = by_window(writer, "entries", maps, frozen.windows)
    stays = writer.constant("entries_live", ~frozen.mask)
    keep = writer.node("entries_kept", "Cast", [stays], frozen.mask.shape, to=onnx.TensorProto.FLOAT)

    def mix(x: gs.Tensor) -> gs.Variable:
        kept = writer.node("live_entries", "Mul", [x, keep], x.shape)
        return writer.node("mixed", "Add", [kept, constants], x.shape)

    mixed = in_windows(writer, "mixed", attention, live, len(set(frozen.windows)), mix)
    values = project(writer, "v_partial", attention.x, attention.value, frozen.heads)
    return writer.node("context_partial", "MatMul", [mixed, values], [*live.shape[:3], attention.head_dim])


def rows_context(writer: GraphWriter, attention: Attention, frozen: IntegerMaps) -> gs.Variable:
    """The rows of softmax(s·q·kᵀ + bias)·v that are live and those of F·v that are frozen, `[B·W, P, R, d]`."""
    assert frozen.mask is not None and frozen.by_row, "some rows are frozen"
    heads, head_dim, rows = frozen.heads, attention.head_dim, attention.rows
    count = len(heads)
    live_rows, frozen_rows = padded(~frozen.mask), padded(frozen.mask)
    values = project(writer, "v_partial", attention.x, attention.value, heads)

    query = _row_queries(writer, attention, heads, live_rows)
    keys = transposed_keys(writer, "_partial", attention, heads)
    bias = None
    if attention.bias is not None:
        bias = np.take_along_axis(attention.bias.values[:, list(heads)], live_rows[None, :, :, None], axis=2)
    live_map = softmax_scores(writer, "_partial", attention, query, keys, bias)
    live = writer.node("context_live_rows", "MatMul", [live_map, values], [*query.shape[:3], head_dim])

    integers = np.take_along_axis(frozen.integers, frozen_rows[:, None, :, None], axis=2)
    scales = np.take_along_axis(frozen.scales, frozen_rows[:, None, :], axis=2)
    maps = emit_maps(writer, "rows", integers, scales)
    constant = apply_maps(writer, "context_frozen_rows", attention, maps, frozen.windows, values)

    per_head = live_rows.shape[1] + frozen_rows.shape[1]
    batch = attention.x.shape[0]
    both = writer.node("rows_apart", "Concat", [live, constant], [batch, count, per_head, head_dim], axis=2)
    flat = writer.reshape("rows_flat", both, (-1, count * per_head, head_dim), batch)
    places = (_places(frozen.mask, live_rows.shape[1]) + per_head * np.arange(count)[:, None]).reshape(-1)
    ordered = writer.gather("rows_in_order", flat, places, axis=1, shape=[batch, count * rows, head_dim])
    return writer.reshape("context_partial", ordered, (-1, count, rows, head_dim), batch)


def _row_queries(
    writer: GraphWriter, attention: Attention, heads: tuple[int, ...], rows: NDArray[np.int64]
) -> gs.Variable:
    """Scaled queries `[B·W, P, L, d]` of the given L rows `[P, L]` of each head."""
    batch, channels = attention.x.shape[0], attention.query.weight.shape[0]
    chosen, size = attention.query.take(list(heads)), [batch, *rows.shape, attention.head_dim]
    tokens = rows if attention.query_tokens is None else np.array(attention.query_tokens)[rows]
    x = writer.gather("x_live_rows", attention.x, tokens, axis=1, shape=[batch, *rows.shape, channels])
    weight = writer.constant("q_partial_weight", chosen.weight.transpose(1, 0, 2))
    query = writer.node("q_partial", "MatMul", [x, weight], size)
    if chosen.bias is not None:
        bias = writer.constant("q_partial_bias", chosen.bias[:, None])
        query = writer.node("q_partial_biased", "Add", [query, bias], size)
    return scaled_query(writer, "_partial", attention, query)


def _places(mask: NDArray[np.bool_], live_rows: int) -> NDArray[np.int64]:
    """Where each row `[P, R]` stands among the padded live rows of its head, followed by the padded frozen ones."""
    return np.where(mask, live_rows + np.cumsum(mask, axis=1), np.cumsum(~mask, axis=1)) - 1
