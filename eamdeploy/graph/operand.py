"""Follow an operand of an attention product back to the linear layer that made it.

    x ──MatMul W──(+b)──layout──[norm]──layout──(·s)──▶ operand

Only the graph is walked; what the layouts permute is proved by `layout.probe`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.layout import LAYOUT_OPS
from eamdeploy.graph.nodes import reduced_axes
from eamdeploy.graph.skip import Refused

_NORM_OPS = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "ReduceMean", "Cast", "LayerNormalization"}
    | {"RMSNormalization", "SimplifiedLayerNormalization"}
)


@dataclass(frozen=True, eq=False)
class Norm:
    """A normalization of each head's vector on its own (q/k norm), as a piece of graph to copy.

    Attributes:
        source, result: the tensors it reads and writes, both `[B, H, N, d]`.
        nodes: what lies between, in topological order.
    """

    source: gs.Tensor
    result: gs.Tensor
    nodes: tuple[gs.Node, ...]


@dataclass(frozen=True, eq=False)
class Linear:
    """x · weight + bias, with weight `[D, C]` and bias `[C]` or None, written to `out`."""

    x: gs.Tensor
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    out: gs.Tensor


@dataclass(frozen=True, eq=False)
class Operand:
    """One input of an attention product, followed back to its linear layer; `scale` is applied behind the norm."""

    tensor: gs.Tensor
    linear: Linear
    norm: Norm | None
    scale: float
    layout: tuple[str, ...]


def follow_operand(tensor: gs.Tensor, at: gs.Node) -> Operand:
    """`tensor` followed back through layouts, constant factors and at most one norm to a linear layer."""
    current, scale, norm = tensor, 1.0, None
    layout: list[str] = []
    while True:
        current, factor = peel_scale(current)
        if norm is not None and factor != 1.0:
            raise Refused("a factor in front of a norm", at)
        scale *= factor
        linear = _linear(current)
        if linear is not None:
            return Operand(tensor, linear, norm, scale, tuple(reversed(layout)))
        node = producer(current, at)
        if node.op in LAYOUT_OPS:
            layout.append(node.op)
            current = node.inputs[0]
        elif node.op in _NORM_OPS and norm is None:
            norm = _norm(current, at)
            current = norm.source
        else:
            raise Refused(f"an operand of the product comes from {node.op}, not from a linear layer", node)


def follow_scores(softmax: gs.Node) -> tuple[gs.Node, float, tuple[str, ...]]:
    """The product of queries and keys whose scores `softmax` reads, the factor that they are multiplied with, and the
    operators between the two but for the factors.

    Between the two, constants may be added and reshapes may split off windows.
    """
    tensor, scale = peel_scale(softmax.inputs[0])
    between: list[str] = []
    while (node := producer(tensor, softmax)).op in ("Add", "Reshape", "Identity"):
        sides = [side for side in node.inputs if not is_fixed(side)] if node.op == "Add" else node.inputs[:1]
        if len(sides) != 1:
            raise Refused("something that depends on the image is added to its scores", softmax)
        tensor, factor = peel_scale(sides[0])
        scale *= factor
        between.append(node.op)
    if node.op != "MatMul":
        raise Refused(f"its scores come from {node.op}, not from a product of queries and keys", softmax)
    return node, scale, tuple(reversed(between))


def is_fixed(tensor: gs.Tensor) -> bool:
    """Whether `tensor` is a constant or computed from constants alone."""
    if isinstance(tensor, gs.Constant):
        return True
    return len(tensor.inputs) == 1 and bool(tensor.inputs[0].inputs) and all(map(is_fixed, tensor.inputs[0].inputs))


def peel_scale(tensor: gs.Tensor) -> tuple[gs.Tensor, float]:
    """`tensor` without the constant scalar factors in front of it, and their product."""
    scale = 1.0
    while len(tensor.inputs) == 1 and tensor.inputs[0].op in ("Mul", "Div"):
        node = tensor.inputs[0]
        left, right = node.inputs
        if isinstance(right, gs.Constant) and right.values.size == 1:
            factor = float(right.values.reshape(()))
            scale, tensor = scale * (factor if node.op == "Mul" else 1.0 / factor), left
        elif node.op == "Mul" and isinstance(left, gs.Constant) and left.values.size == 1:
            scale, tensor = scale * float(left.values.reshape(())), right
        else:
            break
    return tensor, scale


def _linear(tensor: gs.Tensor) -> Linear | None:
    """The linear layer that writes `tensor`, if one does: MatMul with a constant matrix, with or without a bias."""
    if len(tensor.inputs) != 1:
        return None
    node, bias = tensor.inputs[0], None
    if node.op == "Add":
        constants = [t for t in node.inputs if isinstance(t, gs.Constant) and t.values.ndim == 1]
        others = [t for t in node.inputs if not isinstance(t, gs.Constant)]
        if len(constants) != 1 or len(others) != 1 or len(others[0].inputs) != 1:
            return None
        bias, node = constants[0].values, others[0].inputs[0]
    if node.op != "MatMul" or not is_matrix(node.inputs[1]):
        return None
    weight = node.inputs[1].values
    if bias is not None and bias.shape != weight.shape[1:]:
        return None
    return Linear(node.inputs[0], weight, bias, tensor)


def is_matrix(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and tensor.values.ndim == 2


def _norm(result: gs.Tensor, at: gs.Node) -> Norm:
    """The norm that writes `result`, in one node or spelled out, back to the single tensor it reads."""
    nodes: list[gs.Node] = []
    sources: list[gs.Tensor] = []

    def visit(tensor: gs.Tensor) -> None:
        if isinstance(tensor, gs.Constant) or any(tensor is source for source in sources):
            return
        node = producer(tensor, at)
        if node.op not in _NORM_OPS or _linear(tensor) is not None:
            sources.append(tensor)
        elif not any(node is seen for seen in nodes):
            for operand in node.inputs:
                visit(operand)
            nodes.append(node)

    visit(result)
    if len(sources) != 1:
        raise Refused(f"a norm in front of the product reads {len(sources)} tensors, not one", at)
    for node in nodes:
        if not _per_vector(node):
            raise Refused(f"{node.op} in front of the product is not a norm over one head's vector", node)
    return Norm(sources[0], result, tuple(nodes))


def _per_vector(node: gs.Node) -> bool:
    """Whether `node` treats every vector along the last axis of a 4-D tensor alike."""
    if any(tensor.values.ndim > 1 for tensor in node.inputs if isinstance(tensor, gs.Constant)):
        return False
    if node.op == "ReduceMean":
        return reduced_axes(node) in ([-1], [3]) and node.attrs.get("keepdims", 1) == 1
    if node.op.endswith("Normalization"):
        return node.attrs.get("axis", -1) in (-1, 3)
    return True


def producer(tensor: gs.Tensor, at: gs.Node) -> gs.Node:
    if len(tensor.inputs) != 1:
        raise Refused(f"{tensor.name} is a constant or an input of the graph", at)
    return tensor.inputs[0]


def only_consumer(tensor: gs.Tensor, at: gs.Node) -> gs.Node:
    if len(tensor.outputs) != 1:
        raise Refused(f"{tensor.name} has {len(tensor.outputs)} consumers, not one", at)
    return tensor.outputs[0]
