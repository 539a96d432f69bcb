"""A learned factor for every channel (LayerScale) is part of the linear layer in front of it.

Before:  y = (x·W + b)·γ
After:   y = x·(W·γ) + b·γ
Shapes:  x [B,N,C]  W [C,D]  b, γ [D]
Needs:   γ constant, one for each channel; a linear layer with a constant matrix, with or without a constant bias, in
         front of it, that nothing else reads
Exact:   up to float32 rounding of the products (tolerance f32-reassoc)
Source:  Touvron et al., Going deeper with Image Transformers, arXiv 2103.17239
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.nodes import redirect
from eamdeploy.graph.operand import is_matrix
from eamdeploy.graph.skip import Skip


@dataclass(frozen=True, eq=False)
class _Match:
    """`scaling` multiplies with `factors`; `bias`, if there is one, adds to what `product` computes."""

    scaling: gs.Node
    factors: NDArray[np.float32]
    product: gs.Node
    bias: gs.Node | None


class FoldLayerScale:
    """Scales weights instead of activations."""

    name = "fold_layer_scale"

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """Every product with a constant vector."""
        found: list[_Match | Skip] = []
        for node in graph.nodes:
            vectors = [t for t in node.inputs if isinstance(t, gs.Constant) and t.values.ndim == 1]
            if node.op == "Mul" and len(vectors) == 1 and vectors[0].values.size > 1:
                found.append(_match(node, vectors[0]))
        return found

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """The linear layer has weights of its own, and what read the scaled tensor reads it."""
        name = f"{match.scaling.outputs[0].name}/{self.name}"
        weight = match.product.inputs[1].values * match.factors
        match.product.inputs[1] = gs.Constant(f"{name}/weight", weight)
        if match.bias is not None:
            index = next(i for i, tensor in enumerate(match.bias.inputs) if isinstance(tensor, gs.Constant))
            bias = match.bias.inputs[index].values * match.factors
            match.bias.inputs[index] = gs.Constant(f"{name}/bias", bias)
        redirect(match.scaling.outputs[0], (match.bias or match.product).outputs[0])


def _match(scaling: gs.Node, factors: gs.Constant) -> _Match | Skip:
    (scaled,) = (tensor for tensor in scaling.inputs if tensor is not factors)
    bias = None
    node = scaled.inputs[0] if len(scaled.inputs) == 1 else None
    if node is not None and node.op == "Add":
        vectors = [t for t in node.inputs if isinstance(t, gs.Constant) and t.values.shape == factors.values.shape]
        others = [t for t in node.inputs if not isinstance(t, gs.Constant)]
        if len(vectors) == len(others) == 1:
            bias, node = node, others[0].inputs[0] if len(others[0].inputs) == 1 else None
    if node is None or node.op != "MatMul" or not is_matrix(node.inputs[1]):
        return Skip("no linear layer stands in front of it", scaling.name)
    if node.inputs[1].values.shape[1] != factors.values.size:
        return Skip("it has another number of channels than the linear layer", scaling.name)
    if any(len(each.outputs[0].outputs) != 1 for each in (node, bias) if each is not None):
        return Skip("something else reads the linear layer", scaling.name)
    return _Match(scaling, factors.values, node, bias)
