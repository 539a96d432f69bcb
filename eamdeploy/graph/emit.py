"""Write multi-head attention into a graph in one canonical form that runtimes fuse.

    x ──MatMul Wq──(Add)── q ─Reshape─Transpose─[norm]─Mul s──┐
    x ──MatMul Wk──(Add)── k ─Reshape─Transpose─[norm]────────MatMul──(Add bias)──Softmax──┐
    x ──MatMul Wv──(Add)── v of live heads ─Reshape─Transpose────────────────────────────MatMul──────┐
    x ──MatMul Wv──(Add)── v of frozen heads ─Reshape─Transpose──┐                                  Concat ─┐
    frozen maps (integers) ──DequantizeLinear──Reshape [M,F,R,N]──MatMul ────────────────────────────┘      │
                                               merged [B·W, R, H·d] ◀──Reshape──Transpose───────────────────┘

Four dimensions at most where every window uses the same constants, one standard attention over the live heads, one
batched product over the frozen ones (docs/design.md, ONNX contract); heads of which only some rows or entries are
frozen stand between them (`graph.emit_partial`). One linear layer for each of q, k and v: one for all three and a
`Split` was 1 % slower on ONNX Runtime CPU. Batch and token dimensions are taken over by `Reshape`'s 0, so a dynamic
batch needs no arithmetic. What is frozen needs no bias and no mask. Where only some tokens have queries, a Gather of
these stands in front of Wq, and R < N; keys and values are those of all tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_graphsurgeon as gs

from eamdeploy.graph.attention import Attention
from eamdeploy.graph.emit_partial import entries_context, rows_context
from eamdeploy.graph.emit_parts import apply_maps, attention_map, emit_maps, project
from eamdeploy.graph.frozen import IntegerMaps, head_groups
from eamdeploy.graph.writer import GraphWriter

_SPLIT_HEADS = ("Reshape", "Transpose")
_SCORES = ((), ("Add",), ("Reshape", "Add", "Reshape"))  # plain, one bias for all windows, one for each kind


def is_canonical(attention: Attention) -> bool:
    """Whether `attention` already has the form that `emit_attention` writes for live heads."""
    keys = _SPLIT_HEADS if attention.key_norm is None else (*_SPLIT_HEADS, "Transpose")
    return attention.layout == (_SPLIT_HEADS, keys, _SPLIT_HEADS) and attention.score_layout in _SCORES


def emit_attention(
    writer: GraphWriter,
    attention: Attention,
    frozen: IntegerMaps | None,
    low_rank: Collection[int] = (),
) -> gs.Tensor:
    """The merged heads `[B·W, R, H·d]` of `attention` in canonical form, in the order of `head_groups`.

    Nothing of the original is removed or rewired: that is the caller's.

    Args:
        frozen: what is frozen of the rows that `attention` has, see `IntegerMaps.of_rows`.
        low_rank: heads that are left out, some but not all: `graph.emit_factors` writes them.
    """
    groups = head_groups(attention.heads, frozen, low_rank)
    contexts = []
    if groups.live:
        contexts.append(_live_context(writer, attention, groups.live))
    if frozen is not None and groups.partial:
        partial = frozen.take(groups.partial)
        contexts.append((rows_context if partial.by_row else entries_context)(writer, attention, partial))
    if frozen is not None and groups.whole:
        contexts.append(_frozen_context(writer, attention, frozen.take(groups.whole)))
    return _merge_heads(writer, attention, contexts)


def rewrite_attention(
    graph: gs.Graph, old: Attention, new: Attention, name: str, frozen: IntegerMaps | None = None
) -> None:
    """The output projection of `old` reads `new` in canonical form; `name` tells its nodes from earlier ones."""
    original = old.merged.name.partition("/canonical/")[0]
    writer = GraphWriter(graph, f"{original}/canonical/{name}")
    old.projection.inputs[0] = emit_attention(writer, new, frozen)


def _live_context(writer: GraphWriter, attention: Attention, live: Sequence[int]) -> gs.Variable:
    """softmax(s·q·kᵀ + bias)·v of the live heads, `[B·W, L, R, d]`."""
    live_map = attention_map(writer, "", attention, live)
    values = project(writer, "v", attention.x, attention.value, live)
    return writer.node("context", "MatMul", [live_map, values], [*live_map.shape[:3], attention.head_dim])


def _frozen_context(writer: GraphWriter, attention: Attention, frozen: IntegerMaps) -> gs.Variable:
    """F·v of wholly frozen heads, `[B·W, F, R, d]`."""
    values = project(writer, "v_frozen", attention.x, attention.value, frozen.heads)
    maps = emit_maps(writer, "map", frozen.integers, frozen.scales)
    return apply_maps(writer, "context_frozen", attention, maps, frozen.windows, values)


def _merge_heads(writer: GraphWriter, attention: Attention, contexts: Sequence[gs.Variable]) -> gs.Tensor:
    """`contexts`, `[B·W, some heads, R, d]` each, one behind the other as `[B·W, R, heads·d]`."""
    batch, rows, head_dim = attention.x.shape[0], attention.rows, attention.head_dim
    context, heads = contexts[0], sum(each.shape[1] for each in contexts)
    if len(contexts) > 1:
        context = writer.node("heads", "Concat", contexts, [batch, heads, rows, head_dim], axis=1)
    by_token = [batch, rows, heads, head_dim]
    transposed = writer.node("tokens_first", "Transpose", [context], by_token, perm=[0, 2, 1, 3])
    width = heads * head_dim
    shape = writer.integers("merged_shape", 0, 0, width)
    return writer.node("merged", "Reshape", [transposed, shape], [batch, rows, width])
