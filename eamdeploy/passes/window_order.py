"""A whole block in the order of its windows: the residual is gathered, not the branch, and the norm once.

Before:  y = x + R(f(P(g(x))))       P partitions into windows, R = P⁻¹; g the norm, f attention with its projection
After:   y = R(P(x) + f(g(P(x))))
Shapes:  x [B,…,C] of T tokens  P, R permutations of T
Needs:   P and R are Gathers of tokens and inverse to each other; g is token by token and read by P alone
Exact:   bit for bit: g and the sum treat every token alike; a norm spelled with ReduceMean (opset 16) may round
         differently, as ONNX Runtime adds in an order that depends on the token's place (tolerance f32-reassoc)
Source:  the order of tokens matters to attention and patch merging only; `merge_gathers` lets R meet the next P
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from eamdeploy.graph.nodes import bypass, redirect
from eamdeploy.graph.skip import Refused, Skip, collect
from eamdeploy.graph.tokens import TokenGather, behind_views, is_tokenwise, is_view, token_gather
from eamdeploy.graph.writer import GraphWriter


@dataclass(frozen=True, eq=False)
class _Match:
    """Attributes are named as in the module's docstring; `norm` are the nodes of g."""

    x: gs.Tensor
    norm: tuple[gs.Node, ...]
    partition: TokenGather
    reverse: TokenGather
    add: gs.Node
    branch: int


class WindowOrder:
    """Moves partition and reverse out of every window block."""

    name = "window_order"

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """Every residual sum whose one side comes from a gather of tokens."""
        places = [
            (node, branch, reverse)
            for node in graph.nodes
            if node.op == "Add"
            for branch in (0, 1)
            if (reverse := _gather_behind(node.inputs[branch])) is not None
        ]
        return collect(places, lambda place: _match(graph, *place))

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """x is gathered once, in front of the norm and the sum; the sum's readers read it gathered back."""
        # not the matched x: it may have been the y of the match before, which is read gathered back since
        x, y = match.add.inputs[1 - match.branch], match.add.outputs[0]
        flat = (-1, match.partition.tokens, x.shape[-1])
        readers = list(y.outputs)

        def gathered(name: str, tensor: gs.Tensor, gather: TokenGather) -> gs.Tensor:
            writer = GraphWriter(graph, f"{y.name}/{name}")  # blocks may share x
            tokens = writer.reshape("flat", tensor, flat)
            moved = writer.gather("moved", tokens, gather.indices, axis=1, shape=[None, *flat[1:]])
            return writer.reshape("shaped", moved, (-1, *x.shape[1:]))

        in_windows = gathered("in_windows", x, match.partition)
        redirect(x, in_windows, (*match.norm, match.add))
        for gather in (match.partition, match.reverse):
            bypass(gather.node)
        redirect(y, gathered("back", y, match.reverse), readers)


def _gather_behind(tensor: gs.Tensor) -> TokenGather | None:
    tensor = behind_views(tensor)
    return token_gather(tensor.inputs[0]) if len(tensor.inputs) == 1 else None


def _match(graph: gs.Graph, add: gs.Node, branch: int, reverse: TokenGather) -> _Match:
    x = add.inputs[1 - branch]
    if not isinstance(x, gs.Variable) or not x.shape or not all(isinstance(size, int) for size in x.shape[1:]):
        raise Refused("the residual is a constant or has no known shape", add)
    if add.outputs[0].shape is None or list(add.outputs[0].shape[1:]) != list(x.shape[1:]):
        raise Refused("the sum has another shape than the residual", add)
    if not reverse.is_permutation:
        raise Refused("the windows do not divide the image", reverse.node)
    if not _only_read_by(reverse.node.outputs[0], add):
        raise Refused("something else reads the reversed windows", reverse.node)
    inverse = np.argsort(reverse.indices)
    partitions = [
        gather
        for node in graph.nodes
        if (gather := token_gather(node)) is not None
        and np.array_equal(gather.indices, inverse)
        and gather.tokens == reverse.tokens
    ]
    for partition in partitions:
        norm = _norm_between(x, partition.node)
        if norm is not None:
            return _Match(x, norm, partition, reverse, add, branch)
    raise Refused("nothing partitions the normalized residual into the same windows", add)


def _only_read_by(tensor: gs.Tensor, add: gs.Node) -> bool:
    """Whether `tensor`, through views of it, is read by `add` and by nothing else."""
    while len(tensor.outputs) == 1 and is_view(tensor.outputs[0]):
        tensor = tensor.outputs[0].outputs[0]
    return len(tensor.outputs) == 1 and tensor.outputs[0] is add


def _norm_between(x: gs.Tensor, gather: gs.Node) -> tuple[gs.Node, ...] | None:
    """The token by token nodes between `x` and `gather`, which nothing else reads; None if there are others."""
    nodes: dict[int, gs.Node] = {}
    pending = [gather.inputs[0]]
    while pending:
        tensor = pending.pop()
        if tensor is x or isinstance(tensor, gs.Constant):
            continue
        node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if node is None or not is_tokenwise(node):
            return None
        if id(node) not in nodes:
            nodes[id(node)] = node
            pending.extend(node.inputs)
    inside = {*nodes, id(gather)}
    results = [tensor for node in nodes.values() for tensor in node.outputs]
    if not nodes or any(id(reader) not in inside for tensor in results for reader in tensor.outputs):
        return None
    return tuple(nodes.values())
