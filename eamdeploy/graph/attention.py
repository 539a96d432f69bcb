"""Find multi-head self-attention in an ONNX graph by its structure, never by names.

    x ──MatMul Wq──(+bq)──layout──[norm]──layout──(·s)──┐
    x ──MatMul Wk──(+bk)──layout──[norm]──layout──(·s)──MatMul──(·s)──(+bias, mask)──Softmax──┐
    x ──MatMul Wv──(+bv)──layout────────────────────────────────────────────────────────────MatMul──layout──▶ merged

and `merged` feeds a MatMul with the constant Wo. Wq, Wk and Wv may be one matrix; or Wq reads a Gather of some tokens
of x, and only these have rows in the map. A layout is any chain of reshapes,
transposes, splits, slices and gathers; what it permutes is read off by `layout.probe`, and so are bias and mask: both
of torch's exporters, with a fixed or a dynamic batch, look the same. With windows, x holds W windows of each image as
if they were images: `[B·W, N, D]`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.layout import LAYOUT_OPS, Origin, Probe, probe
from eamdeploy.graph.operand import (
    Linear,
    Norm,
    Operand,
    follow_operand,
    follow_scores,
    is_matrix,
    only_consumer,
)
from eamdeploy.graph.running import PROBE_BATCH, images_of
from eamdeploy.graph.skip import Refused, Skip, collect
from eamdeploy.graph.tokens import token_gather


@dataclass(frozen=True, eq=False)
class Projection:
    """One of the three linear layers in front of attention, head by head.

    Attributes:
        weight: float32 `[D, H, d]`, so that q[h] = x · weight[:, h].
        bias: float32 `[H, d]`, or None.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None

    def take(self, heads: list[int]) -> Projection:
        """The projection of `heads` alone, in that order."""
        return Projection(self.weight[:, heads], None if self.bias is None else self.bias[heads])


@dataclass(frozen=True, eq=False)
class ScoreBias:
    """What is added to the scores before the softmax: a position bias, a mask, or both.

    Attributes:
        values: float32 `[K, H, R, N]`, one for each kind of window; R is N, or the number of tokens with a query.
        kinds: which of the K each of an image's W windows uses.
    """

    values: NDArray[np.float32]
    kinds: tuple[int, ...]

    def take(self, heads: list[int]) -> ScoreBias:
        """The bias of `heads` alone, in that order."""
        return ScoreBias(self.values[:, heads], self.kinds)

    def of_rows(self, rows: Sequence[int]) -> ScoreBias:
        """The bias of these rows of the map alone, in that order."""
        return ScoreBias(self.values[:, :, rows], self.kinds)


@dataclass(frozen=True, eq=False)
class Attention:
    """One self-attention found in a graph.

    Attributes:
        x: its input `[B·W, N, D]`.
        windows: W, the number of windows of an image; 1 where there are none.
        query, key, value: the projections, with heads in the order of the graph.
        query_norm, key_norm: per-head norms between projection and product, or None.
        scale: what the scores are multiplied with before the softmax.
        bias: what is added to them after that, or None.
        heads, tokens, head_dim: H, N and d.
        query_tokens: the R tokens that have a query, and so a row in the map and in the output; None for all N.
        merged: the output `[B·W, R, H·d]`, heads side by side, in front of the output projection.
        projection: the MatMul of `merged` with the constant output projection `[H·d, D]`.
        softmax: the node that all this was found around.
        layout: operators between the linear layers and the products: those of queries, of keys, of values.
        score_layout: operators between the product of queries and keys and the softmax.
    """

    x: gs.Tensor
    windows: int
    query: Projection
    key: Projection
    value: Projection
    query_norm: Norm | None
    key_norm: Norm | None
    scale: float
    bias: ScoreBias | None
    heads: int
    tokens: int
    head_dim: int
    query_tokens: tuple[int, ...] | None
    merged: gs.Tensor
    projection: gs.Node
    softmax: gs.Node
    layout: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    score_layout: tuple[str, ...]

    @property
    def rows(self) -> int:
        """R, the rows of each map."""
        return self.tokens if self.query_tokens is None else len(self.query_tokens)


@dataclass(frozen=True, eq=False)
class _Candidate:
    """All tensors around one softmax, before the layouts between them are proved; `product` is q·kᵀ."""

    softmax: gs.Node
    product: gs.Tensor
    query: Operand
    key: Operand
    value: Operand
    query_tokens: tuple[int, ...] | None
    scale: float
    score_layout: tuple[str, ...]
    context: gs.Tensor
    merged: gs.Tensor
    projection: gs.Node


def find_attention(graph: gs.Graph) -> list[Attention | Skip]:
    """Every softmax of `graph`, in topological order: an `Attention`, or a `Skip` that says why it is none.

    Raises:
        UnsupportedGraph: the layouts can't be probed.
    """
    found = collect([node for node in graph.nodes if node.op == "Softmax"], _candidate)
    candidates = [c for c in found if isinstance(c, _Candidate)]
    if not candidates:
        return [skip for skip in found if isinstance(skip, Skip)]
    origins = _probe_all(graph, candidates)
    images = images_of(graph) or PROBE_BATCH
    return collect(found, partial(_attention, origins=origins, images=images))


def _candidate(softmax: gs.Node) -> _Candidate:
    """The tensors around `softmax`, by walking the graph only."""
    rank = len(softmax.outputs[0].shape or softmax.inputs[0].shape or ())
    if softmax.attrs.get("axis", -1) not in (-1, rank - 1):
        raise Refused(f"softmax over axis {softmax.attrs.get('axis')}, not over the keys", softmax)
    product, scale, score_layout = follow_scores(softmax)
    query, key = (follow_operand(tensor, product) for tensor in product.inputs)
    context_product = only_consumer(softmax.outputs[0], softmax)
    if context_product.op != "MatMul" or context_product.inputs[0] is not softmax.outputs[0]:
        raise Refused(f"the map feeds {context_product.op}, not a product with values", softmax)
    value = follow_operand(context_product.inputs[1], context_product)
    if value.norm is not None or value.scale != 1.0:
        raise Refused("values are normalized or scaled", softmax)
    x = key.linear.x
    query_tokens = None if query.linear.x is x else _gathered_from(x, query.linear.x)
    if value.linear.x is not x or (query.linear.x is not x and query_tokens is None):
        raise Refused("queries, keys and values have different inputs (cross-attention)", softmax)
    context = context_product.outputs[0]
    merged = context
    node = only_consumer(merged, context_product)
    while node.op in LAYOUT_OPS:
        merged = node.outputs[0]
        node = only_consumer(merged, node)
    if merged is context:
        raise Refused("heads are not merged behind the product with values", softmax)
    if node.op != "MatMul" or not is_matrix(node.inputs[1]):
        raise Refused(f"the merged heads feed {node.op}, not a constant output projection", softmax)
    return _Candidate(
        softmax, product.outputs[0], query, key, value, query_tokens, scale, score_layout, context, merged, node
    )


def _gathered_from(x: gs.Tensor, some: gs.Tensor) -> tuple[int, ...] | None:
    """Which tokens of `x` a Gather puts in `some`; None where there is no such Gather."""
    gather = token_gather(some.inputs[0]) if len(some.inputs) == 1 else None
    if gather is None or gather.node.inputs[0] is not x or (gather.indices < 0).any():
        return None
    return tuple(gather.indices.tolist())


def _probe_all(graph: gs.Graph, candidates: list[_Candidate]) -> dict[str, Origin]:
    """The origin of every operand, norm input and merged output, by the target's name."""
    probes = {segment.target.name: segment for candidate in candidates for segment in _segments(candidate)}
    return dict(zip(probes, probe(graph, list(probes.values())), strict=True))


def _segments(candidate: _Candidate) -> Iterator[Probe]:
    """Every layout chain of `candidate`."""
    for operand in (candidate.query, candidate.key, candidate.value):
        if operand.norm is None:
            yield Probe(operand.linear.out, operand.tensor, operand.scale)
        else:
            yield Probe(operand.linear.out, operand.norm.source)
            yield Probe(operand.norm.result, operand.tensor, operand.scale)
    if candidate.product is not candidate.softmax.inputs[0]:
        yield Probe(candidate.product, candidate.softmax.inputs[0], candidate.scale)
    yield Probe(candidate.context, candidate.merged)


def _attention(candidate: _Candidate, origins: dict[str, Origin], images: int) -> Attention:
    """The proved `Attention`; every layout must be the one self-attention needs."""
    query = _head_columns(candidate, candidate.query, origins, transposed=False)
    key = _head_columns(candidate, candidate.key, origins, transposed=True)
    value = _head_columns(candidate, candidate.value, origins, transposed=False)
    if not query.shape == key.shape == value.shape:
        raise Refused("queries, keys and values differ in heads or size", candidate.softmax)
    batch, heads, rows, head_dim = origins[candidate.query.tensor.name].row.shape
    if batch % images:
        raise Refused(f"{batch} maps of each head are no whole number of windows per image", candidate.softmax)
    b, n, h, j = np.ogrid[:batch, :rows, :heads, :head_dim]
    merged = origins[candidate.merged.name]
    row, column = (
        np.broadcast_to(numbers, (batch, rows, heads, head_dim)).reshape(batch, rows, heads * head_dim)
        for numbers in ((b * heads + h) * rows + n, j)
    )
    if not (np.array_equal(merged.row, row) and np.array_equal(merged.column, column)):
        raise Refused("heads are not merged side by side, token by token", candidate.softmax)
    return Attention(
        x=candidate.key.linear.x,
        windows=batch // images,
        query=_project(candidate.query.linear, query),
        key=_project(candidate.key.linear, key),
        value=_project(candidate.value.linear, value),
        query_norm=candidate.query.norm,
        key_norm=candidate.key.norm,
        scale=candidate.scale * candidate.query.scale * candidate.key.scale,
        bias=_score_bias(candidate, origins, images),
        heads=heads,
        tokens=origins[candidate.key.tensor.name].row.shape[-1],
        head_dim=head_dim,
        query_tokens=candidate.query_tokens,
        merged=candidate.merged,
        projection=candidate.projection,
        softmax=candidate.softmax,
        layout=(candidate.query.layout, candidate.key.layout, candidate.value.layout),
        score_layout=candidate.score_layout,
    )


def _score_bias(candidate: _Candidate, origins: dict[str, Origin], images: int) -> ScoreBias | None:
    """What is added to the scores between their product and the softmax.

    Raises:
        Refused: scores change places on the way, or the images of a batch get different biases.
    """
    if candidate.product is candidate.softmax.inputs[0]:
        return None
    origin = origins[candidate.softmax.inputs[0].name]
    shape = origin.source_shape
    if not np.isfinite(origin.offset).all():
        raise Refused("its bias or mask is not finite", candidate.softmax)
    row, column = np.divmod(np.arange(np.prod(shape)).reshape(shape), shape[-1])
    if not (np.array_equal(origin.row, row) and np.array_equal(origin.column, column)):
        raise Refused("scores change places in front of the softmax", candidate.softmax)
    offset = origin.offset.reshape(images, shape[0] // images, *shape[1:])
    if not offset.any():
        return None
    if (offset != offset[:1]).any():
        raise Refused("the images of a batch get different biases or masks", candidate.softmax)
    values, kinds = distinct(offset[0])
    return ScoreBias(values, kinds)


def _head_columns(
    candidate: _Candidate, operand: Operand, origins: dict[str, Origin], *, transposed: bool
) -> NDArray[np.int32]:
    """`[H, d]`: which column of the linear layer each head's vector is made of.

    Raises:
        Refused: the operand is not `[B, H, N, d]` (keys: `[B, H, d, N]`) with every token in its own place.
    """
    origin = origins[operand.tensor.name]
    if origin.row.ndim != 4:
        raise Refused(f"an operand of the product has {origin.row.ndim} dimensions, not 4", candidate.softmax)
    axes = (0, 1, 3, 2) if transposed else (0, 1, 2, 3)
    row, column = origin.row.transpose(axes), origin.column.transpose(axes)
    batch, heads, tokens, head_dim = row.shape
    b, h, n, j = np.ogrid[:batch, :heads, :tokens, :head_dim]
    if operand.norm is not None:
        if not (_equal(row, (b * heads + h) * tokens + n) and _equal(column, j)):
            raise Refused("heads or tokens change places behind the norm", candidate.softmax)
        origin = origins[operand.norm.source.name]
        row, column = origin.row, origin.column
        if row.shape != (batch, heads, tokens, head_dim):
            raise Refused("a norm works on another shape than the product", candidate.softmax)
    if origin.source_shape[:-1] != (batch, tokens):
        reason = f"a linear layer writes {list(origin.source_shape)}, the product reads {batch} × {tokens} tokens"
        raise Refused(reason, candidate.softmax)
    columns: NDArray[np.int32] = column[0, :, 0, :]
    if not (_equal(row, b * tokens + n) and _equal(column, columns[:, None, :])):
        raise Refused("tokens or images are mixed in front of the product", candidate.softmax)
    return columns


def _equal(numbers: NDArray[np.int32], expected: NDArray[np.integer]) -> bool:
    """Whether `numbers` holds `expected`, broadcast to its shape."""
    return np.array_equal(numbers, np.broadcast_to(expected, numbers.shape))


def _project(linear: Linear, columns: NDArray[np.int32]) -> Projection:
    return Projection(linear.weight[:, columns], None if linear.bias is None else linear.bias[columns])


def distinct(arrays: NDArray[np.float32]) -> tuple[NDArray[np.float32], tuple[int, ...]]:
    """The different ones among `arrays` `[W, …]` in order of appearance `[K, …]`, and for each of the W its number."""
    numbers: dict[bytes, int] = {}
    kinds = tuple(numbers.setdefault(array.tobytes(), len(numbers)) for array in arrays)
    return arrays[[kinds.index(kind) for kind in range(len(numbers))]], kinds
