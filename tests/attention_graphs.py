"""Self-attention in small ONNX graphs, spelled in many ways, and the same in numpy, for tests of graph rewrites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from eamdeploy.graph.frozen import IntegerMaps

B, N, D, H, HEAD_DIM, CLASSES = 2, 6, 10, 3, 5, 4
C = H * HEAD_DIM
HEIGHT, WIDTH = 2, 3
SCALE = HEAD_DIM**-0.5
EPSILON = 1e-6

Floats: TypeAlias = NDArray[np.float32]
Layout = Literal["split", "slice", "gather", "separate", "interleaved"]
Scale = Literal["query", "key", "both", "scores", "divisor", "left", "linear"]
Norm = Literal["layer", "layer-spelled", "rms-spelled"]


@dataclass(frozen=True, eq=False)
class Linear:
    """x · weight + bias, head by head."""

    weight: Floats  # [D,H,d]
    bias: Floats | None  # [H,d]

    @property
    def matrix(self) -> Floats:
        return self.weight.reshape(D, C)

    @property
    def vector(self) -> Floats | None:
        return None if self.bias is None else self.bias.reshape(C)


@dataclass(frozen=True, eq=False)
class Weights:
    """One attention module; `gains` are those of the q and k norms."""

    query: Linear
    key: Linear
    value: Linear
    out: Floats  # [C,D]
    gains: tuple[Floats, Floats]  # [d]

    @property
    def value_rows(self) -> Floats:
        """[C,D], as a checkpoint holds it."""
        return self.value.matrix.T


def make_weights(seed: int = 0, biased: Sequence[bool] = (True, True, True)) -> Weights:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Floats:
        return rng.normal(0, 0.6, shape).astype(np.float32)

    query, key, value = (Linear(normal(D, H, HEAD_DIM), normal(H, HEAD_DIM) if bias else None) for bias in biased)
    return Weights(query, key, value, out=normal(C, D), gains=(1 + normal(HEAD_DIM), 1 + normal(HEAD_DIM)))


WEIGHTS = make_weights()
_FIXED = np.random.default_rng(99)
PATCH = _FIXED.normal(0, 1, (3, D)).astype(np.float32)
POSITIONS = _FIXED.normal(0, 1, (N, D)).astype(np.float32)
HEAD = _FIXED.normal(0, 1, (D, CLASSES)).astype(np.float32)
IMAGES = _FIXED.normal(0, 1, (B, 3, HEIGHT, WIDTH)).astype(np.float32)
GRID = (4, 6)  # 24 tokens, or four windows of N
GRID_POSITIONS = _FIXED.normal(0, 1, (24, D)).astype(np.float32)
GRID_IMAGES = _FIXED.normal(0, 1, (B, 3, *GRID)).astype(np.float32)


def forward(modules: Sequence[Weights], frozen: Sequence[Mapping[int, Floats]] = ()) -> Floats:
    """Logits [B,CLASSES] of `IMAGES`, without ONNX; `frozen` holds the maps [N,N] of each module by head."""
    x = IMAGES.reshape(B, 3, N).transpose(0, 2, 1) @ PATCH + POSITIONS
    for index, weights in enumerate(modules):
        q, k, v = (
            np.einsum("bnd,dhj->bhnj", x, linear.weight) + (0 if linear.bias is None else linear.bias[:, None])
            for linear in (weights.query, weights.key, weights.value)
        )
        scores = SCALE * q @ k.swapaxes(-1, -2)
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        maps = powers / powers.sum(axis=-1, keepdims=True)
        for head, constant in (frozen[index] if frozen else {}).items():
            maps[:, head] = constant
        x = x + (maps @ v).transpose(0, 2, 1, 3).reshape(B, N, C) @ weights.out
    return np.asarray(x.mean(axis=1) @ HEAD, np.float32)


def ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def floats(*values: float) -> Floats:
    return np.array(values, np.float32)


def scalar(value: float) -> Floats:
    return np.array(value, np.float32)


class GraphBuilder:
    """Draws a graph from `image` [B,3,*grid] on. Tensors are names; an array given as an input becomes an initializer.

    `x` is [B,h·w,D].
    """

    def __init__(self, batch: int | str = B, opset: int = 17, grid: tuple[int, int] = (HEIGHT, WIDTH)) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[np.generic]] = {}
        self.batch = batch
        self.opset = opset
        self.grid = grid
        tokens = grid[0] * grid[1]
        pixels = self.op("Transpose", self.op("Reshape", "image", ints(0, 3, tokens)), perm=[0, 2, 1])
        positions = POSITIONS if tokens == N else GRID_POSITIONS[:tokens]
        self.x = self.op("Add", self.op("MatMul", pixels, PATCH), positions)

    def op(self, op: str, *inputs: str | NDArray[np.generic], **attributes: object) -> str:
        """The only output of a new node."""
        return self.ops(op, 1, *inputs, **attributes)[0]

    def ops(self, op: str, outputs: int, *inputs: str | NDArray[np.generic], **attributes: object) -> list[str]:
        """All outputs of a new node."""
        name = f"{op}_{len(self.nodes)}"
        results = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        given = [item if isinstance(item, str) else self.constant(item) for item in inputs]
        self.nodes.append(helper.make_node(op, given, results, name=name, **attributes))
        return results

    def constant(self, values: NDArray[np.generic]) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = values
        return name

    def linear(self, x: str, linear: Linear) -> str:
        """[B,N,C]."""
        product = self.op("MatMul", x, linear.matrix)
        return product if linear.vector is None else self.op("Add", product, linear.vector)

    def split_heads(self, flat: str, perm: Sequence[int] = (0, 2, 1, 3), shape: Sequence[int] = (H, HEAD_DIM)) -> str:
        """[B,N,C] as [B,N,H,d], transposed."""
        return self.op("Transpose", self.op("Reshape", flat, self.sizes(N, *shape)), perm=list(perm))

    def sizes(self, *sizes: int) -> str | NDArray[np.int64]:
        """The shape [B, *sizes]: a constant, or worked out from x's batch as torchscript spells it."""
        if isinstance(self.batch, int):
            return ints(self.batch, *sizes)
        batch = self.op("Unsqueeze", self.op("Gather", self.op("Shape", self.x), np.array(0), axis=0), ints(0))
        return self.op("Concat", batch, *(ints(size) for size in sizes), axis=0)

    def queries(self, weights: Weights = WEIGHTS) -> str:
        """[B,H,N,d], scaled."""
        return self.op("Mul", self.split_heads(self.linear(self.x, weights.query)), scalar(SCALE))

    def keys(self, weights: Weights = WEIGHTS) -> str:
        """[B,H,d,N]."""
        return self.split_heads(self.linear(self.x, weights.key), (0, 2, 3, 1))

    def values(self, weights: Weights = WEIGHTS) -> str:
        """[B,H,N,d]."""
        return self.split_heads(self.linear(self.x, weights.value))

    def map(self) -> str:
        """[B,H,N,N]."""
        return self.op("Softmax", self.op("MatMul", self.queries(), self.keys()), axis=-1)

    def merge_heads(self, context: str) -> str:
        """[B,H,N,d] as [B,N,C]."""
        return self.op("Reshape", self.op("Transpose", context, perm=[0, 2, 1, 3]), self.sizes(N, C))

    def mix(self, queries: str, keys: str, values: str) -> str:
        """softmax(q·k)·v, merged."""
        attention = self.op("Softmax", self.op("MatMul", queries, keys), axis=-1)
        return self.merge_heads(self.op("MatMul", attention, values))

    def project(self, merged: str, out: str | Floats = WEIGHTS.out) -> str:
        """[B,N,D], added to x."""
        return self.op("Add", self.x, self.op("MatMul", merged, out))

    def classify(self, tokens: str) -> onnx.ModelProto:
        """The model: mean over the tokens [B,T,D], then logits."""
        flat = self.op("Squeeze", self.mean(tokens, 1), ints(1))
        self.nodes.append(helper.make_node("MatMul", [flat, self.constant(HEAD)], ["logits"], name="head"))
        model = self.model({"logits": [self.batch, CLASSES]})
        onnx.checker.check_model(model, full_check=True)
        return model

    def mean(self, tensor: str, axis: int) -> str:
        """The mean over one axis, which stays."""
        if self.opset < 18:
            return self.op("ReduceMean", tensor, axes=[axis])
        return self.op("ReduceMean", tensor, ints(axis))

    def model(self, outputs: Mapping[str, Sequence[int | str] | None]) -> onnx.ModelProto:
        """What is drawn so far, not checked, with these tensors (and their shapes) as outputs."""
        graph = helper.make_graph(
            self.nodes,
            "attention",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [self.batch, 3, *self.grid])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            [numpy_helper.from_array(values, name) for name, values in self.constants.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


@dataclass(frozen=True)
class Spelling:
    """One way to write the same attention.

    Attributes:
        layout: how the linear layers become heads.
        scale: where the scale is applied.
        biased: which of queries, keys and values have a bias.
        norm: the q and k norm, or None.
    """

    layout: Layout = "split"
    scale: Scale = "query"
    biased: tuple[bool, bool, bool] = (True, True, True)
    norm: Norm | None = None
    batch: int | str = B

    @property
    def weights(self) -> Weights:
        return make_weights(0, self.biased)

    def model(self) -> onnx.ModelProto:
        """x + attention(x), classified."""
        builder, weights = GraphBuilder(self.batch), self.weights
        query, key, value = _operands(builder, self.layout, weights, in_linear=self.scale == "linear")
        if self.norm is not None:
            query, key = (
                _norm(builder, self.norm, t, gain) for t, gain in zip((query, key), weights.gains, strict=True)
            )
        root = scalar(SCALE**0.5)
        if self.scale == "query":
            query = builder.op("Mul", query, scalar(SCALE))
        elif self.scale == "left":
            query = builder.op("Mul", scalar(SCALE), query)
        elif self.scale == "key":
            key = builder.op("Mul", key, scalar(SCALE))
        elif self.scale == "both":
            query, key = builder.op("Mul", query, root), builder.op("Mul", key, root)
        scores = builder.op("MatMul", query, builder.op("Transpose", key, perm=[0, 1, 3, 2]))
        if self.scale == "scores":
            scores = builder.op("Mul", scores, scalar(SCALE))
        elif self.scale == "divisor":
            scores = builder.op("Div", scores, scalar(1 / SCALE))
        context = builder.op("MatMul", builder.op("Softmax", scores, axis=-1), value)
        return builder.classify(builder.project(builder.merge_heads(context), weights.out))


def _operands(builder: GraphBuilder, layout: Layout, weights: Weights, *, in_linear: bool) -> tuple[str, str, str]:
    """Queries, keys and values, each [B,H,N,d]; `in_linear` scales the queries before they are split into heads."""
    linears = (weights.query, weights.key, weights.value)
    if layout == "separate":
        flat = [builder.linear(builder.x, linear) for linear in linears]
        if in_linear:
            flat[0] = builder.op("Mul", flat[0], scalar(SCALE))
        query, key, value = (builder.split_heads(item) for item in flat)
        return query, key, value
    assert not in_linear, "one linear layer writes queries, keys and values"
    if layout == "interleaved":  # each head's q, k and v side by side
        joined = builder.op(
            "MatMul", builder.x, np.concatenate([linear.weight for linear in linears], axis=2).reshape(D, -1)
        )
        biases = np.concatenate([_bias(linear) for linear in linears], axis=1).reshape(-1)
        heads = builder.split_heads(builder.op("Add", joined, biases), shape=(H, 3 * HEAD_DIM))
        query, key, value = builder.ops("Split", 3, heads, axis=3)
        return query, key, value
    joined = builder.op("MatMul", builder.x, np.concatenate([linear.matrix for linear in linears], axis=1))
    if any(linear.bias is not None for linear in linears):
        joined = builder.op("Add", joined, np.concatenate([_bias(linear).reshape(-1) for linear in linears]))
    stacked = builder.split_heads(joined, (2, 0, 3, 1, 4), (3, H, HEAD_DIM))  # [3,B,H,N,d]
    if layout == "gather":
        query, key, value = (builder.op("Gather", stacked, np.array(i), axis=0) for i in range(3))
        return query, key, value
    if layout == "slice":
        parts = [builder.op("Slice", stacked, ints(i), ints(i + 1), ints(0)) for i in range(3)]
    else:
        parts = builder.ops("Split", 3, stacked, axis=0)
    query, key, value = (builder.op("Squeeze", part, ints(0)) for part in parts)
    return query, key, value


def _bias(linear: Linear) -> Floats:
    return np.zeros((H, HEAD_DIM), np.float32) if linear.bias is None else linear.bias


def _norm(builder: GraphBuilder, norm: Norm, tensor: str, gain: Floats) -> str:
    """`tensor` [B,H,N,d] with each head's vectors normalized."""
    shift = gain - 1
    if norm == "layer":
        return builder.op("LayerNormalization", tensor, gain, shift, axis=-1, epsilon=EPSILON)
    centred = tensor
    if norm == "layer-spelled":
        centred = builder.op("Sub", tensor, builder.mean(tensor, -1))
    square = builder.mean(builder.op("Pow", centred, scalar(2)), 3)
    root = builder.op("Sqrt", builder.op("Add", square, scalar(EPSILON)))
    if norm == "layer-spelled":
        return builder.op("Add", builder.op("Mul", builder.op("Div", centred, root), gain), shift)
    return builder.op("Mul", builder.op("Mul", centred, builder.op("Reciprocal", root)), gain)


@dataclass(frozen=True, eq=False)
class Stack:
    """Attention modules without biases one after another, each with separate linear layers.

    A module given twice has its initializers shared.
    """

    modules: tuple[Weights, ...]
    batch: int | str = B
    opset: int = 17

    def model(self) -> onnx.ModelProto:
        """The modules, each added to its input, classified."""
        builder = GraphBuilder(self.batch, self.opset)
        drawn: dict[int, list[str]] = {}
        for weights in self.modules:
            if id(weights) not in drawn:
                matrices = [linear.matrix for linear in (weights.query, weights.key, weights.value)]
                drawn[id(weights)] = [builder.constant(matrix) for matrix in (*matrices, weights.out)]
            *linears, out = drawn[id(weights)]
            query, key, value = (builder.split_heads(builder.op("MatMul", builder.x, name)) for name in linears)
            keys = builder.op("Transpose", key, perm=[0, 1, 3, 2])
            builder.x = builder.project(builder.mix(builder.op("Mul", query, scalar(SCALE)), keys, value), out)
        return builder.classify(builder.x)


@dataclass(frozen=True, eq=False)
class Windows:
    """How an image of tokens is cut into windows of N = 2·3 tokens, as timm's Swin does it, in ONNX and in numpy.

    Attributes:
        grid: height and width in tokens.
        shift: how far the image is rolled up and to the left before; 0 for not at all.
    """

    grid: tuple[int, int] = GRID
    shift: tuple[int, int] = (0, 0)

    @property
    def padded(self) -> tuple[int, int]:
        """The grid with rows and columns of zeros, so that windows divide it."""
        height, width = self.grid
        return height + -height % HEIGHT, width + -width % WIDTH

    @property
    def count(self) -> int:
        """W."""
        return self.padded[0] // HEIGHT * (self.padded[1] // WIDTH)

    def partition(self, g: GraphBuilder, tokens: str) -> str:
        """[B,h·w,D] as [B·W,N,D]."""
        image = g.op("Reshape", tokens, g.sizes(*self.grid, D))
        for axis, shift in enumerate(self.shift, 1):
            image = _roll(g, image, shift, axis)
        below, beside = (p - n for p, n in zip(self.padded, self.grid, strict=True))
        if below or beside:
            image = g.op("Pad", image, ints(0, 0, 0, 0, 0, below, beside, 0))
        height, width = self.padded
        split = g.op("Reshape", image, ints(-1, height // HEIGHT, HEIGHT, width // WIDTH, WIDTH, D))
        return g.op("Reshape", g.op("Transpose", split, perm=[0, 1, 3, 2, 4, 5]), ints(-1, N, D))

    def reverse(self, g: GraphBuilder, windows: str) -> str:
        """[B·W,N,D] as [B,h·w,D]."""
        height, width = self.padded
        split = g.op("Reshape", windows, ints(-1, height // HEIGHT, width // WIDTH, HEIGHT, WIDTH, D))
        image = g.op("Reshape", g.op("Transpose", split, perm=[0, 1, 3, 2, 4, 5]), ints(-1, height, width, D))
        if self.padded != self.grid:
            image = g.op("Slice", image, ints(0, 0), ints(*self.grid), ints(1, 2))
        for axis, shift in enumerate(self.shift, 1):
            image = _roll(g, image, -shift, axis)
        return g.op("Reshape", image, g.sizes(self.grid[0] * self.grid[1], D))

    def tokens(self) -> NDArray[np.int64]:
        """The token that each token of each window is, or -1 for zeros: int64 [W·N]."""
        image = np.roll(np.arange(self.grid[0] * self.grid[1]).reshape(self.grid), [-s for s in self.shift], (0, 1))
        below, beside = (p - n for p, n in zip(self.padded, self.grid, strict=True))
        image = np.pad(image, ((0, below), (0, beside)), constant_values=-1)
        split = image.reshape(self.padded[0] // HEIGHT, HEIGHT, self.padded[1] // WIDTH, WIDTH)
        return split.transpose(0, 2, 1, 3).reshape(-1)


def _roll(g: GraphBuilder, image: str, shift: int, axis: int) -> str:
    """`image` with what stood at `shift` at the start, as exporters write torch.roll."""
    if not shift:
        return image
    end = np.iinfo(np.int64).max
    first = g.op("Slice", image, ints(shift), ints(end), ints(axis))
    return g.op("Concat", first, g.op("Slice", image, ints(0), ints(shift), ints(axis)), axis=axis)


POSITION_BIAS = _FIXED.normal(0, 1, (H, N, N)).astype(np.float32)


def window_mask(windows: int, kinds: Sequence[int] | None = None) -> Floats:
    """[W,N,N]: in windows of kind k > 0, the first k tokens and the others don't see each other; 0 and −100."""
    token = np.arange(N)
    masks = [
        np.where((token < kind)[:, None] == (token < kind), 0, -100).astype(np.float32)
        for kind in (range(windows) if kinds is None else kinds)
    ]
    return np.stack(masks)


@dataclass(frozen=True, eq=False)
class WindowBlock:
    """x + reverse(attention(partition(norm(x)))), spelled as torch exports timm's Swin.

    Attributes:
        bias: position bias [H,N,N], or None.
        mask: [W,N,N], or None.
    """

    windows: Windows = Windows()
    bias: Floats | None = None
    mask: Floats | None = None
    weights: Weights = WEIGHTS

    def draw(self, g: GraphBuilder) -> str:
        """[B,h·w,D]; `g.x` is its input."""
        normed = g.op("LayerNormalization", g.x, np.linspace(0.5, 2, D).astype(np.float32), epsilon=EPSILON)
        reversed_ = self.windows.reverse(g, self.attention(g, self.windows.partition(g, normed)))
        return g.op("Add", g.x, reversed_)

    def attention(self, g: GraphBuilder, x: str) -> str:
        """[B·W,N,D] of [B·W,N,D]: scores biased and masked, merged heads projected."""
        weights = self.weights
        linears = (weights.query, weights.key, weights.value)
        flat = g.op("MatMul", x, np.concatenate([linear.matrix for linear in linears], axis=1))
        flat = g.op("Add", flat, np.concatenate([_bias(linear).reshape(-1) for linear in linears]))
        stacked = g.op("Transpose", g.op("Reshape", flat, ints(-1, N, 3, H, HEAD_DIM)), perm=[2, 0, 3, 1, 4])
        query, key, value = (g.op("Gather", stacked, np.array(i), axis=0) for i in range(3))
        scaled = g.op("Mul", query, scalar(SCALE))
        scores = g.op("MatMul", scaled, g.op("Transpose", key, perm=[0, 1, 3, 2]))
        if self.bias is not None:
            scores = g.op("Add", scores, self.bias[None])
        if self.mask is not None:
            by_image = g.op("Reshape", scores, ints(-1, self.windows.count, H, N, N))
            masked = g.op("Add", by_image, self.mask[None, :, None])
            scores = g.op("Reshape", masked, ints(-1, H, N, N))
        context = g.op("MatMul", g.op("Softmax", scores, axis=-1), value)
        merged = g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), ints(-1, N, C))
        return g.op("MatMul", merged, weights.out)

    def forward(self, images: Floats, frozen: IntegerMaps | None = None) -> Floats:
        """Logits [B,CLASSES], without ONNX; windows must divide the image."""
        batch, count, order = len(images), self.windows.count, self.windows.tokens()
        x = images.reshape(batch, 3, -1).transpose(0, 2, 1) @ PATCH + GRID_POSITIONS
        centred = x - x.mean(axis=-1, keepdims=True)
        gain = np.linspace(0.5, 2, D)
        normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON) * gain
        windows = normed[:, order].reshape(batch, count, N, D)
        q, k, v = (
            np.einsum("bwnd,dhj->bwhnj", windows, linear.weight) + _bias(linear)[:, None]
            for linear in (self.weights.query, self.weights.key, self.weights.value)
        )
        scores = SCALE * q @ k.swapaxes(-1, -2) + (0 if self.bias is None else self.bias)
        scores = scores + (0 if self.mask is None else self.mask[:, None])
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        maps = powers / powers.sum(axis=-1, keepdims=True)
        for index, head in enumerate(frozen.heads if frozen is not None else ()):
            assert frozen is not None
            constant = (frozen.integers[index] * frozen.scales[index, ..., None])[list(frozen.windows)]
            mask = np.ones((N, 1), np.bool_) if frozen.mask is None else frozen.mask[index].reshape(N, -1)
            maps[:, :, head] = np.where(mask, constant, maps[:, :, head])
        branch = (maps @ v).swapaxes(2, 3).reshape(batch, -1, C) @ self.weights.out
        result = (x + branch[:, np.argsort(order)]) * GRID_POSITIONS
        return np.asarray(result.mean(axis=1) @ HEAD, np.float32)

    def model(self, batch: int | str = B) -> onnx.ModelProto:
        """The block, classified by a mean that weighs every token differently."""
        g = GraphBuilder(batch, grid=self.windows.grid)
        tokens = self.windows.grid[0] * self.windows.grid[1]
        return g.classify(g.op("Mul", self.draw(g), GRID_POSITIONS[:tokens]))


def run_unoptimized(model: onnx.ModelProto, images: Floats) -> Floats:
    """Logits float32 [B,classes] of ONNX Runtime with its optimizer off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"image": images})[0])
