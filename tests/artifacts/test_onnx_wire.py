"""Reading protobuf's wire format: against the package onnx, and on damaged bytes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from eamdeploy.artifacts.onnx_wire import (
    OutsideTensor,
    Slice,
    WireError,
    data_inside,
    data_outside,
    outside_tensors,
    with_replaced,
)

DATA = bytes(range(64))


def outside(name: str, location: str = "x.data") -> TensorProto:
    """A tensor of 16 floats whose data lies elsewhere."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "8", "length": "64"}.items():
        tensor.external_data.add(key=key, value=value)
    tensor.doc_string = "kept"
    return tensor


def model() -> onnx.ModelProto:
    """A model with some constants of its own."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "inside"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 4])],
        [numpy_helper.from_array(np.arange(40_000, dtype=np.float32), "inside")],
    )
    made = helper.make_model(graph, producer_name="location")
    helper.set_model_props(made, {"location": "no tensor says that"})
    return made


def initializer(made: onnx.ModelProto) -> None:
    made.graph.initializer.insert(0, outside("t"))


def sparse_values(made: onnx.ModelProto) -> None:
    made.graph.sparse_initializer.add(values=outside("t"), dims=[9])


def sparse_indices(made: onnx.ModelProto) -> None:
    made.graph.sparse_initializer.add(indices=outside("t"), dims=[9])


def constant_node(made: onnx.ModelProto) -> None:
    made.graph.node.append(helper.make_node("Constant", [], ["c"], value=outside("t")))


def list_of_tensors(made: onnx.ModelProto) -> None:
    made.graph.node.add().attribute.add(name="many", type=onnx.AttributeProto.TENSORS).tensors.append(outside("t"))


def sparse_attributes(made: onnx.ModelProto) -> None:
    attribute = made.graph.node.add().attribute.add(name="s", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(outside("t"))


def list_of_sparse(made: onnx.ModelProto) -> None:
    attribute = made.graph.node.add().attribute.add(name="s", type=onnx.AttributeProto.SPARSE_TENSORS)
    attribute.sparse_tensors.add().indices.CopyFrom(outside("t"))


def branch_of_a_branch(made: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [outside("t")])
    middle = helper.make_graph([helper.make_node("If", ["c"], ["d"], then_branch=inner)], "middle", [], [])
    made.graph.node.append(helper.make_node("If", ["c"], ["e"], else_branch=middle))


def list_of_graphs(made: onnx.ModelProto) -> None:
    attribute = made.graph.node.add().attribute.add(name="gs", type=onnx.AttributeProto.GRAPHS)
    attribute.graphs.add().initializer.append(outside("t"))


def function(made: onnx.ModelProto) -> None:
    made.functions.add(name="f").node.append(helper.make_node("Constant", [], ["c"], value=outside("t")))


def default_of_a_function(made: onnx.ModelProto) -> None:
    made.functions.add(name="f").attribute_proto.append(helper.make_attribute("a", outside("t")))


def training(made: onnx.ModelProto) -> None:
    made.training_info.add().initialization.initializer.append(outside("t"))


def training_step(made: onnx.ModelProto) -> None:
    made.training_info.add().algorithm.initializer.append(outside("t"))


PLACES: list[Callable[[onnx.ModelProto], None]] = [
    *(initializer, sparse_values, sparse_indices, constant_node, list_of_tensors, sparse_attributes, list_of_sparse),
    *(branch_of_a_branch, list_of_graphs, function, default_of_a_function, training, training_step),
]


def found(data: bytes) -> list[OutsideTensor]:
    return outside_tensors(io.BytesIO(data), len(data))


@pytest.mark.parametrize("put", PLACES, ids=lambda put: put.__name__)
def test_a_tensor_is_found_and_replaced_wherever_it_is(put: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    made = model()
    put(made)
    data = made.SerializeToString()
    assert found(data) == [OutsideTensor("t", {"location": "x.data", "offset": "8", "length": "64"}, 64)]
    (tmp_path / "x.data").write_bytes(bytes(8) + DATA)
    pieces = with_replaced(io.BytesIO(data), len(data), lambda _: data_inside(Slice(tmp_path / "x.data", 8, 64)))
    joined = b"".join(piece if isinstance(piece, bytes) else DATA for piece in pieces)
    expected = outside("t")
    del expected.external_data[:]
    expected.ClearField("data_location")
    expected.raw_data = DATA
    assert not found(joined)
    again = onnx.ModelProto.FromString(joined)
    assert _without(again, "t") == _without(made, "t") and _tensors(again)["t"] == expected


def _tensors(message: object) -> dict[str, TensorProto]:
    """Every TensorProto inside a message by name, found by protobuf's own reflection."""
    if isinstance(message, TensorProto):
        return {message.name: message}
    result: dict[str, TensorProto] = {}
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        if field.message_type is not None:
            for item in value if hasattr(value, "append") or hasattr(value, "add") else [value]:
                result |= _tensors(item)
    return result


def _without(made: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """A copy in which that tensor has its name only."""
    copy = onnx.ModelProto()
    copy.CopyFrom(made)
    tensor = _tensors(copy)[name]
    tensor.Clear()
    tensor.name = name
    return copy


@pytest.mark.parametrize("put", PLACES, ids=lambda put: put.__name__)
def test_another_place_for_the_data_changes_nothing_else(put: Callable[[onnx.ModelProto], None]) -> None:
    made = model()
    put(made)
    data = made.SerializeToString()
    location = "a longer name, ä, than before.data" * 5
    pieces = with_replaced(io.BytesIO(data), len(data), lambda _: data_outside(location, 1 << 40, 7))
    again = onnx.ModelProto.FromString(b"".join(piece for piece in pieces if isinstance(piece, bytes)))
    assert _without(again, "t") == _without(made, "t")
    entries = {entry.key: entry.value for entry in _tensors(again)["t"].external_data}
    assert entries == {"location": location, "offset": str(1 << 40), "length": "7"}


def test_a_model_without_such_tensors_stays_byte_for_byte() -> None:
    data = model().SerializeToString()
    assert found(data) == []
    assert with_replaced(io.BytesIO(data), len(data), lambda _: []) == [data]


def test_data_that_is_ignored_where_the_tensor_is_elsewhere_is_left_out() -> None:
    made = model()
    tensor = outside("t")
    tensor.raw_data = b"stale"
    made.graph.initializer.append(tensor)
    data = made.SerializeToString()
    pieces = with_replaced(io.BytesIO(data), len(data), lambda _: data_inside(Slice(Path("x"), 0, 64)))
    joined = b"".join(piece if isinstance(piece, bytes) else DATA for piece in pieces)
    assert onnx.ModelProto.FromString(joined).graph.initializer[1].raw_data == DATA


@pytest.mark.parametrize("name", sorted(set(dict(TensorProto.DataType.items())) - {"UNDEFINED"}))
def test_bytes_by_shape_and_type_are_onnxs(name: str) -> None:
    element = TensorProto.DataType.Value(name)
    made = model()
    tensor = outside("t")
    tensor.data_type, tensor.dims[:] = element, [3, 5]
    made.graph.initializer.append(tensor)
    (only,) = found(made.SerializeToString())
    if name == "STRING":
        assert only.expected_bytes is None
        return
    dtype = helper.tensor_dtype_to_np_dtype(element)
    packed = helper.make_tensor("t", element, [3, 5], np.zeros(15, dtype), raw=False)
    made.graph.initializer[-1].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(packed)))
    assert only.expected_bytes == len(made.graph.initializer[-1].raw_data)


def test_dimensions_written_together_count_too() -> None:
    """protobuf's proto3 writers pack them; proto2 readers take both."""
    made = model()
    tensor = outside("t")
    del tensor.dims[:]
    packed = tensor.SerializeToString() + b"\x0a\x03\x03\x90\x4e"  # [3, 10000]
    made.graph.initializer.append(TensorProto(name="MARK"))
    mark = made.graph.initializer[-1].SerializeToString()
    data = made.graph.SerializeToString().replace(
        b"\x2a" + bytes([len(mark)]) + mark, b"\x2a" + bytes([len(packed)]) + packed
    )
    whole = b"\x3a" + _varint(len(data)) + data
    assert onnx.ModelProto.FromString(whole).graph.initializer[1].dims == [3, 10000]
    assert [each.expected_bytes for each in found(whole)] == [120_000]


def _varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + _varint(value >> 7) if value > 0x7F else bytes([value])


# --- damaged ----------------------------------------------------------------------------------------------------------

WHOLE = model()
for each in PLACES[:5]:
    each(WHOLE)
BYTES = WHOLE.SerializeToString()


class Counting(io.BytesIO):
    """Notes the largest piece that was asked for."""

    largest = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.largest = max(self.largest, len(data))
        return data


def read_damaged(data: bytes) -> None:
    """Whatever the bytes are, it ends soon, by a `WireError` or not, and reads no tensor's data."""
    stream = Counting(data)
    start = time.monotonic()
    with suppress(WireError):
        outside_tensors(stream, len(data))
    assert time.monotonic() - start < 5 and stream.largest <= 1 << 16


@settings(deadline=None, max_examples=150)
@given(st.integers(0, len(BYTES)))
def test_a_model_that_ends_early(end: int) -> None:
    read_damaged(BYTES[:end])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.integers(0, len(BYTES) - 1), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_model_with_flipped_bytes(flips: list[tuple[int, int]]) -> None:
    data = bytearray(BYTES)
    for at, value in flips:
        data[at] = value
    read_damaged(bytes(data))


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    read_damaged(b"\x3a\xff\xff\x07" + data + b"location" + bytes(1 << 17))


@pytest.mark.parametrize(
    "data",
    [
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + b"location",  # a graph of 2**63 bytes
        b"\xff" * 20 + b"location",  # a number without an end
        b"\x00\x00location",  # field 0
        b"\x0f\x00location",  # a wire type that there is not
        b"\x0clocation",  # a group that ends before it begins
        b"\x0blocation",  # and one that never ends
        b"\x08location\x88",  # a number cut off
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        found(data)


def test_groups_are_stepped_over() -> None:
    """ONNX has none, but protobuf reads them."""
    made = model()
    initializer(made)
    data = made.SerializeToString() + b"\xa3\x06\x3a\x01\x00\xa4\x06"  # group 100 with a field 7 in it
    assert onnx.ModelProto.FromString(data).graph == made.graph
    assert len(found(data)) == 1


def test_nesting_without_an_end_is_refused() -> None:
    data = b"location"
    for _ in range(200):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute.g ─ node.attribute ─ graph.node
            data = tag + _varint(len(data)) + data
    with pytest.raises(WireError, match="too deep"):
        found(b"\x3a" + _varint(len(data)) + data)
