"""The bias of values becomes part of the output projection's bias.

Before:  y = concat_h(a_h·(x·Wv_h + bv_h))·Wo + bo
After:   y = concat_h(a_h·x·Wv_h)·Wo + (bo + bv·Wo)
Shapes:  a [B·W,H,N,N]  x [B·W,N,D]  Wv [D,H·d]  bv [H·d]  Wo [H·d,D]  bo [D]
Needs:   attention in canonical form, values with a bias, a constant bias behind the projection; every row of a map sums
         to 1: live ones do behind a softmax, frozen ones by their scales, but not where a row mixes both
Exact:   up to float32 reassociation (tolerance f32-reassoc)
Source:  docs/design.md, Value bias
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from eamdeploy.graph.attention import Attention, find_attention
from eamdeploy.graph.emit import rewrite_attention
from eamdeploy.graph.skip import Skip


@dataclass(frozen=True, eq=False)
class _Match:
    attention: Attention
    bias: gs.Node


class FoldValueBias:
    """Moves the bias of values behind the output projection."""

    name = "fold_value_bias"

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """Every attention whose values have a bias."""
        return [_check(item) if isinstance(item, Attention) else item for item in find_attention(graph)]

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """The attention is written anew, and the projection's sum reads a bias of its own."""
        attention, add = match.attention, match.bias
        assert attention.value.bias is not None, "match only returns attention with a bias"
        matrix = attention.projection.inputs[1].values.astype(np.float64)
        index = next(i for i, tensor in enumerate(add.inputs) if isinstance(tensor, gs.Constant))
        folded = add.inputs[index].values + attention.value.bias.reshape(-1).astype(np.float64) @ matrix
        add.inputs[index] = gs.Constant(f"{add.outputs[0].name}/{self.name}", folded.astype(np.float32))
        without = replace(attention, value=replace(attention.value, bias=None))
        rewrite_attention(graph, attention, without, self.name)


def _check(attention: Attention) -> _Match | Skip:
    node = attention.softmax.name
    if attention.value.bias is None:
        return Skip("values have no bias", node)
    readers = attention.projection.outputs[0].outputs
    add = readers[0] if len(readers) == 1 and readers[0].op == "Add" else None
    width = attention.projection.inputs[1].values.shape[1]
    constants = [t for t in add.inputs if isinstance(t, gs.Constant)] if add is not None else []
    if add is None or len(constants) != 1 or constants[0].values.shape != (width,):
        return Skip("no constant bias stands behind the output projection", node)
    return _Match(attention, add)
