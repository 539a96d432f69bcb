"""Attention without a 5-D reshape, transpose, split and squeeze chain around it.

Before:  x·Wqkv ─ Reshape [B·W,N,3,H,d] ─ Transpose ─ Split|Slice|Gather ─ Squeeze ─ … ─ merged
         scores ─ Add position bias ─ Reshape [B,W,H,N,N] ─ Add mask ─ Reshape ─ Softmax
After:   x·Wq, x·Wk, x·Wv ─ Reshape [B·W,N,H,d] ─ Transpose [B·W,H,N,d] ─ … ─ merged
         scores ─ Add one constant for each kind of window ─ Softmax
Shapes:  x [B·W,N,D]  Wqkv [D,3·H·d]  Wq, Wk, Wv [D,H·d]  merged [B·W,N,H·d]; W = 1 without windows
Needs:   attention as `graph.attention` finds it, not yet in this form
Exact:   bit for bit up to the order of additions inside a product (tolerance f32-reassoc)
Source:  docs/design.md, ONNX contract
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from eamdeploy.graph.attention import Attention, find_attention
from eamdeploy.graph.emit import is_canonical, rewrite_attention
from eamdeploy.graph.skip import Skip


class CanonicalAttention:
    """Rewrites every attention that an exporter spelled out into `graph.emit`'s form."""

    name = "canonical_attention"

    def match(self, graph: gs.Graph) -> list[Attention | Skip]:
        """All attentions but those already canonical."""
        return [
            Skip("already canonical", item.softmax.name) if isinstance(item, Attention) and is_canonical(item) else item
            for item in find_attention(graph)
        ]

    def rewrite(self, graph: gs.Graph, match: Attention) -> None:
        """The output projection reads the canonical form."""
        rewrite_attention(graph, match, match, self.name)
