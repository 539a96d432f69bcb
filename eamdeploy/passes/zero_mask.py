"""A mask that underflows to exactly 0 behind the softmax, not to denormal numbers.

Before:  a = softmax(q·kᵀ + m)      m holds 0 and −100, exp(−100) = 3.8e−44
After:   a = softmax(q·kᵀ + m')     m' holds 0 and −10000, exp(−10000) = 0
Shapes:  scores [B·W,H,N,N]  m [1,W,1,N,N], or as it broadcasts
Needs:   m is constant, holds nothing but 0, at least once in every row, and values of −64 or less, and is added to
         scores of a softmax alone
Exact:   up to float32: a masked entry was at most exp(−64) of the largest, now it is 0 (tolerance f32-reassoc); not
         where scores of one row differ by 64 or more, which would have been no mask
Source:  docs/design.md, Swin's mask; −10000 is a number in float16 too
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from eamdeploy.graph.skip import Skip

_LEAST, _EXACT = -64.0, -10000.0


@dataclass(frozen=True, eq=False)
class _Match:
    add: gs.Node
    index: int


class ZeroMask:
    """Lowers the masked entries of every attention mask."""

    name = "zero_mask"

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """Every sum with a constant in which some values of each row are 0 and the others low."""
        found: list[_Match | Skip] = []
        for node in graph.nodes:
            for index, tensor in enumerate(node.inputs) if node.op == "Add" else ():
                if isinstance(tensor, gs.Constant) and _is_mask(tensor):
                    found.append(_match(node, index))
        return found

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """The sum reads a lower mask of its own."""
        values = match.add.inputs[match.index].values
        lowered = np.where(values == 0, 0, _EXACT).astype(values.dtype)
        match.add.inputs[match.index] = gs.Constant(f"{match.add.outputs[0].name}/mask", lowered)


def _is_mask(tensor: gs.Constant) -> bool:
    values = tensor.values
    if values.dtype != np.float32 or values.ndim == 0 or not (values < 0).any():
        return False
    low = values <= _LEAST
    return bool((low | (values == 0)).all()) and not low.all(axis=-1).any()


def _match(add: gs.Node, index: int) -> _Match | Skip:
    if add.inputs[index].values.min() <= _EXACT:
        return Skip("already low enough", add.name)
    tensor = add.outputs[0]
    while len(tensor.outputs) == 1 and tensor.outputs[0].op in ("Reshape", "Add"):
        tensor = tensor.outputs[0].outputs[0]
    if len(tensor.outputs) != 1 or tensor.outputs[0].op != "Softmax":
        return Skip("not only a softmax reads the sum", add.name)
    return _Match(add, index)
