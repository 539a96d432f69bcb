"""ONNX models with their data in other files, laid out in the ways that exporters and people do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import numpy_helper

from eamdeploy.parity.reference_set import ReferenceSet, reference_path

Place = Callable[[int, onnx.TensorProto], str]
"""The data file of a tensor, by its number and itself."""


def one_file(_: int, __: onnx.TensorProto) -> str:
    return "weights.bin"


def three_files(number: int, _: onnx.TensorProto) -> str:
    return ("a.bin", "sub/b.bin", "sub/deeper/c.bin")[number % 3]


def file_each(number: int, _: onnx.TensorProto) -> str:
    return f"weights/{number}"


LAYOUTS: dict[str, Place] = {"one file": one_file, "three in folders": three_files, "one for each": file_each}


def split(
    model: onnx.ModelProto,
    path: Path,
    place: Place = one_file,
    *,
    gap: int = 0,
    lengths: bool = True,
    at_least: int = 100,
    shapes: bool = True,
) -> Path:
    """`model` is at `path`, its tensors of at least so many bytes in other files; written without our code.

    Args:
        gap: bytes in front of each tensor, so that no offset is 0.
        lengths: say how long each is; else it follows from the shape.
        shapes: int64 tensors too, which ONNX Runtime takes inside the model only.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    number = 0
    for tensor in constants(copy):
        data = numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data
        if len(data) < at_least or (not shapes and tensor.data_type == onnx.TensorProto.INT64):
            continue
        location = place(number, tensor)
        number += 1
        file = path.parent / location
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as stream:
            stream.write(b"\xee" * gap)
            offset = stream.tell()
            stream.write(data)
        for name in ("raw_data", "float_data", "int32_data", "int64_data"):
            tensor.ClearField(name)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        entries = {"location": location} | ({"offset": str(offset)} if offset else {})
        for key, value in (entries | ({"length": str(len(data))} if lengths else {})).items():
            tensor.external_data.add(key=key, value=value)
    assert number
    path.write_bytes(copy.SerializeToString())
    return path


def data_files(path: Path) -> list[Path]:
    """The files that the tensors of the model at `path` are in."""
    model = onnx.load(path, load_external_data=False)
    names = {entry.value for item in constants(model) for entry in item.external_data if entry.key == "location"}
    return [path.parent / name for name in sorted(names)]


def constants(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Initializers, and the values of Constant nodes."""
    yield from model.graph.initializer
    for node in model.graph.node:
        if node.op_type == "Constant":
            yield from (item.t for item in node.attribute if item.name == "value")


def copy_reference(model: Path, folder: Path) -> None:
    """`folder` has the reference set of `model`, which no longer says which file it was written with."""
    references = ReferenceSet.load(reference_path(model))
    replace(references, model_digest=None).save(folder / reference_path(model).name)
