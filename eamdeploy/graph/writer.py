"""Add nodes to a graph under names of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.layout import PADDING
from eamdeploy.graph.operand import Norm
from eamdeploy.graph.running import images_of
from eamdeploy.graph.tokens import TokenMove

Shape: TypeAlias = Sequence[int | str | None]


class GraphWriter:
    """Adds nodes to `graph` under names that start with `prefix`."""

    def __init__(self, graph: gs.Graph, prefix: str) -> None:
        self._graph = graph
        self._prefix = prefix

    @property
    def images(self) -> int | None:
        """B of the graph's input, or None where it is dynamic."""
        return images_of(self._graph)

    def constant(self, name: str, values: NDArray[np.generic]) -> gs.Constant:
        """A new initializer."""
        return gs.Constant(f"{self._prefix}/{name}", np.ascontiguousarray(values))

    def integers(self, name: str, *values: int) -> gs.Constant:
        """A new int64 initializer: a shape, or sizes."""
        return self.constant(name, np.array(values, dtype=np.int64))

    def node(
        self,
        name: str,
        op: str,
        inputs: Sequence[gs.Tensor],
        shape: Shape | None,
        *,
        domain: str | None = None,
        **attributes: object,
    ) -> gs.Variable:
        """The float32 output, of `shape`, of a new node; the attributes are the operator's own.

        Args:
            domain: where the operator is defined; ONNX itself if None.
        """
        full = f"{self._prefix}/{name}"
        result = gs.Variable(full, np.float32, None if shape is None else list(shape))
        self._graph.nodes.append(
            gs.Node(op, full, attrs=attributes, inputs=list(inputs), outputs=[result], domain=domain)
        )
        return result

    def reshape(self, name: str, x: gs.Tensor, shape: Sequence[int], leading: int | str | None = None) -> gs.Variable:
        """`x` in another shape; `leading` is the first axis if that is 0 or -1 and known."""
        first = shape[0] if shape[0] > 0 else leading
        return self.node(name, "Reshape", [x, self.integers(f"{name}_shape", *shape)], [first, *shape[1:]])

    def gather(
        self, name: str, x: gs.Tensor, indices: NDArray[np.integer], axis: int, shape: Shape | None
    ) -> gs.Variable:
        """The slices of `x` along `axis` that the constant `indices` name."""
        positions = self.constant(f"{name}_indices", indices.astype(np.int64))
        return self.node(name, "Gather", [x, positions], shape, axis=axis)

    def move_tokens(self, x: gs.Tensor, move: TokenMove) -> gs.Tensor:
        """The tokens of `x` moved as `move` says, in the shape of its target."""
        flat, moved = (move.tokens, move.channels), (len(move.indices), move.channels)
        shape = move.source_shape
        if not move.is_identity:
            if shape != flat:
                x = self.reshape("flat", x, (-1, *flat))
            indices = move.indices
            if (indices == PADDING).any():
                pads = self.integers("token_of_zeros", 0, 0, 0, 0, 1, 0)
                x = self.node("padded", "Pad", [x, pads], [None, move.tokens + 1, move.channels])
                indices = np.where(indices == PADDING, move.tokens, indices)
            x = self.gather("moved", x, indices, axis=1, shape=[None, *moved])
            shape = moved
        return x if shape == move.target_shape else self.reshape("shaped", x, (-1, *move.target_shape))

    def copy_norm(self, name: str, norm: Norm, source: gs.Tensor) -> gs.Tensor:
        """A copy of `norm` that reads `source`; its constants are shared with the original."""
        copied: dict[int, gs.Tensor] = {id(norm.source): source}
        for index, node in enumerate(norm.nodes):
            inputs = [copied.get(id(tensor), tensor) for tensor in node.inputs]
            copied[id(node.outputs[0])] = self.node(f"{name}.{index}", node.op, inputs, None, **node.attrs)
        result = copied[id(norm.result)]
        result.shape = source.shape
        return result
