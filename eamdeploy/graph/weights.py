"""Models of any size: what protobuf and onnx's own functions take up to 2 GiB only is done here without the weights.

Up to `onnx_files.ONE_FILE_BYTES` everything is what onnx does by itself. Above, a *slim* copy of the model stands in
for it: with all nodes and types, and initializers that say where in a second file their data would be.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import numpy_helper

from eamdeploy.artifacts import onnx_files
from eamdeploy.artifacts.onnx_files import OUTSIDE_BYTES, DataLayout, ModelData, data_path
from eamdeploy.artifacts.onnx_wire import tensor_bytes
from eamdeploy.errors import UnsupportedGraph

_NAME = "model.onnx"


@dataclass(frozen=True)
class Slim:
    """A model without its weights.

    Attributes:
        model: a copy with all the rest, whose large initializers have their data in `data_path(_NAME)`.
        weights: these initializers, with data, by offset; they are the original's own.
        data_bytes: of the file that would hold them.
    """

    model: onnx.ModelProto
    weights: dict[int, onnx.TensorProto]
    data_bytes: int


def fits_one_file(model: onnx.ModelProto) -> bool:
    """Whether `model` can be serialized in one piece."""
    if sum(map(_weight_bytes, model.graph.initializer)) > onnx_files.ONE_FILE_BYTES:
        return False
    try:
        return bool(model.ByteSize() <= onnx_files.ONE_FILE_BYTES)
    except Exception:  # noqa: BLE001 (protobuf's own, of what it can't count)
        return False


def serialize(model: onnx.ModelProto) -> ModelData:
    """`model` as one file, or where it is too large for that as two.

    Raises:
        UnsupportedGraph: it is too large outside its initializers.
    """
    if fits_one_file(model):
        return ModelData(model.SerializeToString(deterministic=True))
    slim = without_weights(model)
    try:
        data = slim.model.SerializeToString(deterministic=True)
    except Exception as err:  # protobuf's own
        raise UnsupportedGraph(
            "a model of more than 2 GB can't be written", expected="its weights as initializers"
        ) from err
    return ModelData(data, {offset: _data_of(item) for offset, item in slim.weights.items()})


def deserialize(data: ModelData) -> onnx.ModelProto:
    """The model with all its weights in memory; a tensor whose data `data` has not stays without.

    Raises:
        Exception: protobuf's own, where it is no model.
    """
    model = onnx.load_model_from_string(data.model)
    for item in tensors_of(model):
        raw = data.tensor_data(_offset(item)) if _is_outside(item) else None
        if raw is not None:
            item.raw_data = raw
            item.data_location = onnx.TensorProto.DEFAULT
            del item.external_data[:]
    return model


def has_data_elsewhere(model: onnx.ModelProto) -> bool:
    """Whether a tensor's data is still in another file."""
    return any(map(_is_outside, tensors_of(model)))


def infer_shapes(model: onnx.ModelProto, *, strict: bool = False) -> onnx.ModelProto:
    """A copy of `model` with the types and shapes that onnx infers; above the limit `model` itself, with them.

    Raises:
        onnx.shape_inference.InferenceError: `strict` and the model contradicts itself.
    """
    if fits_one_file(model):
        return onnx.shape_inference.infer_shapes(model, strict_mode=strict, data_prop=True)
    inferred = onnx.shape_inference.infer_shapes(without_weights(model).model, strict_mode=strict, data_prop=True)
    for field in ("value_info", "output"):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(getattr(inferred.graph, field))
    return model  # a copy would be another few gigabytes


def check_model(model: onnx.ModelProto) -> None:
    """`model` passes `onnx.checker` with full shape inference.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: it does not.
    """
    if fits_one_file(model):
        onnx.checker.check_model(model, full_check=True)
        return
    slim = without_weights(model)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / _NAME
        path.write_bytes(slim.model.SerializeToString())
        with data_path(path).open("wb") as file:
            file.truncate(slim.data_bytes)  # takes no room: the checker reads none of it
        onnx.checker.check_model(str(path), full_check=True)


def without_weights(model: onnx.ModelProto) -> Slim:
    """A copy of `model` with the data of its large initializers elsewhere."""
    copy = onnx.ModelProto()
    layout = DataLayout()
    weights: dict[int, onnx.TensorProto] = {}
    for field, value in model.ListFields():
        if field.name != "graph":
            _copy_field(copy, field.name, value)
    copy.graph.SetInParent()
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _copy_field(copy.graph, field.name, value)
    for item in model.graph.initializer:
        length = tensor_bytes(item.dims, item.data_type)  # to look at the data would copy it
        if length is None or length < OUTSIDE_BYTES:
            copy.graph.initializer.add().CopyFrom(item)
            continue
        offset = layout.place(length)
        weights[offset] = item
        copy.graph.initializer.append(_pointing(item, offset, length))
    return Slim(copy, weights, layout.end)


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """All constants: initializers, sparse ones, and those in attributes, at any depth and in functions."""
    yield from _in_graph(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _in_node(node)


def _in_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _in_node(node)


def _in_node(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for item in node.attribute:
        if item.HasField("t"):
            yield item.t
        yield from item.tensors
        for sparse in (*((item.sparse_tensor,) if item.HasField("sparse_tensor") else ()), *item.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (*((item.g,) if item.HasField("g") else ()), *item.graphs):
            yield from _in_graph(graph)


def _copy_field(message: onnx.ModelProto | onnx.GraphProto, name: str, value: object) -> None:
    if hasattr(value, "extend"):
        getattr(message, name).extend(value)
    elif hasattr(value, "CopyFrom"):
        getattr(message, name).CopyFrom(value)
    else:
        setattr(message, name, value)


def _pointing(item: onnx.TensorProto, offset: int, length: int) -> onnx.TensorProto:
    """A tensor like `item` whose data is elsewhere."""
    outside = onnx.TensorProto(
        name=item.name, data_type=item.data_type, dims=item.dims, data_location=onnx.TensorProto.EXTERNAL
    )
    entries = {"location": data_path(Path(_NAME)).name, "offset": str(offset), "length": str(length)}
    for key, value in entries.items():
        outside.external_data.add(key=key, value=value)
    return outside


def _weight_bytes(item: onnx.TensorProto) -> int:
    """About what a constant takes; without a copy of it, which protobuf makes to count its bytes."""
    by_shape = tensor_bytes(item.dims, item.data_type) if item.HasField("raw_data") else None
    return int(item.ByteSize()) if by_shape is None else by_shape


def _data_of(item: onnx.TensorProto) -> bytes:
    if item.HasField("raw_data"):
        return bytes(item.raw_data)
    return bytes(numpy_helper.from_array(numpy_helper.to_array(item)).raw_data)


def _is_outside(item: onnx.TensorProto) -> bool:
    return bool(item.data_location == onnx.TensorProto.EXTERNAL)


def _offset(item: onnx.TensorProto) -> int:
    return next((int(entry.value) for entry in item.external_data if entry.key == "offset"), -1)
