"""Write multi-head attention into a graph in one canonical form that runtimes fuse.

    x ──MatMul [D, (L+L+H)·d]──Add──Split──┬─ q ─Reshape─Transpose─[norm]─Mul s──┐
                                           ├─ k ─Reshape─Transpose─[norm]────────MatMul──Softmax──┐
                                           ├─ v of live heads ─Reshape─Transpose────────────────MatMul ─────┐
                                           └─ v of frozen heads ─Reshape─Transpose──┐                      Concat ─┐
                    frozen maps (integers) ──DequantizeLinear──Reshape [F,N,N]────MatMul ───────────────────┘      │
                                                               merged [B, N, H·d] ◀──Reshape──Transpose────────────┘

Four dimensions at most, one standard attention over the live heads, one batched product over the frozen ones
(DESIGN §4, §5.7). Batch and token dimensions are taken over by `Reshape`'s 0, so a dynamic batch needs no arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.attention import Attention, Norm, Projection

Shape: TypeAlias = list[int | str]

_SPLIT_HEADS = ("Split", "Reshape", "Transpose")


@dataclass(frozen=True)
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
        return self.nodes(name, op, inputs, [shape], **attributes)[0]

    def nodes(
        self, name: str, op: str, inputs: Sequence[gs.Tensor], shapes: Sequence[Shape | None], **attributes: object
    ) -> list[gs.Variable]:
        """All float32 outputs, of `shapes`, of a new node."""
        full = f"{self._prefix}/{name}"
        names = [full] if len(shapes) == 1 else [f"{full}.{i}" for i in range(len(shapes))]
        results = [gs.Variable(n, np.float32, shape) for n, shape in zip(names, shapes, strict=True)]
        self._graph.nodes.append(
            gs.Node(op=op, name=full, attrs=dict(attributes), inputs=list(inputs), outputs=results)
        )
        return results

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
    parts: dict[str, Projection] = {}
    if live_heads:
        parts["q"] = attention.query.take(live_heads)
        parts["k"] = attention.key.take(live_heads)
        parts["v"] = attention.value.take(live_heads)
    if frozen_heads:
        parts["v_frozen"] = attention.value.take(frozen_heads)
    projected = _project(writer, attention, parts)
    contexts = []
    if live_heads:
        contexts.append(_live_context(writer, attention, projected, len(live_heads)))
    if frozen:
        values = _split_heads(writer, "v_frozen", projected["v_frozen"], attention, len(frozen_heads))
        operands = [emit_maps(writer, frozen), values]
        contexts.append(writer.node("context_frozen", "MatMul", operands, values.shape))
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


def _project(writer: GraphWriter, attention: Attention, parts: Mapping[str, Projection]) -> dict[str, gs.Variable]:
    """One linear layer for all `parts`, split into one `[B, N, heads·d]` per part."""
    batch, tokens = writer.batch, attention.tokens
    width = attention.query.weight.shape[0]
    weights = [part.weight.reshape(width, -1) for part in parts.values()]
    sizes = [weight.shape[1] for weight in weights]
    full = [batch, tokens, sum(sizes)]
    weight = writer.constant("qkv_weight", np.concatenate(weights, axis=1))
    result = writer.node("qkv", "MatMul", [attention.x, weight], full)
    if any(part.bias is not None for part in parts.values()):
        biases = [
            np.zeros(size, np.float32) if part.bias is None else part.bias.reshape(-1)
            for size, part in zip(sizes, parts.values(), strict=True)
        ]
        bias = writer.constant("qkv_bias", np.concatenate(biases))
        result = writer.node("qkv_biased", "Add", [result, bias], full)
    if len(parts) == 1:
        return {name: result for name in parts}
    shapes = [[batch, tokens, size] for size in sizes]
    split = writer.nodes("qkv_split", "Split", [result, writer.integers("qkv_sizes", *sizes)], shapes, axis=2)
    return dict(zip(parts, split, strict=True))


def _live_context(
    writer: GraphWriter, attention: Attention, projected: Mapping[str, gs.Variable], live: int
) -> gs.Variable:
    """softmax(s·q·kᵀ)·v of the live heads, `[B, L, N, d]`."""
    batch, tokens = writer.batch, attention.tokens
    query = _split_heads(writer, "q", projected["q"], attention, live)
    if attention.query_norm is not None:
        query = writer.copy_norm("q_norm", attention.query_norm, query)
    scale = writer.constant("scale", np.array(attention.scale, dtype=np.float32))
    scaled = writer.node("q_scaled", "Mul", [query, scale], query.shape)
    keys = _transposed_keys(writer, projected["k"], attention, live)
    scores = writer.node("scores", "MatMul", [scaled, keys], [batch, live, tokens, tokens])
    live_map = writer.node("softmax", "Softmax", [scores], scores.shape, axis=-1)
    values = _split_heads(writer, "v", projected["v"], attention, live)
    return writer.node("context", "MatMul", [live_map, values], values.shape)


def _transposed_keys(writer: GraphWriter, tensor: gs.Tensor, attention: Attention, live: int) -> gs.Tensor:
    """Keys as `[B, L, d, N]`; with a norm, which wants d last, one more transpose."""
    if attention.key_norm is None:
        return _split_heads(writer, "k", tensor, attention, live, perm=(0, 2, 3, 1))
    normed = writer.copy_norm("k_norm", attention.key_norm, _split_heads(writer, "k", tensor, attention, live))
    shape = [normed.shape[0], live, attention.head_dim, attention.tokens]
    return writer.node("k_transposed_again", "Transpose", [normed], shape, perm=[0, 1, 3, 2])


def _split_heads(
    writer: GraphWriter,
    name: str,
    tensor: gs.Tensor,
    attention: Attention,
    heads: int,
    perm: tuple[int, ...] = (0, 2, 1, 3),
) -> gs.Variable:
    """`[B, N, heads·d]` as `[B, heads, N, d]`, or in another order of the axes B, N, heads, d by `perm`."""
    split = [writer.batch, attention.tokens, heads, attention.head_dim]
    shape = writer.integers(f"{name}_shape", 0, 0, heads, attention.head_dim)
    by_token = writer.node(f"{name}_heads", "Reshape", [tensor, shape], split)
    return writer.node(f"{name}_transposed", "Transpose", [by_token], [split[axis] for axis in perm], perm=list(perm))
