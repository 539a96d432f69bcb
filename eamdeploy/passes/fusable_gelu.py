"""GELU in the spelling that ONNX Runtime and TensorRT recognise and run as one kernel.

Before:  y = x · (0.5 · (1 + erf(x / √2)))      as torch's dynamo exporter writes it
After:   y = (x · (1 + erf(x / √2))) · 0.5      as its TorchScript exporter does
Shapes:  all of x's shape; the constants are scalars
Needs:   the halving is a scalar constant, exactly 0.5; its product, the sum and the erf have one consumer each
Exact:   bit for bit: halving moves no mantissa bit, short of denormals
Source:  onnxruntime/core/optimizer/gelu_fusion.cc matches only this and (0.5·x)·(1 + erf(x/√2))
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from eamdeploy.graph.skip import Skip


@dataclass(frozen=True)
class _Match:
    """`half` computes 0.5 · (1 + erf …), `product` x times that."""

    half: gs.Node
    product: gs.Node


class FusableGelu:
    """Halves behind the product instead of in front of it."""

    name = "fusable_gelu"

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """Every erf of `graph` that is halved before the product."""
        return [_match(node) for node in graph.nodes if node.op == "Erf"]

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """The two products change places; their nodes stay."""
        half, product = match.half, match.product
        factor, one_plus_erf = sorted(half.inputs, key=lambda tensor: isinstance(tensor, gs.Variable))
        x = next(tensor for tensor in product.inputs if tensor is not half.outputs[0])
        half.inputs, product.inputs = [x, one_plus_erf], [half.outputs[0], factor]


def _match(erf: gs.Node) -> _Match | Skip:
    add = _only_consumer(erf)
    half = _only_consumer(add) if add is not None and add.op == "Add" else None
    if half is None or half.op != "Mul":
        return Skip("not followed by a sum and a product of their own", erf.name)
    factors = [tensor for tensor in half.inputs if isinstance(tensor, gs.Constant)]
    if not factors:
        return Skip("already multiplied with x before it is halved", erf.name)
    if factors[0].values.size != 1 or float(factors[0].values.reshape(())) != 0.5:
        return Skip("multiplied with another constant than 0.5", erf.name)
    product = _only_consumer(half)
    if product is None or product.op != "Mul" or any(isinstance(tensor, gs.Constant) for tensor in product.inputs):
        return Skip("the halved sum is not multiplied with x", erf.name)
    return _Match(half, product)


def _only_consumer(node: gs.Node) -> gs.Node | None:
    consumers = node.outputs[0].outputs
    return consumers[0] if len(consumers) == 1 else None
