"""The arithmetic floor of a model: its multiply-adds ÷ the largest rate of products that this machine reaches.

The rate is that of ONNX Runtime's own kernels on products of the model's sizes and nothing else, in this process and
with as many threads as the engines have. An engine at its floor would do nothing but products, each at the rate of the
best one. An INT8 engine has products in FP32 too, mostly those of live attention; its floor takes all of them for INT8.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from eamdeploy.artifacts.records import Record
from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.operator_set import STANDARD_DOMAINS

Arithmetic = Literal["fp32", "int8"]

PRODUCTS = ("MatMul", "Gemm", "Conv")
_CHAIN = 8  # products in one run, so that starting a run costs little beside them
_OPSET = 17


@dataclass(frozen=True)
class Product:
    """`groups` products of a matrix [M, K] by a matrix [K, N], for one image.

    Attributes:
        constant: whether the second one is a weight; otherwise both depend on the image.
    """

    groups: int
    M: int
    K: int
    N: int
    constant: bool

    @property
    def multiply_adds(self) -> int:
        return self.groups * self.M * self.K * self.N


class Peak(Record):
    """The largest rate reached.

    Attributes:
        size: M, K, N of the products that reached it.
    """

    arithmetic: Arithmetic
    multiply_adds_per_s: float
    size: tuple[int, int, int]


def count_multiply_adds(model: onnx.ModelProto) -> int:
    """Multiply-adds of all MatMul, Gemm and Conv nodes for one image.

    Raises:
        UnsupportedGraph: as `products`.
    """
    return sum(product.multiply_adds for product in products(model))


def products(model: onnx.ModelProto) -> Iterator[Product]:
    """Every MatMul, Gemm and Conv of the model for one image, in the graph's order.

    Raises:
        UnsupportedGraph: onnx can't infer the shapes of one.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del fixed.graph.value_info[:]  # of any batch, where the exporter wrote them
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]  # an unknown one is 0
        for value in (*graph.value_info, *graph.input, *graph.output)
    }
    constants = {tensor.name for tensor in graph.initializer}
    shapes.update({tensor.name: list(tensor.dims) for tensor in graph.initializer})
    for node in graph.node:
        if node.op_type in PRODUCTS and node.domain in STANDARD_DOMAINS:
            operands = [shapes.get(name, [0]) for name in (*node.input[:2], node.output[0])]
            if not all(all(shape) for shape in operands):
                raise UnsupportedGraph(f"the shapes of {node.op_type} {node.name} can't be inferred", got=operands)
            yield _product(node, *operands, constant=node.input[1] in constants)


def _product(node: onnx.NodeProto, left: list[int], right: list[int], out: list[int], *, constant: bool) -> Product:
    if node.op_type == "Conv":  # right [N, channels of a group, *kernel], out [1, N, *places]
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        return Product(groups, math.prod(out[2:]), math.prod(right[1:]), out[1] // groups, constant)
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return Product(1, out[0], left[0 if transposed else 1], out[1], constant)
    if len(right) == 2:  # a linear layer: all rows of the input in one product
        return Product(1, math.prod(out[:-1]), left[-1], out[-1], constant)
    return Product(math.prod(out[:-2]), out[-2], left[-1], out[-1], constant)


def measure_peak(sizes: Sequence[Product], arithmetic: Arithmetic, *, threads: int, batch: int, seconds: float) -> Peak:
    """The largest rate of the fastest run of any of these sizes, each timed for `seconds`, once it has run."""
    wanted = sorted({(product.M * batch, product.K, product.N) for product in sizes if product.constant})
    best, size = max((_rate(_chain(*size, arithmetic), size, threads, seconds), size) for size in wanted)
    return Peak(arithmetic=arithmetic, multiply_adds_per_s=best, size=size)


def _rate(model: onnx.ModelProto, size: tuple[int, int, int], threads: int, seconds: float) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as in every session of `OrtRunner`
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    dtype = np.float32 if session.get_inputs()[0].type == "tensor(float)" else np.uint8
    feed = {"x": np.random.default_rng(0).integers(0, 2, size[:2]).astype(dtype)}
    session.run(None, feed)
    times: list[float] = []
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return _CHAIN * math.prod(size) / min(times)


def _chain(M: int, K: int, N: int, arithmetic: Arithmetic) -> onnx.ModelProto:
    """x [M, K] times weights [K, N], [N, K], [K, N] …: all of one size, there and back again."""
    rng = np.random.default_rng(0)
    names = ["x", *(f"x{index}" for index in range(1, _CHAIN + 1))]
    constants: dict[str, NDArray[np.generic]] = {}
    if arithmetic == "int8":
        constants["scale"] = np.array(0.02, np.float32)
        constants["middle"], constants["zero"] = np.array(128, np.uint8), np.array(0, np.int8)
    nodes = []
    for index, (data, out) in enumerate(itertools.pairwise(names)):
        shape, weight = (K, N) if index % 2 == 0 else (N, K), f"w{index}"
        if arithmetic == "fp32":
            # of such a size that the values neither grow nor vanish into denormals
            constants[weight] = (rng.standard_normal(shape) / math.sqrt(shape[0])).astype(np.float32)
            nodes.append(helper.make_node("MatMul", [data, weight], [out]))
        else:
            constants[weight] = rng.integers(-127, 128, shape).astype(np.int8)
            operands = [data, "scale", "middle", weight, "scale", "zero", "scale", "middle"]
            nodes.append(helper.make_node("QLinearMatMul", operands, [out]))
    kind = TensorProto.FLOAT if arithmetic == "fp32" else TensorProto.UINT8
    values = [helper.make_tensor_value_info(name, kind, [M, K]) for name in (names[0], names[-1])]
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "products", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=8)
