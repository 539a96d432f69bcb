"""Window partition, cyclic shift, their reverse and patch merging as one Gather each.

Before:  x ─ (Slice, Slice, Concat)² ─ Pad ─ Reshape [B,H/w,w,W/w,w,C] ─ Transpose ─ Reshape ─ y
After:   x ─ Reshape [B,T,C] ─ Gather(axis 1, indices [T']) ─ Reshape ─ y
Shapes:  x [B,H,W,C]  T = H·W  y [B·H/w·W/w, w·w, C], or [B,H/2,W/2,4·C] for patch merging
Needs:   the chain moves whole tokens inside each image (`graph.tokens`); it is not in this form yet
Exact:   bit for bit; where windows don't divide the image, Gather reads one token of zeros behind the last
Source:  docs/design.md, Layout
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from eamdeploy.graph.layout import PADDING
from eamdeploy.graph.nodes import redirect
from eamdeploy.graph.skip import Skip
from eamdeploy.graph.tokens import TokenMove, find_moves
from eamdeploy.graph.writer import GraphWriter

_GATHERED = frozenset({"Reshape", "Pad", "Gather"})


class GatherTokens:
    """Rewrites every chain of layout operators that moves whole tokens."""

    name = "gather_tokens"

    def match(self, graph: gs.Graph) -> list[TokenMove | Skip]:
        """Every chain but those already in this form."""
        return [
            Skip("already gathered", item.target.inputs[0].name)
            if isinstance(item, TokenMove) and _GATHERED.issuperset(item.ops) and len(item.ops) <= _length(item)
            else item
            for item in find_moves(graph)
        ]

    def rewrite(self, graph: gs.Graph, match: TokenMove) -> None:
        """The readers of the chain's end read the gathered tokens."""
        writer = GraphWriter(graph, f"{match.target.name}/tokens")
        redirect(match.target, writer.move_tokens(match.source, match))


def _length(move: TokenMove) -> int:
    """Nodes after the rewrite."""
    if move.is_identity:
        return int(move.source_shape != move.target_shape)
    flat = (move.tokens, move.channels), (len(move.indices), move.channels)
    reshapes = (move.source_shape != flat[0]) + (move.target_shape != flat[1])
    return reshapes + 1 + bool((move.indices == PADDING).any())
