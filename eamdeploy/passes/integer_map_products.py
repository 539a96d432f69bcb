"""Frozen maps times values as products of integers, for a runtime that multiplies those faster.

Before:  DequantizeLinear(integers, scales of rows) ──Reshape──▶ MatMul(maps, v)
After:   DequantizeLinear(integers up to 127, 1) ──Reshape──▶ MatMul(maps, dq(q(v))) ──Mul(scales of rows)
Shapes:  integers [P·M·R, N]  maps [M, P, R, N]  v [B·W, P, N, d]  scales [M, P, R, 1]
Types:   maps UINT8: no sum of two products overflows 16 bits on a processor without VNNI, as with INT8 maps, which
         runtimes shift to be unsigned, it would
Needs:   a constant by rows that one product reads as its left operand, and the range of v
Exact:   no: v has 8 bits, and rows with an integer over 127 are quantized anew (`eam.int8`); held to the reference's
         first classes by the gate
Source:  docs/design.md, Row-stochastic quantization: a row's scale can wait until behind the product,
         as it is the same for all that is summed

Worth it on OpenVINO with static INT8: 1.02 to 1.03x with 20 % of DeiT-Tiny's heads frozen. Hardly on ONNX Runtime's own
kernels, 1.007x (1.000 to 1.013) with dynamic ranges, as quantizing v and scaling the result cost what it saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from eamdeploy.eam.int8 import fit_int8
from eamdeploy.graph.dequantized import DequantizedRows, find_dequantized_rows
from eamdeploy.graph.skip import Skip
from eamdeploy.graph.writer import GraphWriter
from eamdeploy.passes.quantize_products import Range, quantized


@dataclass(frozen=True, eq=False)
class MapProduct:
    """A product of frozen maps and values.

    Attributes:
        shape: of the maps, once they are reshaped.
    """

    rows: DequantizedRows
    shape: tuple[int, ...]
    product: gs.Node


class IntegerMapProducts:
    """Frozen maps that stay integers in the product.

    Args:
        ranges: smallest and largest value of computed tensors, by name, from calibration.
    """

    name = "integer_map_products"

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        self._ranges = ranges

    def match(self, graph: gs.Graph) -> list[MapProduct | Skip]:
        """Every DequantizeLinear."""
        return [self._match(item) for item in find_dequantized_rows(graph)]

    def rewrite(self, graph: gs.Graph, match: MapProduct) -> None:
        """The product is one of integers, and what read it reads it scaled."""
        writer = GraphWriter(graph, f"{match.product.name}/integers")
        integers, scales = fit_int8(match.rows.integers, match.rows.scales)
        constants = [
            writer.constant("maps", integers.reshape(match.shape).astype(np.uint8)),
            writer.constant("one", np.array(1, np.float32)),
            writer.constant("zero_point", np.array(0, np.uint8)),
        ]
        product, (_, values) = match.product, match.product.inputs
        maps = writer.node("dequantized", "DequantizeLinear", constants, match.shape)
        product.inputs = [maps, quantized(graph, values, self._ranges[values.name])]
        result = product.outputs[0]
        unscaled = gs.Variable(f"{product.name}/integers/unscaled", np.float32, result.shape)
        product.outputs = [unscaled]
        row_scales = writer.constant("scales", scales.reshape(*match.shape[:-1], 1))
        scaled = writer.node("scaled", "Mul", [unscaled, row_scales], result.shape)
        scaled.inputs[0].outputs = [result]  # the tensor keeps its name, by which its range is known

    def _match(self, item: DequantizedRows | Skip) -> MapProduct | Skip:
        if isinstance(item, Skip):
            return item
        found = _product_of(item)
        if found is None:
            return Skip("no product reads it alone, as its left operand", item.node.name)
        shape, product = found
        if product.inputs[1].name not in self._ranges:
            return Skip(f"no range is known of {product.inputs[1].name}", product.name)
        return MapProduct(item, shape, product)


def frozen_values(graph: gs.Graph) -> list[str]:
    """Names of the tensors whose ranges the pass asks for, each once, in topological order."""
    found = (_product_of(item) for item in find_dequantized_rows(graph) if not isinstance(item, Skip))
    return list(dict.fromkeys(product.inputs[1].name for _, product in filter(None, found)))


def _product_of(item: DequantizedRows) -> tuple[tuple[int, ...], gs.Node] | None:
    """Shape of the maps in the product that reads them, and the product; None unless as `graph.emit` writes it."""
    tensor, shape = item.node.outputs[0], item.integers.shape
    if len(tensor.outputs) == 1 and tensor.outputs[0].op == "Reshape":
        reshape = tensor.outputs[0]
        if not isinstance(reshape.inputs[1], gs.Constant):
            return None
        shape = tuple(map(int, reshape.inputs[1].values))
        tensor = reshape.outputs[0]
    if len(tensor.outputs) != 1 or min(shape) < 1:
        return None
    if len(item.scales) != math.prod(shape[:-1]):
        return None  # a row of the operand has several scales: the mix of heads of low rank
    product = tensor.outputs[0]
    if product.op != "MatMul" or product.inputs[0] is not tensor or isinstance(product.inputs[1], gs.Constant):
        return None
    return shape, product
