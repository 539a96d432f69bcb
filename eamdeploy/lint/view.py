"""An ONNX model as rules look at it: who writes a tensor, who reads it, its type, shape and constant value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from eamdeploy.graph.operator_set import STANDARD_DOMAINS, operator_set
from eamdeploy.graph.weights import infer_shapes


@dataclass(frozen=True, eq=False)
class GraphView:
    """A model with its types and shapes inferred, subgraphs included.

    Attributes:
        nodes: all, in the file's order; a node without a name is called by its first output.
        inputs, outputs: of the whole model, without initializers.
        initializers: constants by tensor name, those of `Constant` nodes included.
        types: element type by tensor name, where known.
        shapes: by tensor name, where the rank is known; a size is a number, a symbol or None.
        writer, readers: nodes by tensor name.
    """

    opset: int
    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[onnx.ValueInfoProto, ...]
    outputs: tuple[onnx.ValueInfoProto, ...]
    initializers: dict[str, onnx.TensorProto]
    types: dict[str, int]
    shapes: dict[str, tuple[int | str | None, ...]]
    writer: dict[str, onnx.NodeProto]
    readers: dict[str, list[onnx.NodeProto]]

    def ops(self, *names: str) -> Iterator[onnx.NodeProto]:
        """The nodes with one of these standard operators."""
        return (node for node in self.nodes if node.op_type in names and node.domain in STANDARD_DOMAINS)

    def value(self, name: str) -> NDArray[Any] | None:
        """The constant of that name, or None if the tensor is none."""
        return onnx.numpy_helper.to_array(self.initializers[name]) if name in self.initializers else None

    def rank(self, name: str) -> int | None:
        """How many axes a tensor has, where that is known."""
        return len(self.shapes[name]) if name in self.shapes else None


def view(model: onnx.ModelProto) -> GraphView:
    """`model` with whatever types and shapes inference can tell; a model with errors keeps those that it states."""
    try:
        inferred = infer_shapes(model)
    except (onnx.shape_inference.InferenceError, RuntimeError):
        inferred = model
    graphs = list(_graphs(inferred.graph))
    nodes = [node for graph in graphs for node in graph.node]
    initializers = {item.name: item for graph in graphs for item in graph.initializer}
    constants = [node for node in nodes if node.op_type == "Constant"]
    initializers |= {node.output[0]: item.t for node in constants for item in node.attribute if item.name == "value"}
    infos = [info for graph in graphs for info in (*graph.input, *graph.output, *graph.value_info)]
    shapes = {info.name: _shape(info) for info in infos if info.type.tensor_type.HasField("shape")}
    writer = {name: node for node in nodes for name in node.output if name}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in nodes:
        for name in dict.fromkeys(node.input):
            readers[name].append(node)
    return GraphView(
        opset=operator_set(model),
        nodes=tuple(nodes),
        inputs=tuple(info for info in inferred.graph.input if info.name not in initializers),
        outputs=tuple(inferred.graph.output),
        initializers=initializers,
        types={info.name: info.type.tensor_type.elem_type for info in infos}
        | {name: item.data_type for name, item in initializers.items()},
        shapes=shapes | {name: tuple(item.dims) for name, item in initializers.items()},
        writer=writer,
        readers=readers,
    )


def name_of(node: onnx.NodeProto) -> str:
    """What people call a node."""
    return str(node.name or next((name for name in node.output if name), node.op_type))


def type_name(data_type: int) -> str:
    """`UINT8` for 2, and so on."""
    return str(onnx.TensorProto.DataType.Name(data_type))


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    found = next((item for item in node.attribute if item.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def optional_input(node: onnx.NodeProto, index: int) -> str:
    """The name of a node's input, empty where it is left out."""
    return node.input[index] if index < len(node.input) else ""


def is_scalar(values: NDArray[Any] | None) -> bool:
    """Whether that is a constant of one number."""
    return values is not None and np.size(values) == 1


def _shape(info: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    sizes: Sequence[Any] = info.type.tensor_type.shape.dim
    return tuple(size.dim_value if size.HasField("dim_value") else size.dim_param or None for size in sizes)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """`graph` and those in the attributes of its nodes, at any depth."""
    yield graph
    for node in graph.node:
        for item in node.attribute:
            for inner in (*((item.g,) if item.HasField("g") else ()), *item.graphs):
                yield from _graphs(inner)
