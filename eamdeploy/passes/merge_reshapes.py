"""A reshape of a reshape is one reshape, and one to the shape that is already there is none.

Before:  y = Reshape(Reshape(x, a), b)
After:   y = Reshape(x, b), or x where x already has the shape b
Shapes:  any; a and b constants with at most one -1 each and no 0
Needs:   b is constant and holds no 0, which would take a size from the tensor in between
Exact:   bit for bit
Source:  what other passes leave behind; ONNX Runtime starts every one of them
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from eamdeploy.graph.nodes import redirect
from eamdeploy.graph.skip import Skip


@dataclass(frozen=True, eq=False)
class _Match:
    """`last` reshapes; `source` is the first tensor of the chain; `needed` whether it has another shape."""

    last: gs.Node
    source: gs.Tensor
    needed: bool


class MergeReshapes:
    """Shortens every chain of reshapes."""

    name = "merge_reshapes"

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """Every reshape that reads a reshape, or that changes nothing."""
        matches: list[_Match | Skip] = []
        for node in graph.nodes:
            if not _is_plain(node):
                continue
            source = node.inputs[0]
            while len(source.inputs) == 1 and source.inputs[0].op == "Reshape":
                source = source.inputs[0].inputs[0]
            needed = not _has_shape(source, node)
            if source is not node.inputs[0] or not needed:
                matches.append(_Match(node, source, needed))
        return matches

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """The last reshape reads the first tensor, or its readers do."""
        if match.needed:
            match.last.inputs[0] = match.source
        else:
            redirect(match.last.outputs[0], match.source)


def _is_plain(node: gs.Node) -> bool:
    shape = node.inputs[1] if node.op == "Reshape" else None
    return isinstance(shape, gs.Constant) and 0 not in shape.values and bool(node.outputs[0].outputs)


def _has_shape(tensor: gs.Tensor, node: gs.Node) -> bool:
    """Whether `tensor` has the shape that `node` asks for: all sizes known but the first."""
    wanted = node.inputs[1].values.tolist()
    shape = list(tensor.shape or ())
    if len(shape) != len(wanted) or wanted[1:] != shape[1:]:
        return False
    return wanted[0] in (-1, shape[0])
