"""The scale of the scores is part of the query projection.

Before:  q = x·Wq + bq ; a = softmax(s·q·kᵀ + b)
After:   q = x·(s·Wq) + s·bq ; a = softmax(q·kᵀ + b)
Shapes:  x [B·W,N,D]  Wq [D,H·d]  bq [H·d]
Needs:   attention in canonical form, a scale other than 1, no norm between projection and scale
Exact:   up to float32 reassociation, bit for bit where s is a power of two (tolerance f32-reassoc)
Source:  docs/design.md, Scale into the query
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from eamdeploy.graph.attention import Attention, find_attention
from eamdeploy.graph.emit import rewrite_attention
from eamdeploy.graph.skip import Skip


class ScaleIntoQuery:
    """Multiplies the scale into queries' weights and biases."""

    name = "scale_into_query"

    def match(self, graph: gs.Graph) -> list[Attention | Skip]:
        """Every attention with a scale."""
        return [_check(item) if isinstance(item, Attention) else item for item in find_attention(graph)]

    def rewrite(self, graph: gs.Graph, match: Attention) -> None:
        """The attention is written anew with scaled queries."""
        scale, query = np.float32(match.scale), match.query
        scaled = replace(query, weight=query.weight * scale, bias=None if query.bias is None else query.bias * scale)
        rewrite_attention(graph, match, replace(match, query=scaled, scale=1.0), self.name)


def _check(attention: Attention) -> Attention | Skip:
    if attention.scale == 1:
        return Skip("not scaled", attention.softmax.name)
    if attention.query_norm is not None:
        return Skip("queries are normalized before they are scaled", attention.softmax.name)
    return attention
