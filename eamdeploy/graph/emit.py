"""Write multi-head attention into a graph in one canonical form that runtimes fuse.

    x ──MatMul Wq──(Add)── q ─Reshape─Transpose─[norm]─Mul s──┐
    x ──MatMul Wk──(Add)── k ─Reshape─Transpose─[norm]────────MatMul──Softmax──┐
    x ──MatMul Wv──(Add)── v of live heads ─Reshape─Transpose────────────────MatMul──────┐
    x ──MatMul Wv──(Add)── v of frozen heads ─Reshape─Transpose──┐                      Concat ─┐
    frozen maps (integers) ──DequantizeLinear──Reshape [F,N,N]──MatMul ──────────────────┘      │
                                               merged [B, N, H·d] ◀──Reshape──Transpose─────────┘

Four dimensions at most, one standard attention over the live heads, one batched product over the frozen ones
(DESIGN §4, §5.7). One linear layer for each of q, k and v: one for all three and a `Split` was 1 % slower on ONNX
Runtime CPU. Batch and token dimensions are taken over by `Reshape`'s 0, so a dynamic batch needs no arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.attention import Attention, Projection
from eamdeploy.graph.operand import Norm

Shape: TypeAlias = list[int | str]

_SPLIT_HEADS = ("Reshape", "Transpose")


@dataclass(frozen=True, eq=False)
class IntegerMaps:
    """Frozen attention maps as the ONNX file stores them.

    Attributes:
        heads: which heads of the module they replace, ascending.
        integers: uint8 or uint16 `[F, N, N]`; the map's row i is `scales[:, i] · integers[:, i]`.
        scales: float32 `[F, N]`.
    """

    heads: tuple[int, ...]
    integers: NDArray[np.unsignedinteger]
    scales: NDArray[np.float32]


class GraphWriter:
    """Adds nodes to `graph` under names that start with `prefix`."""

    def __init__(self, graph: gs.Graph, prefix: str) -> None:
        self._graph = graph
        self._prefix = prefix

    @property
    def batch(self) -> int | str:
        """B of the graph's input: a number, or a name where it is dynamic."""
        size: int | str = self._graph.inputs[0].shape[0]
        return size

    def constant(self, name: str, values: NDArray[np.generic]) -> gs.Constant:
        """A new initializer."""
        return gs.Constant(f"{self._prefix}/{name}", np.ascontiguousarray(values))

    def integers(self, name: str, *values: int) -> gs.Constant:
        """A new int64 initializer: a shape, or sizes."""
        return self.constant(name, np.array(values, dtype=np.int64))

    def node(
        self, name: str, op: str, inputs: Sequence[gs.Tensor], shape: Shape | None, **attributes: object
    ) -> gs.Variable:
        """The float32 output, of `shape`, of a new node; the attributes are the operator's own."""
        full = f"{self._prefix}/{name}"
        result = gs.Variable(full, np.float32, shape)
        self._graph.nodes.append(gs.Node(op, full, attrs=attributes, inputs=list(inputs), outputs=[result]))
        return result

    def copy_norm(self, name: str, norm: Norm, source: gs.Tensor) -> gs.Tensor:
        """A copy of `norm` that reads `source`; its constants are shared with the original."""
        copied: dict[int, gs.Tensor] = {id(norm.source): source}
        for index, node in enumerate(norm.nodes):
            inputs = [copied.get(id(tensor), tensor) for tensor in node.inputs]
            copied[id(node.outputs[0])] = self.node(f"{name}.{index}", node.op, inputs, None, **node.attrs)
        result = copied[id(norm.result)]
        result.shape = source.shape
        return result


def emit_attention(writer: GraphWriter, attention: Attention, frozen: IntegerMaps | None) -> gs.Tensor:
    """The merged heads `[B, N, H·d]` of `attention` in canonical form, live heads first, then the frozen ones.

    Nothing of the original is removed or rewired: that is the caller's.
    """
    batch, tokens, head_dim = writer.batch, attention.tokens, attention.head_dim
    frozen_heads = list(frozen.heads) if frozen else []
    live_heads = [head for head in range(attention.heads) if head not in frozen_heads]
    contexts = []
    if live_heads:
        contexts.append(_live_context(writer, attention, live_heads))
    if frozen:
        values = _project(writer, "v_frozen", attention, attention.value, frozen_heads)
        contexts.append(writer.node("context_frozen", "MatMul", [emit_maps(writer, frozen), values], values.shape))
    context = contexts[0]
    if len(contexts) == 2:
        context = writer.node("heads", "Concat", contexts, [batch, attention.heads, tokens, head_dim], axis=1)
    by_token = [batch, tokens, attention.heads, head_dim]
    transposed = writer.node("tokens_first", "Transpose", [context], by_token, perm=[0, 2, 1, 3])
    width = attention.heads * head_dim
    shape = writer.integers("merged_shape", 0, 0, width)
    return writer.node("merged", "Reshape", [transposed, shape], [batch, tokens, width])


def emit_maps(writer: GraphWriter, frozen: IntegerMaps) -> gs.Tensor:
    """The frozen maps, float32 `[F, N, N]`, dequantized from an integer constant with one scale per row."""
    count, rows, columns = frozen.integers.shape
    flat = frozen.integers.reshape(count * rows, columns)
    quantized = [
        writer.constant("map_integers", flat),
        writer.constant("map_scales", frozen.scales.reshape(-1)),
        writer.constant("map_zero_points", np.zeros(count * rows, dtype=flat.dtype)),
    ]
    values = writer.node("map_rows", "DequantizeLinear", quantized, [count * rows, columns], axis=0)
    shape = writer.integers("map_shape", count, rows, columns)
    return writer.node("map", "Reshape", [values, shape], [count, rows, columns])


def is_canonical(attention: Attention) -> bool:
    """Whether `attention` already has the form that `emit_attention` writes for live heads."""
    keys = _SPLIT_HEADS if attention.key_norm is None else (*_SPLIT_HEADS, "Transpose")
    return attention.layout == (_SPLIT_HEADS, keys, _SPLIT_HEADS)


def _live_context(writer: GraphWriter, attention: Attention, live: list[int]) -> gs.Variable:
    """softmax(s·q·kᵀ)·v of the live heads, `[B, L, N, d]`."""
    query = _project(writer, "q", attention, attention.query, live)
    if attention.query_norm is not None:
        query = writer.copy_norm("q_norm", attention.query_norm, query)
    scale = writer.constant("scale", np.array(attention.scale, dtype=np.float32))
    scaled = writer.node("q_scaled", "Mul", [query, scale], query.shape)
    keys = _transposed_keys(writer, attention, live)
    scores_shape = [writer.batch, len(live), attention.tokens, attention.tokens]
    scores = writer.node("scores", "MatMul", [scaled, keys], scores_shape)
    live_map = writer.node("softmax", "Softmax", [scores], scores_shape, axis=-1)
    values = _project(writer, "v", attention, attention.value, live)
    return writer.node("context", "MatMul", [live_map, values], values.shape)


def _transposed_keys(writer: GraphWriter, attention: Attention, live: list[int]) -> gs.Tensor:
    """Keys as `[B, L, d, N]`; with a norm, which wants d last, one more transpose."""
    if attention.key_norm is None:
        return _project(writer, "k", attention, attention.key, live, perm=(0, 2, 3, 1))
    normed = writer.copy_norm("k_norm", attention.key_norm, _project(writer, "k", attention, attention.key, live))
    shape = [writer.batch, len(live), attention.head_dim, attention.tokens]
    return writer.node("k_transposed_again", "Transpose", [normed], shape, perm=[0, 1, 3, 2])


def _project(
    writer: GraphWriter,
    name: str,
    attention: Attention,
    projection: Projection,
    heads: list[int],
    perm: tuple[int, ...] = (0, 2, 1, 3),
) -> gs.Variable:
    """x·W + b of `heads` as `[B, heads, N, d]`, or in another order of the axes B, N, heads, d by `perm`."""
    chosen = projection.take(heads)
    width, head_dim = len(heads) * attention.head_dim, attention.head_dim
    flat = [writer.batch, attention.tokens, width]
    weight = writer.constant(f"{name}_weight", chosen.weight.reshape(-1, width))
    result = writer.node(name, "MatMul", [attention.x, weight], flat)
    if chosen.bias is not None:
        bias = writer.constant(f"{name}_bias", chosen.bias.reshape(width))
        result = writer.node(f"{name}_biased", "Add", [result, bias], flat)
    split = [writer.batch, attention.tokens, len(heads), head_dim]
    shape = writer.integers(f"{name}_shape", 0, 0, len(heads), head_dim)
    by_token = writer.node(f"{name}_heads", "Reshape", [result, shape], split)
    return writer.node(f"{name}_transposed", "Transpose", [by_token], [split[axis] for axis in perm], perm=list(perm))
