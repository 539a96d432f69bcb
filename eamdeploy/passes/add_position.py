"""One sum for class token, position embedding and the patches' bias, and no shape arithmetic to repeat the token.

Before:  x = Concat(Expand(c), t) + p      t = Transpose(Reshape(Conv(image, W) + b))
         x = Concat(Expand(c), t + p)      as DeiT-III has it
After:   x = Pad(t') + e                   e = [c + p_c ; b + p_t], t' = t without b
Shapes:  c [1,P,D]  t [B,T,D]  b [D]  p [1,N,D], or [1,T,D]  e [1,P+T,D]  Pad puts P tokens of zeros in front
Needs:   Concat of tokens: one tensor depends on the image, the others are the same for all images; a constant
         position embedding is added in front of it or behind; for b besides, that nothing else reads the convolution
Exact:   class tokens bit for bit; patches up to the order of two additions (tolerance f32-reassoc)
Source:  docs/design.md, Constants; torch's TorchScript exporter takes 7 nodes to repeat the class token for a
         dynamic batch
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.nodes import redirect
from eamdeploy.graph.skip import Refused, Skip, collect
from eamdeploy.graph.writer import GraphWriter


@dataclass(frozen=True, eq=False)
class _Match:
    """One sequence of patches and tokens of weights, named as in the module's docstring.

    Attributes:
        patches: t, or the t that p is added to.
        before, after: how many tokens stand in front of the patches and behind them.
        embedding: e, float32 `[1, N, D]`.
        result: x.
        convolution: the Conv whose bias is part of e; None where that stays.
    """

    patches: gs.Tensor
    before: int
    after: int
    embedding: NDArray[np.float32]
    result: gs.Tensor
    convolution: gs.Node | None


class AddPosition:
    """Adds everything that is the same for all images at once."""

    name = "add_position"

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """Every Concat that puts tokens of constants beside others."""
        return collect(filter(_joins_fixed_tokens, graph.nodes), _match)

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """The readers of x read the sum of padded patches and the embedding."""
        writer = GraphWriter(graph, f"{match.result.name}/{self.name}")
        shape = [match.patches.shape[0], *match.embedding.shape[1:]]
        pads = writer.integers("pads", 0, match.before, 0, 0, match.after, 0)
        padded = writer.node("padded", "Pad", [match.patches, pads], shape)
        embedding = writer.constant("embedding", match.embedding)
        redirect(match.result, writer.node("embedded", "Add", [padded, embedding], shape))
        if match.convolution is not None:
            match.convolution.inputs = match.convolution.inputs[:2]


def _joins_fixed_tokens(node: gs.Node) -> bool:
    by_token = node.op == "Concat" and node.attrs.get("axis") in (1, -2)
    return by_token and any(map(_is_fixed, node.inputs))


def _match(concat: gs.Node) -> _Match:
    variables = [index for index, tensor in enumerate(concat.inputs) if not _is_fixed(tensor)]
    if len(variables) != 1:
        raise Refused(f"{len(variables)} of its inputs depend on the image", concat)
    (index,) = variables
    tokens = concat.inputs[index]
    shape = list(tokens.shape or ())
    if len(shape) != 3 or not all(isinstance(size, int) for size in shape[1:]):
        raise Refused("its patches are no tokens [B, T, D]", concat)
    fixed = [_fixed_tokens(tensor, concat) for tensor in concat.inputs if _is_fixed(tensor)]
    before, after = ([np.zeros((0, shape[2])), *part] for part in (fixed[:index], fixed[index:]))
    patches, first = _without_sum(tokens, (shape[1], shape[2]))
    count = sum(map(len, [*before, *after])) + shape[1]
    result, last = _with_sum(concat.outputs[0], (count, shape[2]))
    if first is None and last is None:
        raise Refused("no position embedding is added in front of it or behind", concat)
    convolution = _convolution(patches, [concat] if first is None else [tokens.inputs[0], concat])
    embedded = np.zeros((shape[1], shape[2])) if first is None else first
    if convolution is not None:
        embedded = embedded + convolution.inputs[2].values
    embedding = np.concatenate([*before, embedded, *after]) + (0 if last is None else last)
    sizes = sum(map(len, before)), sum(map(len, after))
    return _Match(patches, *sizes, embedding[None].astype(np.float32), result, convolution)


def _is_fixed(tensor: gs.Tensor) -> bool:
    """Whether `tensor` is a constant, or one that is repeated for every image."""
    if isinstance(tensor, gs.Constant):
        return True
    producer = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    return producer is not None and producer.op == "Expand" and isinstance(producer.inputs[0], gs.Constant)


def _fixed_tokens(tensor: gs.Tensor, concat: gs.Node) -> NDArray[np.float64]:
    """`[P, D]` of a fixed tensor `[B, P, D]`."""
    values = (tensor if isinstance(tensor, gs.Constant) else tensor.inputs[0].inputs[0]).values
    by_image = values.reshape((1,) * (3 - values.ndim) + values.shape)
    if (by_image != by_image[:1]).any():
        raise Refused(f"{tensor.name} differs from image to image", concat)
    return np.broadcast_to(by_image[0], tensor.shape[1:]).astype(np.float64)


def _without_sum(tensor: gs.Tensor, shape: tuple[int, int]) -> tuple[gs.Tensor, NDArray[np.float64] | None]:
    """What a constant `[T, D]` is added to in `tensor`, and the constant; or `tensor` and None."""
    node = tensor.inputs[0] if len(tensor.inputs) == 1 else None
    sides = None if node is None else _addend(node, shape)
    return (tensor, None) if sides is None else sides


def _with_sum(tensor: gs.Tensor, shape: tuple[int, int]) -> tuple[gs.Tensor, NDArray[np.float64] | None]:
    """`tensor` with a constant `[N, D]` added, if nothing reads it without, and the constant; or `tensor` and None."""
    sides = _addend(tensor.outputs[0], shape) if len(tensor.outputs) == 1 else None
    return (tensor, None) if sides is None else (tensor.outputs[0].outputs[0], sides[1])


def _addend(node: gs.Node, shape: tuple[int, int]) -> tuple[gs.Tensor, NDArray[np.float64]] | None:
    """What `node` adds a constant of that shape to, one for all images, and the constant; None if it does not."""
    constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)] if node.op == "Add" else []
    if len(constants) != 1 or constants[0].values.shape not in (shape, (1, *shape)):
        return None
    (other,) = (tensor for tensor in node.inputs if tensor is not constants[0])
    return other, constants[0].values.reshape(shape).astype(np.float64)


def _convolution(tokens: gs.Tensor, readers: list[gs.Node]) -> gs.Node | None:
    """The Conv with a bias whose channels `tokens` are, if only `readers`, each of the one before, read its values."""
    nodes = [*readers]
    for op in ("Transpose", "Reshape", "Conv"):
        node = tokens.inputs[0] if len(tokens.inputs) == 1 else None
        if node is None or node.op != op:
            return None
        nodes.insert(0, node)
        tokens = node.inputs[0]
    convolution, reshape, transpose = nodes[:3]
    channels = convolution.inputs[1].shape[0]
    if len(convolution.inputs) != 3 or not isinstance(convolution.inputs[2], gs.Constant):
        return None
    shape = list(reshape.outputs[0].shape or ())
    if list(transpose.attrs.get("perm", ())) != [0, 2, 1] or len(shape) != 3 or shape[1] != channels:
        return None
    for node, reader in pairwise(nodes):
        if any(other is not reader and other.op != "Shape" for other in node.outputs[0].outputs):
            return None
    return convolution
