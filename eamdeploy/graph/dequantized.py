"""Constants behind a DequantizeLinear: where they are, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.skip import Skip


@dataclass(frozen=True, eq=False)
class DequantizedRows:
    """A DequantizeLinear of a constant `[R, N]` with one scale per row, as `emit_maps` writes it.

    Attributes:
        node: the DequantizeLinear.
        integers: unsigned or signed, `[R, N]`.
        scales: float32 `[R]`.
    """

    node: gs.Node
    integers: NDArray[np.integer[Any]]
    scales: NDArray[np.float32]


def find_dequantized_rows(graph: gs.Graph) -> list[DequantizedRows | Skip]:
    """Every DequantizeLinear of `graph`, in topological order; a `Skip` for one that is no constant by rows."""
    return [_read(node) for node in graph.nodes if node.op == "DequantizeLinear"]


def _read(node: gs.Node) -> DequantizedRows | Skip:
    data, scale, *zero_points = node.inputs
    if not isinstance(data, gs.Constant) or not isinstance(scale, gs.Constant):
        return Skip("dequantizes what is no constant", node.name)
    if scale.values.dtype != np.float32 or data.values.ndim != 2 or scale.values.shape != data.values.shape[:1]:
        return Skip("does not have one float32 scale per row", node.name)
    if node.attrs.get("axis", 1) not in (0, -2):
        return Skip("its scales are not those of rows", node.name)
    if not (scale.values > 0).all():
        return Skip("a scale is not positive", node.name)
    for zero_point in zero_points:
        if not isinstance(zero_point, gs.Constant) or zero_point.values.any():
            return Skip("its zero points are not 0", node.name)
    return DequantizedRows(node, data.values, scale.values)
