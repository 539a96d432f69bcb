"""Store frozen maps as float32, for a TensorRT that does not compute with integer constants.

Before:  DequantizeLinear(integers, scales, zero points)
After:   a float32 constant
Shapes:  integers [R, N]  scales [R]
Needs:   a constant, positive float32 scales, zero points 0 or none
Exact:   bit for bit
Source:  `engines.trt_versions`, integer_maps
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from eamdeploy.graph.dequantized import DequantizedRows, find_dequantized_rows
from eamdeploy.graph.nodes import redirect
from eamdeploy.graph.skip import Skip
from eamdeploy.graph.writer import GraphWriter


class FloatMaps:
    """Frozen maps as floating-point constants."""

    name = "float_maps"

    def match(self, graph: gs.Graph) -> list[DequantizedRows | Skip]:
        """Every constant behind a DequantizeLinear."""
        return find_dequantized_rows(graph)

    def rewrite(self, graph: gs.Graph, match: DequantizedRows) -> None:
        """What read the DequantizeLinear reads a constant."""
        values = match.integers.astype(np.float32) * match.scales[:, None]
        redirect(match.node.outputs[0], GraphWriter(graph, match.node.name).constant("float", values))
