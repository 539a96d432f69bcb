"""Live attention as one MultiHeadAttention, an operator of ONNX Runtime's own that no other runtime knows.

Before:  q ─Reshape─Transpose──┐
         k ─Reshape─Transpose──MatMul──(bias)──Softmax──┐
         v ─Reshape─Transpose───────────────────────────MatMul─(Concat with other heads)─Transpose─Reshape──▶ merged
After:   q, k, v, (bias) ──MultiHeadAttention──(Concat with other heads, each transposed by itself)──▶ merged
Shapes:  q [B·W, R, L·d]  k, v [B·W, N, L·d]  merged [B·W, R, H·d]
Needs:   the canonical form of `graph.emit`, without a norm of queries or keys; a bias [1, 1 or L, R, N], or one for
         each window [W, 1 or L, R, N] where the model takes one image at a time
Exact:   the same function; another order of the sums
Source:  ONNX Runtime's ContribOperators.md, com.microsoft.MultiHeadAttention. Queries hold the scale already, so its
         own is 1. What it saves on a CPU are the transpositions, and scores that never leave the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import onnx
import onnx_graphsurgeon as gs

from eamdeploy.graph.operand import only_consumer, producer
from eamdeploy.graph.running import images_of
from eamdeploy.graph.skip import Refused, Skip, collect
from eamdeploy.graph.writer import GraphWriter

DOMAIN, OPERATOR = "com.microsoft", "MultiHeadAttention"
_TOKENS_FIRST = [0, 2, 1, 3]
_KEYS_TRANSPOSED = [0, 2, 3, 1]
_HEADS, _WIDTH = 1, 2  # axes of [B·W, H, R, d] and of [B·W, R, H·d]


@dataclass(frozen=True, eq=False)
class LiveAttention:
    """One live attention in canonical form.

    Attributes:
        queries, keys, values: what its linear layers give, [B·W, R or N, L·d].
        heads: L.
        bias: added to the scores, as MultiHeadAttention takes it; None for none.
        context: of the live heads, [B·W, L, R, d].
        groups: contexts of all heads in their order, `context` among them.
        merged: the heads side by side, [B·W, R, H·d].
    """

    softmax: gs.Node
    queries: gs.Tensor
    keys: gs.Tensor
    values: gs.Tensor
    heads: int
    bias: gs.Tensor | None
    context: gs.Tensor
    groups: tuple[gs.Tensor, ...]
    merged: gs.Tensor


class FusedAttention:
    """Live attention in ONNX Runtime's own operator."""

    name = "fused_attention"

    def match(self, graph: gs.Graph) -> list[LiveAttention | Skip]:
        """Every softmax of `graph`."""
        softmaxes = [node for node in graph.nodes if node.op == "Softmax"]
        return collect(softmaxes, partial(_live_attention, graph))

    def rewrite(self, graph: gs.Graph, match: LiveAttention) -> None:
        """The merged heads are the operator's output, beside the heads of other groups."""
        writer = GraphWriter(graph, f"{match.softmax.name}/{self.name}")
        inputs = [match.queries, match.keys, match.values]
        if match.bias is not None:
            nothing = gs.Variable.empty()  # neither projection biases nor padding
            inputs += [nothing, nothing, match.bias]
        head_dim = match.context.shape[3]
        shape = [*match.queries.shape[:2], match.heads * head_dim]
        live = writer.node("live", OPERATOR, inputs, shape, domain=DOMAIN, num_heads=match.heads, scale=1.0)
        parts = [live if group is match.context else _by_token(writer, group) for group in match.groups]
        if len(parts) > 1:
            live = writer.node("merged", "Concat", parts, match.merged.shape, axis=_WIDTH)
        match.merged.inputs.clear()  # the tensor keeps its name, by which its range is known
        live.inputs[0].outputs = [match.merged]
        if all(opset.domain != DOMAIN for opset in graph.import_domains):
            graph.import_domains.append(onnx.helper.make_opsetid(DOMAIN, 1))


def _by_token(writer: GraphWriter, group: gs.Tensor) -> gs.Variable:
    """Context [B·W, F, R, d] as [B·W, R, F·d]."""
    batch, heads, rows, head_dim = group.shape
    name = group.name.rpartition("/")[2]
    transposed = writer.node(
        f"{name}_tokens_first", "Transpose", [group], [batch, rows, heads, head_dim], perm=_TOKENS_FIRST
    )
    return writer.reshape(f"{name}_merged", transposed, (0, 0, heads * head_dim), leading=batch)


def _live_attention(graph: gs.Graph, softmax: gs.Node) -> LiveAttention:
    scores, bias = _without_bias(graph, producer(softmax.inputs[0], softmax))
    _demand(scores.op == "MatMul", "its scores are no product of queries and keys", scores)
    queries, heads = _heads_of(scores.inputs[0], _TOKENS_FIRST, scores)
    keys, key_heads = _heads_of(scores.inputs[1], _KEYS_TRANSPOSED, scores)
    apply = only_consumer(softmax.outputs[0], softmax)
    _demand(apply.op == "MatMul" and apply.inputs[0] is softmax.outputs[0], "its maps are not multiplied", softmax)
    values, value_heads = _heads_of(apply.inputs[1], _TOKENS_FIRST, apply)
    _demand(heads == key_heads == value_heads, "queries, keys and values have different heads", softmax)
    context = apply.outputs[0]
    groups: tuple[gs.Tensor, ...] = (context,)
    transpose = only_consumer(apply.outputs[0], apply)
    if transpose.op == "Concat":
        _demand(transpose.attrs.get("axis") == _HEADS, "heads are put together along another axis", transpose)
        groups, transpose = tuple(transpose.inputs), only_consumer(transpose.outputs[0], transpose)
    _demand(transpose.op == "Transpose" and transpose.attrs.get("perm") == _TOKENS_FIRST, "heads stay apart", transpose)
    merge = only_consumer(transpose.outputs[0], transpose)
    _demand(merge.op == "Reshape", "heads are not merged", merge)
    for group in groups:
        _demand(group.shape is not None and len(group.shape) == 4, "a context has no known shape", softmax)
    return LiveAttention(softmax, queries, keys, values, heads, bias, context, groups, merge.outputs[0])


def _without_bias(graph: gs.Graph, node: gs.Node) -> tuple[gs.Node, gs.Tensor | None]:
    """The product that `node` adds a constant to, and the constant; `node` itself where it adds none."""
    if node.op == "Reshape":  # as `graph.emit` writes [B, W, L, R, N] for a dynamic batch
        raise Refused("its windows have biases of their own, and the batch is not fixed to 1", node)
    if node.op != "Add":
        return node, None
    bias = _constant_operand(node)
    _demand(bias.shape is not None and len(bias.shape) == 4, "its bias is no constant of four dimensions", node)
    _demand(bias.shape[0] == 1 or images_of(graph) == 1, "its bias differs between images", node)
    return producer(_other(node, bias), node), bias


def _constant_operand(add: gs.Node) -> gs.Tensor:
    """A constant, or a Gather from constants."""
    for tensor in add.inputs:
        sources = [tensor] if isinstance(tensor, gs.Constant) or not tensor.inputs else tensor.inputs[0].inputs
        if all(isinstance(source, gs.Constant) for source in sources):
            return tensor
    raise Refused("what is added to its scores is computed from the image", add)


def _heads_of(tensor: gs.Tensor, perm: Sequence[int], reader: gs.Node) -> tuple[gs.Tensor, int]:
    """The linear layer's output that `tensor` has by heads, and how many heads."""
    transpose = producer(tensor, reader)
    _demand(
        transpose.op == "Transpose" and transpose.attrs.get("perm") == list(perm),
        "its heads are normalized or moved in another way",
        transpose,
    )
    reshape = producer(transpose.inputs[0], transpose)
    _demand(
        reshape.op == "Reshape" and isinstance(reshape.inputs[1], gs.Constant) and reshape.inputs[1].values.size == 4,
        "its heads are not split by a constant shape",
        reshape,
    )
    batch, tokens, heads, _ = map(int, reshape.inputs[1].values)
    _demand((batch, tokens) == (0, 0) and heads > 0, "its heads are not split from the channels alone", reshape)
    return reshape.inputs[0], heads


def _other(add: gs.Node, one: gs.Tensor) -> gs.Tensor:
    return add.inputs[1] if add.inputs[0] is one else add.inputs[0]


def _demand(holds: bool, reason: str, node: gs.Node) -> None:
    if not holds:
        raise Refused(reason, node)
