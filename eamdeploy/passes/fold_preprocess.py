"""Pixels as input: their normalization is part of the patch embedding's weights and bias.

Before:  t = Conv((p ÷ 255 − m) ÷ s, W) + b      the input is normalized, float32
After:   t = Conv(Cast(p), W ÷ (255·s)) + (b − ΣW·m ÷ s)      the input is p, uint8
Shapes:  p [B,3,H,W]  W [D,3,h,w]  b [D]  m, s [3]
Needs:   nothing but one Conv reads the input's values, of one group, with constant weights and without padding: zeros
         around the image stand for the mean color before, and for black afterwards
Exact:   up to float32 rounding of the folded weights (tolerance f32-engine)
Source:  docs/design.md, Preprocessing; `images.normalize` is what it replaces
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from eamdeploy.graph.skip import Refused, Skip, collect
from eamdeploy.graph.writer import GraphWriter

_LARGEST_PIXEL = 255


@dataclass(frozen=True, eq=False)
class _Match:
    convolution: gs.Node


class FoldPreprocess:
    """Makes pixels the graph's input.

    Args:
        mean, std: per channel, on a 0…1 scale.
    """

    name = "fold_preprocess"

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self._mean, self._std = (np.array(values, np.float64)[:, None, None] for values in (mean, std))

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """The convolution that reads the image."""
        return collect(graph.inputs[:1], partial(_match, channels=len(self._mean)))

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """The input is uint8; the convolution reads it cast to float32 and has weights of its own."""
        convolution, image = match.convolution, graph.inputs[0]
        writer = GraphWriter(graph, f"{convolution.outputs[0].name}/{self.name}")
        weight = convolution.inputs[1].values / self._std
        bias = convolution.inputs[2].values if len(convolution.inputs) == 3 else 0
        image.dtype = np.uint8
        pixels = writer.node("pixels", "Cast", [image], image.shape, to=onnx.TensorProto.FLOAT)
        convolution.inputs = [
            pixels,
            writer.constant("weight", (weight / _LARGEST_PIXEL).astype(np.float32)),
            writer.constant("bias", (bias - (weight * self._mean).sum(axis=(1, 2, 3))).astype(np.float32)),
        ]


def _match(image: gs.Tensor, channels: int) -> _Match:
    readers = [node for node in image.outputs if node.op != "Shape"]
    if len(readers) != 1:
        raise Refused(f"{len(readers)} nodes read the image", (readers or image.outputs)[0])
    (node,) = readers
    if image.dtype != np.float32:
        raise Refused("the input is no float32 image", node)
    if node.op != "Conv" or not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
        raise Refused(f"{node.op} reads the image, not a convolution with constant weights", node)
    if node.attrs.get("group", 1) != 1 or node.inputs[1].values.shape[1] != channels:
        raise Refused(f"the convolution does not sum over {channels} channels", node)
    if any(node.attrs.get("pads", ())) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Refused("the convolution pads the image", node)
    return _Match(node)
