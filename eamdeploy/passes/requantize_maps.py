"""Quantize rows of frozen maps anew whose integers don't fit INT8.

Before:  DequantizeLinear(integers up to 65535, scales) with one scale per row
After:   DequantizeLinear(integers up to 127, other scales)
Shapes:  integers [R, N]  scales [R]
Needs:   a constant, positive float32 scales, zero points 0
Exact:   no: rows with an integer over 127 change, by about half of 1/127 of their largest value, and keep their sum
Source:  docs/tensorrt.md, The ONNX parser: INT8 is the only type of integer constants
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from eamdeploy.eam.int8 import fit_int8, rows_over_int8
from eamdeploy.graph.dequantized import DequantizedRows, find_dequantized_rows
from eamdeploy.graph.skip import Skip
from eamdeploy.graph.writer import GraphWriter


class RequantizeMaps:
    """Integers of frozen maps up to 127."""

    name = "requantize_maps"

    def match(self, graph: gs.Graph) -> list[DequantizedRows | Skip]:
        """Every constant with an integer over 127."""
        return [_check(item) for item in find_dequantized_rows(graph)]

    def rewrite(self, graph: gs.Graph, match: DequantizedRows) -> None:
        """The node reads new integers, scales and zero points; earlier ones may serve other nodes."""
        writer = GraphWriter(graph, f"{match.node.name}/requantized")
        integers, scales = fit_int8(match.integers, match.scales)
        match.node.inputs = [
            writer.constant("integers", integers),
            writer.constant("scales", scales),
            writer.constant("zero_points", np.zeros(len(integers), np.uint8)),
        ]


def _check(item: DequantizedRows | Skip) -> DequantizedRows | Skip:
    if isinstance(item, Skip):
        return item
    if item.integers.dtype.kind != "u":
        return Skip("its integers are signed", item.node.name)
    if rows_over_int8(item.integers) == 0:
        return Skip("its integers fit INT8", item.node.name)
    return item
