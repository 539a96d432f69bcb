"""Store frozen maps as INT8, the only integer constants that TensorRT takes.

Before:  DequantizeLinear(uint8 or uint16 integers, scales, zero points of that type)
After:   DequantizeLinear(int8 integers, scales, int8 zero points)
Shapes:  integers [R, N]  scales [R]  zero points [R]
Needs:   a constant up to 127, positive float32 scales, zero points 0 or none
Exact:   bit for bit
Source:  docs/tensorrt.md, The ONNX parser: UINT8 is refused; three inputs, as many zero points as scales, all 0 (8.x)
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from eamdeploy.eam.int8 import rows_over_int8
from eamdeploy.graph.dequantized import DequantizedRows, find_dequantized_rows
from eamdeploy.graph.skip import Skip
from eamdeploy.graph.writer import GraphWriter


class Int8Maps:
    """Frozen maps as signed integers of 8 bits."""

    name = "int8_maps"

    def match(self, graph: gs.Graph) -> list[DequantizedRows | Skip]:
        """Every unsigned constant behind a DequantizeLinear."""
        return [_check(item) for item in find_dequantized_rows(graph)]

    def rewrite(self, graph: gs.Graph, match: DequantizedRows) -> None:
        """The node reads new integers and zero points; earlier ones may serve other nodes."""
        writer = GraphWriter(graph, f"{match.node.name}/int8")
        match.node.inputs = [
            writer.constant("integers", match.integers.astype(np.int8)),
            match.node.inputs[1],
            writer.constant("zero_points", np.zeros(len(match.integers), np.int8)),
        ]


def _check(item: DequantizedRows | Skip) -> DequantizedRows | Skip:
    if isinstance(item, Skip):
        return item
    if item.integers.dtype.kind != "u":
        return Skip("its integers are signed", item.node.name)
    if rows_over_int8(item.integers):
        return Skip("an integer is over 127", item.node.name)
    return item
