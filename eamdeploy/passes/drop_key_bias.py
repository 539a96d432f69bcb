"""Keys without their bias: it adds the same number to all scores of a row.

Before:  a = softmax(q·(x·Wk + bk)ᵀ + b)
After:   a = softmax(q·(x·Wk)ᵀ + b)
Shapes:  q [B·W,H,N,d]  x [B·W,N,D]  Wk [D,H·d]  bk [H·d]
Needs:   attention in canonical form, keys with a bias, no norm behind it
Exact:   q·bk does not depend on the key and softmax(s + c) = softmax(s); up to float32 (tolerance f32-reassoc)
Source:  docs/design.md, Key bias
"""

from __future__ import annotations

from dataclasses import replace

import onnx_graphsurgeon as gs

from eamdeploy.graph.attention import Attention, find_attention
from eamdeploy.graph.emit import rewrite_attention
from eamdeploy.graph.skip import Skip


class DropKeyBias:
    """Leaves the bias of keys away."""

    name = "drop_key_bias"

    def match(self, graph: gs.Graph) -> list[Attention | Skip]:
        """Every attention whose keys have a bias."""
        return [_check(item) if isinstance(item, Attention) else item for item in find_attention(graph)]

    def rewrite(self, graph: gs.Graph, match: Attention) -> None:
        """The attention is written anew with keys without bias."""
        rewrite_attention(graph, match, replace(match, key=replace(match.key, bias=None)), self.name)


def _check(attention: Attention) -> Attention | Skip:
    if attention.key.bias is None:
        return Skip("keys have no bias", attention.softmax.name)
    if attention.key_norm is not None:
        return Skip("keys are normalized behind their bias", attention.softmax.name)
    return attention
