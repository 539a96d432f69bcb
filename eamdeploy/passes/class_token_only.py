"""A block for the tokens that are read behind it, not for all of them: the last one for those of the classifier.

The other blocks that have such tokens are Swin's with one window larger than the image, whose padding nobody reads.

Before:  y = x + softmax(q(n)·k(n)ᵀ)·v(n)·Wo ; z = f(y)[t]      n = norm(x), f: second norm, MLP, last norm
After:   y = x[t] + softmax(q(n[t])·k(n)ᵀ)·v(n)·Wo ; z = f(y)
Shapes:  x, n [B,N,D]  t: R of N tokens  map [B,H,R,N]  y [B,R,D]
Needs:   attention with queries of all tokens; every way from its output projection ends, through token by token
         computations of [B,N,…], in a Gather or Slice of constant tokens, at most half of them in all; what these
         computations read besides has all N tokens too
Exact:   bit for bit up to the kernels that a runtime chooses for other sizes (tolerance f32-reassoc)
Source:  docs/design.md, Class token only
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.attention import Attention, find_attention
from eamdeploy.graph.emit import rewrite_attention
from eamdeploy.graph.nodes import bypass, redirect
from eamdeploy.graph.skip import Refused, Skip, collect
from eamdeploy.graph.tokens import is_tokenwise
from eamdeploy.graph.writer import GraphWriter


@dataclass(frozen=True, eq=False)
class _Choice:
    """A Gather or Slice of `tokens`, an array of as many axes as it leaves of the axis of tokens."""

    node: gs.Node
    tokens: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Match:
    """An attention of which few tokens are read.

    Attributes:
        nodes: what computes token by token between attention and the choices, the output projection first.
        joined: what those read besides, `[B, N, …]` each.
        tokens: all that are chosen, ascending.
    """

    attention: Attention
    nodes: tuple[gs.Node, ...]
    joined: tuple[gs.Tensor, ...]
    choices: tuple[_Choice, ...]
    tokens: tuple[int, ...]


class ClassTokenOnly:
    """Computes of the last block what is read of it."""

    name = "class_token_only"

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """Every attention behind which few tokens are read; a `Skip` for the others, which are most."""
        return collect(find_attention(graph), _match)

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """Tokens are chosen in front of queries and where something joins them, no longer behind the last norm."""
        attention, tokens = match.attention, np.array(match.tokens)
        writer = GraphWriter(graph, f"{attention.projection.outputs[0].name}/{self.name}")
        for index, tensor in enumerate(match.joined):
            shape = [tensor.shape[0], len(tokens), tensor.shape[2]]
            redirect(tensor, writer.gather(f"joined.{index}", tensor, tokens, axis=1, shape=shape), match.nodes)
        bias = None if attention.bias is None else attention.bias.of_rows(match.tokens)
        rewrite_attention(graph, attention, replace(attention, query_tokens=match.tokens, bias=bias), self.name)
        for tensor in (tensor for node in match.nodes for tensor in node.outputs):
            tensor.shape = [tensor.shape[0], len(tokens), tensor.shape[2]]
        for choice in match.choices:
            places = np.searchsorted(tokens, choice.tokens)
            choice.node.op, choice.node.attrs = "Gather", {"axis": 1}
            name = f"{choice.node.outputs[0].name}/{self.name}"
            choice.node.inputs = [choice.node.inputs[0], gs.Constant(name, np.array(places, np.int64))]
            if np.array_equal(places, np.arange(len(tokens))):
                bypass(choice.node)


def _match(attention: Attention) -> _Match:
    projection = attention.projection
    if attention.query_tokens is not None:
        raise Refused("only some tokens have queries already", attention.softmax)
    nodes, choices = _until_chosen(projection, attention.tokens)
    tokens = np.unique(np.concatenate([choice.tokens.reshape(-1) for choice in choices]))
    if 2 * len(tokens) > attention.tokens:
        raise Refused(f"{len(tokens)} of {attention.tokens} tokens are read", projection)
    written = {id(tensor) for node in nodes for tensor in node.outputs}
    read = {id(tensor): tensor for node in nodes[1:] for tensor in node.inputs if isinstance(tensor, gs.Variable)}
    joined = tuple(tensor for key, tensor in read.items() if key not in written and not tensor.is_empty())
    for tensor in joined:
        if not _has_tokens(tensor, attention.tokens):
            raise Refused(f"{tensor.name}, which joins its tokens, has another shape", projection)
    return _Match(attention, nodes, joined, choices, tuple(tokens.tolist()))


def _until_chosen(projection: gs.Node, tokens: int) -> tuple[tuple[gs.Node, ...], tuple[_Choice, ...]]:
    """The nodes behind `projection`, itself among them, up to the choices of tokens in which every way ends.

    Raises:
        Refused: one ends elsewhere.
    """
    nodes = {id(projection): projection}
    choices: dict[int, _Choice] = {}
    pending = [projection]
    while pending:
        for tensor in pending.pop().outputs:
            if not _has_tokens(tensor, tokens):
                raise Refused(f"{tensor.name} behind it is no tensor of {tokens} tokens", projection)
            if not tensor.outputs:
                raise Refused("its tokens are an output of the graph", projection)
            for reader in tensor.outputs:
                chosen = _chosen(reader, tokens) if reader.inputs[0] is tensor else None
                if chosen is not None:
                    choices[id(reader)] = _Choice(reader, chosen)
                elif reader.op == "Reshape" or not is_tokenwise(reader):
                    raise Refused(f"all of its tokens matter to {reader.op}", projection)
                elif id(reader) not in nodes:
                    nodes[id(reader)] = reader
                    pending.append(reader)
    return tuple(nodes.values()), tuple(choices.values())


def _has_tokens(tensor: gs.Tensor, tokens: int) -> bool:
    return tensor.shape is not None and len(tensor.shape) == 3 and tensor.shape[1] == tokens


def _chosen(node: gs.Node, tokens: int) -> NDArray[np.int64] | None:
    """Which of the tokens `[B, tokens, …]` a Gather or Slice takes, with the axes that it leaves; None for others."""
    constants = [tensor.values for tensor in node.inputs[1:] if isinstance(tensor, gs.Constant)]
    if len(constants) != len(node.inputs) - 1:
        return None
    if node.op == "Gather" and node.attrs.get("axis", 0) in (1, -2) and constants[0].ndim <= 1:
        return np.asarray(constants[0] % tokens, np.int64)
    if node.op == "Slice" and [part.size for part in constants] in ([1] * 3, [1] * 4):
        start, end, axis, *step = (int(part[0]) for part in constants)
        if axis in (1, -2):
            return np.arange(tokens)[slice(start, end, *step)]
    return None
