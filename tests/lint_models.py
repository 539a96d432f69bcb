"""Small ONNX models written as text, for tests of the linter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.lint.base import Finding
from eamdeploy.lint.linter import lint

ROWS, KEYS = 4, 6

ATTENTION = {
    "query": np.ones((2, 1, 8, 32), np.float32),
    "scale": np.array(0.25, np.float32),
}


def model(
    body: str,
    *,
    inputs: str = "float[B,4,6] x",
    outputs: str = "float[B,4,6] y",
    opset: int = 17,
    **constants: NDArray[Any] | onnx.TensorProto,
) -> onnx.ModelProto:
    """A model of the nodes in `body`, in onnx's text form, with the constants as initializers."""
    header = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>'
    result = parser.parse_model(f"{header} g ({inputs}) => ({outputs}) {{ {body} }}")
    for name, value in constants.items():
        tensor = numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
        tensor.name = name
        result.graph.initializer.append(tensor)
    for node in result.graph.node:
        node.name = f"the {node.op_type}"
    return result


def frozen_map(
    codes: NDArray[Any] | onnx.TensorProto | None = None,
    scales: NDArray[Any] | onnx.TensorProto | None = None,
    zero_points: NDArray[Any] | None = None,
    *,
    attributes: str = "<axis = 0>",
    opset: int = 17,
    node: str = "DequantizeLinear",
) -> onnx.ModelProto:
    """A constant behind a DequantizeLinear, added to the input; TensorRT 8.6 and later take it as it stands."""
    return model(
        f"f = {node} {attributes} (codes, scales, zeros) y = Add (x, f)",
        opset=opset,
        codes=np.ones((ROWS, KEYS), np.int8) if codes is None else codes,
        scales=np.full(ROWS, 0.5, np.float32) if scales is None else scales,
        zeros=np.zeros(ROWS, np.int8) if zero_points is None else zero_points,
    )


def attention(scores: str = "", context: str = "c = MatMul (a, v)", head_size: int = 32) -> onnx.ModelProto:
    """One attention; `scores` leads from the product `p` to the softmax's input `s`."""
    spelled = f"p = MatMul (q, k) {scores or 's = Identity (p)'} a = Softmax <axis = -1> (s) {context}"
    return model(
        spelled,
        inputs=f"float[B,2,8,{head_size}] q, float[B,2,{head_size},8] k, float[B,2,8,{head_size}] v",
        outputs=f"float[B,2,8,{head_size}] c",
        factor=np.array(0.25, np.float32),
        bias=np.zeros((1, 2, 8, 8), np.float32),
        mask=np.arange(64).reshape(8, 8) % 3 == 0,
        map=np.full((1, 2, 8, 8), 0.125, np.float32),
        zero=np.array(0, np.int8),
        step=np.array(0.01, np.float32),
    )


def packed_int4(shape: tuple[int, ...]) -> onnx.TensorProto:
    """An INT4 constant of ones."""
    return helper.make_tensor("int4", onnx.TensorProto.INT4, shape, [1] * int(np.prod(shape)))


def found(made: onnx.ModelProto, version: str) -> list[Finding]:
    return lint(made, TrtVersion.parse(version))
