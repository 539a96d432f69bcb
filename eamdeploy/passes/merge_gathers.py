"""Two gathers of tokens with only token by token computations between them become one.

Before:  y = f(P(x)) ; z = Q(y)        and w = mean over tokens of f(P(x))
After:   y = f(x) ; z = (Q∘P)(y)       and w = mean over tokens of f(x)
Shapes:  P a permutation of T tokens, Q gathers any number of them
Needs:   P is a permutation; every way from it ends, through token by token computations, in such a Q or in a
         reduction over all tokens
Exact:   bit for bit, but for the order of additions in the mean (tolerance f32-reassoc)
Source:  the order of tokens matters to attention and patch merging only
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from eamdeploy.graph.nodes import bypass, reduced_axes
from eamdeploy.graph.skip import Refused, Skip, collect
from eamdeploy.graph.tokens import TokenGather, is_tokenwise, token_gather

_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceSum", "ReduceMin"})


@dataclass(frozen=True, eq=False)
class _Match:
    first: TokenGather
    later: tuple[TokenGather, ...]


class MergeGathers:
    """Lets every permutation of tokens meet the gathers behind it."""

    name = "merge_gathers"

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """Every permutation that something but attention stands behind."""
        gathers = filter(None, map(token_gather, graph.nodes))
        permutations = [gather for gather in gathers if gather.is_permutation]
        return collect(permutations, lambda gather: _Match(gather, _gathers_behind(gather)))

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """The first gather is gone; the later ones gather from its input, and those that then move nothing are gone."""
        first = match.first.node
        order = first.inputs[1].values  # not the matched one: it may have been a later gather of the match before
        bypass(first)
        for gather in match.later:
            composed = order[gather.indices]
            name = f"{gather.node.outputs[0].name}/after/{first.outputs[0].name}"
            gather.node.inputs[1] = gs.Constant(name, composed)
            if np.array_equal(composed, np.arange(gather.tokens)):
                bypass(gather.node)


def _gathers_behind(gather: TokenGather) -> tuple[TokenGather, ...]:
    """The gathers in which every way from `gather` ends."""
    later: dict[int, TokenGather] = {}
    inside: dict[int, gs.Node] = {id(gather.node): gather.node}
    pending = [gather.node]
    while pending:
        for tensor in pending.pop().outputs:
            if not tensor.outputs:
                raise Refused("its tokens are an output of the graph", gather.node)
            for reader in tensor.outputs:
                other = token_gather(reader)
                if other is not None and other.tokens == gather.tokens:
                    later[id(reader)] = other
                elif is_tokenwise(reader):
                    if id(reader) not in inside:
                        inside[id(reader)] = reader
                        pending.append(reader)
                elif not _reduces_tokens(reader, gather.tokens):
                    raise Refused(f"the order of its tokens matters to {reader.op}", gather.node)
    for node in inside.values():
        for tensor in node.inputs if node is not gather.node else ():
            if isinstance(tensor, gs.Variable) and not any(id(producer) in inside for producer in tensor.inputs):
                raise Refused(f"{node.op} behind it reads tokens in another order too", gather.node)
    return tuple(later.values())


def _reduces_tokens(node: gs.Node, tokens: int) -> bool:
    """Whether `node` reduces `[B, …, C]` over everything between, which is all `tokens` of an image."""
    shape = list(node.inputs[0].shape or ())
    axes = reduced_axes(node) if node.op in _REDUCTIONS else None
    if not shape or axes is None or sorted(axis % len(shape) for axis in axes) != list(range(1, len(shape) - 1)):
        return False
    return all(isinstance(size, int) for size in shape[1:]) and math.prod(shape[1:-1]) == tokens
