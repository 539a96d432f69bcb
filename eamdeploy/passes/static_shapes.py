"""Reshapes to a constant shape instead of one computed from other tensors' shapes.

Before:  y = Reshape(x, Concat(Gather(Shape(z), 0), 64, 49, 96))
After:   y = Reshape(x, [-1, 64, 49, 96])
Shapes:  any; y has at most one size that depends on the batch
Needs:   y's shape is known (`graph.running.fill_in_shapes`) but for one axis at most
Exact:   bit for bit
Source:  torch's TorchScript exporter computes every size; 900 of the 1464 nodes of Swin-Tiny with a dynamic batch
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from eamdeploy.graph.skip import Skip


@dataclass(frozen=True, eq=False)
class _Match:
    reshape: gs.Node
    shape: tuple[int, ...]


class StaticShapes:
    """Replaces computed shapes by the known ones."""

    name = "static_shapes"

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """Every reshape whose shape is no constant."""
        nodes = [n for n in graph.nodes if n.op == "Reshape" and not isinstance(n.inputs[1], gs.Constant)]
        return [_match(node) for node in nodes]

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """The reshape reads a constant; what computed its shape is left without a reader."""
        shape = np.array(match.shape, np.int64)
        match.reshape.inputs[1] = gs.Constant(f"{match.reshape.outputs[0].name}/static_shape", shape)


def _match(node: gs.Node) -> _Match | Skip:
    shape = node.outputs[0].shape
    if shape is None:
        return Skip("its shape is not known", node.name)
    sizes = tuple(size if isinstance(size, int) else -1 for size in shape)
    if sizes.count(-1) > 1:
        return Skip(f"{sizes.count(-1)} axes of its shape depend on the batch", node.name)
    return _Match(node, sizes)
