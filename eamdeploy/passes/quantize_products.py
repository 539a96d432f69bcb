"""Compute linear layers and live attention in INT8: QuantizeLinear and DequantizeLinear around both operands.

Before:  y = MatMul(a, W)                    y = MatMul(a, b)
After:   y = MatMul(dq(q(a)), dq(integers))  y = MatMul(dq(q(a)), dq(q(b)))
         with q(a) = round(a / s) in INT8 and dq(k) = s·k; one s for a tensor, one for a column of W

             q ─Q─DQ─┐                                  v ─Q─DQ──┐
             k ─Q─DQ─MatMul──(Add)──Softmax──Q─DQ────────────────MatMul──Q─DQ─┐
             frozen heads: product in floating point ────────────────────────Concat──Q─DQ──MatMul Wo

Shapes:  a [.., K]  W [K, N]  scales [] or [N]
Needs:   every operand a constant matrix on the right, or a computed tensor whose range is known; no frozen map among
         them; not the classifier
Exact:   no: INT8's 8 bits, symmetric; checked by the gate of the built engine
Source:  docs/tensorrt.md, Fused attention: INT8 fuses with Q/DQ in front of the first product, behind the softmax
         and behind the second product. Adds are left alone: INT8 residuals cost accuracy.

Scales are max(|range|)/127, rounded up to numbers that float16 has too, so that a version which stores them so changes
nothing. Where the runtime takes UINT8 with a zero point (`unsigned`), so are tensors that are hardly ever negative, the
maps behind a softmax and what comes out of a GELU: with the bit that a sign would waste, DeiT-Tiny's KL divergence fell
from 0.024 to 0.007 (OpenVINO, 200 photographs), at the same speed; with all activations so, to 0.006, but a tenth
slower. Readers of one tensor share its pair. Live attention next to frozen heads gets a pair right
behind its second product as well, with the scale of the pair that follows the Concat, so that it changes no value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.int8_weights import LARGEST, integers_of, pair_limits
from eamdeploy.graph.layout import LAYOUT_OPS
from eamdeploy.graph.linear import is_classifier
from eamdeploy.graph.nodes import redirect
from eamdeploy.graph.skip import Refused, Skip, collect
from eamdeploy.graph.writer import GraphWriter

Range = tuple[float, float]

_STEPS = 255  # of UINT8
_HARDLY_NEGATIVE = 0.3  # of the largest value: GELU's smallest is -0.17
_SMALLEST_SCALE = 2.0**-23  # float16 has one below it, which ONNX Runtime's converter would raise
_ON_THE_WAY = LAYOUT_OPS | {"Concat"}


@dataclass(frozen=True, eq=False)
class Product:
    """A MatMul to compute in INT8.

    Attributes:
        ranges: smallest and largest value of each computed operand, by the tensor's name.
        merged: for the second product of attention beside frozen heads, where its result is read; None otherwise.
    """

    node: gs.Node
    ranges: Mapping[str, Range]
    merged: gs.Tensor | None


class QuantizeProducts:
    """Both operands of products as INT8.

    Args:
        ranges: smallest and largest value of computed tensors, by name, from calibration.
        unsigned: whether tensors that are hardly ever negative are UINT8.
        for_pairs: whether weights are such that no sum of two products overflows 16 bits, as on a processor without
            VNNI they must (see `graph.int8_weights`); else they have 8 full bits.
    """

    name = "quantize_products"

    def __init__(self, ranges: Mapping[str, Range], *, unsigned: bool = False, for_pairs: bool = False) -> None:
        self._ranges, self._unsigned, self._for_pairs = ranges, unsigned, for_pairs

    def match(self, graph: gs.Graph) -> list[Product | Skip]:
        """Every MatMul."""
        products = [node for node in graph.nodes if node.op == "MatMul"]
        return collect(products, partial(self._product, graph))

    def rewrite(self, graph: gs.Graph, match: Product) -> None:
        """The product reads dequantized integers."""
        node = match.node
        for index, tensor in enumerate(list(node.inputs)):
            if isinstance(tensor, gs.Constant):
                writer = GraphWriter(graph, f"{node.name}/int8")
                node.inputs[index] = _dequantized_weight(writer, tensor, for_pairs=self._for_pairs)
            else:
                node.inputs[index] = quantized(graph, tensor, match.ranges[tensor.name], unsigned=self._unsigned)
        if match.merged is not None:
            result = node.outputs[0]
            readers = list(result.outputs)
            dequantized = quantized(graph, result, match.ranges[match.merged.name], unsigned=self._unsigned)
            redirect(result, dequantized, readers)

    def _product(self, graph: gs.Graph, node: gs.Node) -> Product:
        if is_classifier(graph, node):
            raise Refused("it is the classifier", node)
        ranges = {}
        for index, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant):
                if index != 1 or tensor.values.ndim != 2:
                    raise Refused("a constant operand is no matrix on the right", node)
            elif _reads_integers(tensor):
                raise Refused("an operand is integers already", node)
            elif _is_frozen(tensor):
                raise Refused("an operand is computed from constants alone", node)
            else:
                ranges[tensor.name] = self._range(tensor, node)
        merged = _merged(node)
        if merged is not None:
            ranges[merged.name] = self._range(merged, node)
        return Product(node, ranges, merged)

    def _range(self, tensor: gs.Tensor, node: gs.Node) -> Range:
        if tensor.name not in self._ranges:
            raise Refused(f"no range is known of {tensor.name}", node)
        return self._ranges[tensor.name]


def calibrated_tensors(graph: gs.Graph) -> list[str]:
    """Names of the tensors whose ranges the pass asks for, each once, in topological order."""
    names: dict[str, None] = {}
    for node in graph.nodes:
        if node.op == "MatMul" and not is_classifier(graph, node) and not any(map(_stays, node.inputs)):
            names |= dict.fromkeys(tensor.name for tensor in node.inputs if not isinstance(tensor, gs.Constant))
    return list(names)


def _stays(tensor: gs.Tensor) -> bool:
    """Whether a product with that operand is left alone."""
    return _reads_integers(tensor) or (not isinstance(tensor, gs.Constant) and _is_frozen(tensor))


def _is_frozen(tensor: gs.Tensor) -> bool:
    """Whether the tensor is computed from constants alone: the mixes of several ranks, side by side."""
    if not tensor.inputs:
        return isinstance(tensor, gs.Constant)
    node = tensor.inputs[0]
    return node.op in (*_ON_THE_WAY, "Cast", "DequantizeLinear") and all(map(_is_frozen, node.inputs))


def _reads_integers(tensor: gs.Tensor) -> bool:
    """Whether the tensor comes from a DequantizeLinear, through views: a frozen map, or what this pass has done."""
    while tensor.inputs and tensor.inputs[0].op in (*LAYOUT_OPS, "Cast"):
        tensor = tensor.inputs[0].inputs[0]
    return bool(tensor.inputs) and tensor.inputs[0].op == "DequantizeLinear"


def _merged(node: gs.Node) -> gs.Tensor | None:
    """For a product of softmax and values whose heads meet others in a Concat: what the output projection reads."""
    source = node.inputs[0]
    if not source.inputs or source.inputs[0].op != "Softmax":
        return None
    path = list(_way_down(node.outputs[0]))
    if not path or all(step.op != "Concat" for step in path):
        return None
    merged = path[-1].outputs[0]
    return merged if any(reader.op == "MatMul" and reader.inputs[0] is merged for reader in merged.outputs) else None


def _way_down(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """The layout nodes and Concats behind the tensor, as long as each has one reader."""
    while len(tensor.outputs) == 1 and tensor.outputs[0].op in _ON_THE_WAY:
        node = tensor.outputs[0]
        yield node
        tensor = node.outputs[0]


def quantized(graph: gs.Graph, tensor: gs.Tensor, limits: Range, *, unsigned: bool = False) -> gs.Tensor:
    """`tensor` through QuantizeLinear and DequantizeLinear; through the pair that it has already, if that is the same.

    Args:
        limits: its smallest and largest value.
        unsigned: whether it may be UINT8.
    """
    scale, zero_point = _grid(*limits, unsigned=unsigned)
    for reader in tensor.outputs:
        if reader.op == "QuantizeLinear" and [item.values for item in reader.inputs[1:]] == [scale, zero_point]:
            return reader.outputs[0].outputs[0].outputs[0]
    writer = GraphWriter(graph, f"{tensor.name}/int8")
    constants = [writer.constant("scale", scale), writer.constant("zero_point", zero_point)]
    integers = writer.node("quantized", "QuantizeLinear", [tensor, *constants], tensor.shape)
    integers.dtype = zero_point.dtype
    return writer.node("dequantized", "DequantizeLinear", [integers, *constants], tensor.shape)


def _grid(low: float, high: float, *, unsigned: bool) -> tuple[NDArray[np.float32], NDArray[np.integer[Any]]]:
    """Scale and zero point, scalars, of the integers that stand for values from `low` to `high`."""
    if not unsigned or -low > _HARDLY_NEGATIVE * high:
        return _scales(np.array(max(abs(low), abs(high)))), np.array(0, np.int8)
    low = min(low, 0.0)
    scale = _scales(np.array((high - low) * LARGEST / _STEPS))
    return scale, np.array(round(-low / float(scale)), np.uint8)


def _dequantized_weight(writer: GraphWriter, weight: gs.Constant, *, for_pairs: bool) -> gs.Tensor:
    """The matrix as INT8 integers with one scale for each column, behind a DequantizeLinear.

    Args:
        for_pairs: as for `QuantizeProducts`.
    """
    scales = _scales(pair_limits(weight.values) if for_pairs else np.abs(weight.values).max(axis=0))
    inputs = [
        writer.constant("integers", integers_of(weight.values, scales)),
        writer.constant("scales", scales),
        writer.constant("zero_points", np.zeros(len(scales), np.int8)),
    ]
    return writer.node("weight", "DequantizeLinear", inputs, weight.values.shape, axis=1)


def _scales(limits: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """The scales, float32 of the same shape, with which magnitudes up to `limits` fit INT8."""
    exact = np.maximum(limits.astype(np.float64) / LARGEST, _SMALLEST_SCALE)
    near = exact.astype(np.float16)
    return np.where(near.astype(np.float64) < exact, np.nextafter(near, np.float16(np.inf)), near).astype(np.float32)
