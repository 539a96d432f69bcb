"""Attention without a 5-D reshape, transpose, split and squeeze chain around it.

Before:  x·Wqkv ─ Reshape [B,N,3,H,d] ─ Transpose ─ Split|Slice|Gather ─ Squeeze ─ … ─ merged
After:   x·Wq, x·Wk, x·Wv ─ Reshape [B,N,H,d] ─ Transpose [B,H,N,d] ─ … ─ merged
Shapes:  x [B,N,D]  Wqkv [D,3·H·d]  Wq, Wk, Wv [D,H·d]  merged [B,N,H·d]
Needs:   attention as `graph.attention` finds it, not yet in this form
Exact:   bit for bit up to the order of additions inside a product (tolerance f32-reassoc)
Source:  DESIGN §5.7
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from eamdeploy.graph.attention import Attention, find_attention
from eamdeploy.graph.emit import GraphWriter, emit_attention, is_canonical
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
        writer = GraphWriter(graph, f"{match.merged.name}/canonical")
        match.projection.inputs[0] = emit_attention(writer, match, frozen=None)
