"""Tokens as rows: which nodes move whole tokens, and which treat every token alike.

A tensor `[…, C]` is seen as a list of tokens of C values each, image by image; a `Reshape` that keeps C does not change
that list (a *view*). `find_moves` reads off what chains of layout operators do to it, `is_tokenwise` says which
operators commute with any such move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.layout import LAYOUT_OPS, PADDING, Origin, Probe, probe
from eamdeploy.graph.nodes import reduced_axes
from eamdeploy.graph.running import PROBE_BATCH, images_of
from eamdeploy.graph.skip import Skip

_MOVES = LAYOUT_OPS | {"Concat", "Pad"}
_UNARY = frozenset({"Erf", "Gelu", "Identity", "Reciprocal", "Relu", "Sigmoid", "Sqrt", "Tanh"})
_BINARY = frozenset({"Add", "Div", "Mul", "Pow", "Sub"})
_PARTS = frozenset({"Slice", "Split"})


@dataclass(frozen=True, eq=False)
class TokenMove:
    """A chain of layout operators that moves whole tokens within each image.

    Attributes:
        source: `[…, C]`, T tokens per image.
        target: `[…]`, T' tokens of C values per image.
        tokens: T.
        indices: int64 `[T']`: which token of the source each one is, or `PADDING` for zeros.
        channels: C.
        source_shape, target_shape: the shapes without their first axis.
        ops: the operators of the chain, in no particular order.
    """

    source: gs.Tensor
    target: gs.Tensor
    tokens: int
    indices: NDArray[np.int64]
    channels: int
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    ops: tuple[str, ...]

    @property
    def is_identity(self) -> bool:
        """Whether every token stays where it is."""
        return np.array_equal(self.indices, np.arange(self.tokens))


def find_moves(graph: gs.Graph) -> list[TokenMove | Skip]:
    """Every chain of at least two layout operators, as long as it goes, between token by token computations.

    Chains behind a product of two variables, a convolution or an input are none of these: attention merges heads there.

    Raises:
        UnsupportedGraph: the chains can't be probed.
    """
    chains = list(_chains(graph))
    if not chains:
        return []
    origins = probe(graph, [Probe(source, target) for source, target, _ in chains])
    batch = images_of(graph) or PROBE_BATCH
    return [
        _move(source, target, ops, origin, batch) for (source, target, ops), origin in zip(chains, origins, strict=True)
    ]


def _chains(graph: gs.Graph) -> Iterator[tuple[gs.Tensor, gs.Tensor, tuple[str, ...]]]:
    for node in graph.nodes:
        if node.op not in _MOVES or len(node.outputs) != 1:
            continue
        target = node.outputs[0]
        if all(consumer.op in _MOVES for consumer in target.outputs):
            continue
        source, ops = _source(target)
        if source is not None and len(ops) > 1:
            yield source, target, ops


def _source(target: gs.Tensor) -> tuple[gs.Tensor | None, tuple[str, ...]]:
    """The one tensor that all layout operators behind `target` read, if it is computed token by token; their names."""
    nodes: dict[int, gs.Node] = {}
    sources: dict[int, gs.Tensor] = {}
    pending = [target]
    while pending:
        tensor = pending.pop()
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or node.op not in _MOVES:
            sources[id(tensor)] = tensor
        elif id(node) not in nodes:
            nodes[id(node)] = node
            pending.extend(node.inputs if node.op == "Concat" else node.inputs[:1])
    ops = tuple(node.op for node in nodes.values())
    source = next(iter(sources.values()))
    if len(sources) != 1 or len(source.inputs) != 1 or not is_tokenwise(source.inputs[0]):
        return None, ops
    return source, ops


def _move(source: gs.Tensor, target: gs.Tensor, ops: tuple[str, ...], origin: Origin, batch: int) -> TokenMove | Skip:
    node = target.inputs[0]
    if not all(isinstance(size, int) for tensor in (source, target) for size in (tensor.shape or [None, None])[1:]):
        return Skip("another axis than the first depends on the batch", node.name)
    *leading, channels = origin.source_shape
    tokens, rest = divmod(int(np.prod(leading)), batch)
    if rest or origin.row.shape[-1] % channels or origin.row.size % (batch * channels):
        return Skip(f"its chunks are no tokens of {channels} values", node.name)
    row, column = (numbers.reshape(batch, -1, channels) for numbers in (origin.row, origin.column))
    padded = row == PADDING
    first = np.where(padded, PADDING, row - tokens * np.arange(batch)[:, None, None])
    if origin.offset.any():
        return Skip("it pads with something else than zeros", node.name)
    if (padded != padded[:1, :, :1]).any() or (first != first[:1, :, :1]).any():
        return Skip("it moves parts of tokens, or between images", node.name)
    in_order = np.arange(channels)
    if (np.where(padded, in_order, column) != in_order).any():
        return Skip("it changes the order inside a token", node.name)
    return TokenMove(
        source=source,
        target=target,
        tokens=tokens,
        indices=first[0, :, 0].astype(np.int64),
        channels=channels,
        source_shape=origin.source_shape[1:],
        target_shape=origin.row.shape[1:],
        ops=ops,
    )


def is_tokenwise(node: gs.Node) -> bool:
    """Whether `node` computes each token of its output from the same token of its variable inputs alone."""
    variables = [tensor for tensor in node.inputs if isinstance(tensor, gs.Variable) and not tensor.is_empty()]
    constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    if node.op == "Reshape":
        return is_view(node)
    if node.op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"):
        return len(variables) == 1 and _is_last_axis(node.attrs.get("axis", -1), node.inputs[0])
    if node.op == "ReduceMean":
        axes = reduced_axes(node) or []
        return len(axes) == 1 and _is_last_axis(axes[0], node.inputs[0]) and node.attrs.get("keepdims", 1) == 1
    if node.op == "MatMul":
        return len(variables) == 1 and node.inputs[0] is variables[0] and node.inputs[1].values.ndim == 2
    if node.op in _PARTS:  # of a token's values, as gated MLPs take them
        axes = _divided_axes(node)
        return len(variables) == 1 and len(axes) == 1 and _is_last_axis(axes[0], node.inputs[0])
    if node.op in _BINARY:
        return all(tensor.values.ndim <= 1 for tensor in constants)
    return node.op in _UNARY


def is_view(node: gs.Node) -> bool:
    """Whether `node` is a Reshape to a constant shape that keeps the last axis, so that tokens stay tokens."""
    shape = node.inputs[1] if node.op == "Reshape" else None
    before = node.inputs[0].shape
    return isinstance(shape, gs.Constant) and bool(before) and int(shape.values[-1]) == before[-1]


def _divided_axes(node: gs.Node) -> list[int]:
    """The axes of which a Split or Slice makes parts; none where they are computed or not named."""
    if node.op == "Split":
        return [int(node.attrs.get("axis", 0))]
    named = node.inputs[3] if len(node.inputs) > 3 else None
    return named.values.tolist() if isinstance(named, gs.Constant) else []


def _is_last_axis(axis: int, tensor: gs.Tensor) -> bool:
    return axis == -1 or (bool(tensor.shape) and axis == len(tensor.shape) - 1)


@dataclass(frozen=True, eq=False)
class TokenGather:
    """A Gather of tokens along axis 1 of `[B, T, C]`.

    Attributes:
        indices: int64 `[T']`.
        tokens: T.
    """

    node: gs.Node
    indices: NDArray[np.int64]
    tokens: int

    @property
    def is_permutation(self) -> bool:
        """Whether every token of the input occurs once in the output."""
        return len(self.indices) == self.tokens and np.array_equal(np.sort(self.indices), np.arange(self.tokens))


def token_gather(node: gs.Node) -> TokenGather | None:
    """`node` as a gather of tokens, if it is one with constant indices."""
    shape = node.inputs[0].shape if node.op == "Gather" else None
    if not shape or len(shape) != 3 or not isinstance(shape[1], int) or node.attrs.get("axis", 0) != 1:
        return None
    indices = node.inputs[1]
    if not isinstance(indices, gs.Constant) or indices.values.ndim != 1:
        return None
    return TokenGather(node, indices.values.astype(np.int64), shape[1])


def behind_views(tensor: gs.Tensor) -> gs.Tensor:
    """What `tensor` is a view of."""
    while len(tensor.inputs) == 1 and is_view(tensor.inputs[0]):
        tensor = tensor.inputs[0].inputs[0]
    return tensor
