"""Frozen heads that look at few neighbours, as small ONNX graphs: by a product, and by convolution.

Each graph has several layers side by side, each with constants of its own, as in a model. A layer
takes the values `[1, N, F·d]` as their linear layer gives them, and returns them mixed, as the
output projection wants them. Of N = 1 + g² tokens the first is the class token. For patches i, j:

    F[i, j] = scale[i] · kernel[j − i]     F[i, 0] = column[i]     F[0, ·] = row

    map       v ─Reshape─Transpose─ [1,F,N,d] ─MatMul F─ [1,F,N,d] ─Transpose─Reshape─▶
    channels  v ─Transpose─ [1,F·d,N]   patches [1,F·d,g,g], a kernel for each channel
    heads     v ─Reshape─Transpose─ [1,d,F,N]   patches [d,F,g,g], a kernel for each head

    both      ──┬─Slice patches ──Conv─(Mul scale)──┐
                ├─Slice class token ──Mul column────Add──┐
                └─MatMul row, or Mul and ReduceSum───────Concat ─Transpose─▶
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Form: TypeAlias = Literal["channels", "heads"]
FORMS: Final[tuple[Form, ...]] = get_args(Form)

_OPSET = 17
Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LocalHeads:
    """The heads of one layer.

    Attributes:
        kernel: float32 [F, K, K], K odd.
        scale: float32 [F, g²]; None for 1.
        column: float32 [F, g²].
        row: float32 [F, 1 + g²].
    """

    kernel: Floats
    scale: Floats | None
    column: Floats
    row: Floats

    @property
    def grid(self) -> int:
        """g."""
        return round(self.column.shape[1] ** 0.5)

    def maps(self) -> Floats:
        """F, float32 [F, N, N]."""
        heads, size, _ = self.kernel.shape
        grid, reach = self.grid, size // 2
        padded = np.zeros((heads, grid, grid, grid + 2 * reach, grid + 2 * reach), np.float32)
        for y in range(grid):
            for x in range(grid):
                padded[:, y, x, y : y + size, x : x + size] = self.kernel
        inside = padded[:, :, :, reach : reach + grid, reach : reach + grid].reshape(heads, grid**2, grid**2)
        if self.scale is not None:
            inside = inside * self.scale[:, :, None]
        rows = np.concatenate([self.column[:, :, None], inside], axis=2)
        return np.concatenate([self.row[:, None], rows], axis=1)


def drawn(rng: np.random.Generator, heads: int, grid: int, size: int, *, scaled: bool) -> LocalHeads:
    """Random heads whose rows sum to 1 if `scaled`, and inside of the grid anyway."""
    kernel = rng.uniform(0.1, 1, (heads, size, size)).astype(np.float32)
    column = rng.uniform(0.05, 0.2, (heads, grid**2)).astype(np.float32)
    row = rng.dirichlet(np.ones(1 + grid**2), heads).astype(np.float32)
    kernel /= kernel.sum(axis=(1, 2), keepdims=True)
    if not scaled:
        return LocalHeads(kernel, None, column, row)
    unscaled = LocalHeads(kernel, None, column, row).maps()[:, 1:, 1:].sum(axis=2)
    return LocalHeads(kernel, (1 - column) / unscaled, column, row)


def map_graph(layers: list[LocalHeads], head_dim: int) -> onnx.ModelProto:
    """The layers as products with their maps."""
    writer = _Writer()
    for number, layer in enumerate(layers):
        writer.prefix = f"{number}."
        maps = layer.maps()
        heads, tokens, _ = maps.shape
        split = writer.reshape(writer.input(tokens, heads * head_dim), (1, tokens, heads, head_dim))
        values = writer.node("Transpose", [split], perm=[0, 2, 1, 3])
        mixed = writer.node("MatMul", [writer.constant(maps[None]), values])
        back = writer.node("Transpose", [mixed], perm=[0, 2, 1, 3])
        writer.output(writer.reshape(back, (1, tokens, heads * head_dim)), tokens, heads * head_dim)
    return writer.model()


def conv_graph(layers: list[LocalHeads], head_dim: int, form: Form) -> onnx.ModelProto:
    """The layers as convolutions."""
    writer = _Writer()
    for number, layer in enumerate(layers):
        writer.prefix = f"{number}."
        (_channels if form == "channels" else _heads)(writer, layer, head_dim)
    return writer.model()


def _channels(writer: _Writer, layer: LocalHeads, head_dim: int) -> None:
    heads, grid, tokens = len(layer.kernel), layer.grid, 1 + layer.grid**2
    width = heads * head_dim
    values = writer.node("Transpose", [writer.input(tokens, width)], perm=[0, 2, 1])  # [1, F·d, N]
    by_head = writer.reshape(values, (1, heads, head_dim, tokens))
    patches = writer.reshape(writer.slice(by_head, 1, tokens, 3), (1, width, grid, grid))
    kernel = np.repeat(layer.kernel, head_dim, axis=0)[:, None]  # [F·d, 1, K, K]
    near = writer.reshape(writer.conv(patches, kernel), (1, heads, head_dim, grid**2))
    if layer.scale is not None:
        near = writer.node("Mul", [near, writer.constant(layer.scale[None, :, None])])
    column = writer.constant(layer.column[None, :, None])  # [1, F, 1, g²]
    far = writer.node("Mul", [writer.slice(by_head, 0, 1, 3), column])
    answer = writer.node("MatMul", [by_head, writer.constant(layer.row[None, :, :, None])])  # [1, F, d, 1]
    mixed = writer.node("Concat", [answer, writer.node("Add", [near, far])], axis=3)
    back = writer.node("Transpose", [writer.reshape(mixed, (1, width, tokens))], perm=[0, 2, 1])
    writer.output(back, tokens, width)


def _heads(writer: _Writer, layer: LocalHeads, head_dim: int) -> None:
    heads, grid, tokens = len(layer.kernel), layer.grid, 1 + layer.grid**2
    width = heads * head_dim
    split = writer.reshape(writer.input(tokens, width), (1, tokens, heads, head_dim))
    values = writer.node("Transpose", [split], perm=[0, 3, 2, 1])  # [1, d, F, N]
    patches = writer.reshape(writer.slice(values, 1, tokens, 3), (head_dim, heads, grid, grid))
    near = writer.reshape(writer.conv(patches, layer.kernel[:, None]), (1, head_dim, heads, grid**2))
    if layer.scale is not None:
        near = writer.node("Mul", [near, writer.constant(layer.scale[None, None])])
    far = writer.node("Mul", [writer.slice(values, 0, 1, 3), writer.constant(layer.column[None, None])])
    weighted = writer.node("Mul", [values, writer.constant(layer.row[None, None])])
    answer = writer.node("ReduceSum", [weighted, writer.integers([3])], keepdims=1)  # [1, d, F, 1]
    mixed = writer.node("Concat", [answer, writer.node("Add", [near, far])], axis=3)
    back = writer.node("Transpose", [mixed], perm=[0, 3, 2, 1])
    writer.output(writer.reshape(back, (1, tokens, width)), tokens, width)


class _Writer:
    """Collects nodes, constants, inputs and outputs; names are numbered behind `prefix`."""

    def __init__(self) -> None:
        self.prefix = ""
        self._count = 0
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def node(self, operator: str, inputs: list[str], **attributes: object) -> str:
        name = self._name()
        self._nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def constant(self, values: NDArray[np.generic]) -> str:
        name = self._name()
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def integers(self, values: list[int]) -> str:
        return self.constant(np.array(values, np.int64))

    def reshape(self, data: str, shape: tuple[int, ...]) -> str:
        return self.node("Reshape", [data, self.integers(list(shape))])

    def slice(self, data: str, start: int, end: int, axis: int) -> str:
        return self.node("Slice", [data, *(self.integers([each]) for each in (start, end, axis))])

    def conv(self, data: str, kernel: Floats) -> str:
        size = kernel.shape[-1]
        return self.node(
            "Conv",
            [data, self.constant(kernel)],
            group=len(kernel),
            kernel_shape=[size, size],
            pads=[size // 2] * 4,
        )

    def input(self, tokens: int, width: int) -> str:
        self._inputs.append(helper.make_tensor_value_info(self._name(), TensorProto.FLOAT, [1, tokens, width]))
        return self._inputs[-1].name

    def output(self, name: str, tokens: int, width: int) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, tokens, width]))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self._nodes, "local", self._inputs, self._outputs, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model

    def _name(self) -> str:
        self._count += 1
        return f"{self.prefix}{self._count}"
