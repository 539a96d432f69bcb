"""Which tensors of a serialized ONNX model have their data in other files, and the model with that changed.

A board has no package onnx. This module reads protobuf's wire format only as far as tensors go: it skips the data of
each tensor without reading it, and takes from a damaged file neither much memory nor much time.

Source: https://protobuf.dev/programming-guides/encoding; field numbers: onnx.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, TypeAlias

_INNER: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "model": {7: "graph", 20: "training", 25: "function"},
        "training": {1: "graph", 2: "graph"},
        "function": {7: "node", 11: "attribute"},
        "graph": {1: "node", 5: "tensor", 15: "sparse"},
        "node": {5: "attribute"},
        "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
        "sparse": {1: "tensor", 2: "tensor"},
    }
)
"""By kind of message: the fields whose messages hold tensors, at any depth."""

# Of a TensorProto.
_DIMS, _TYPE, _NAME, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 9, 13, 14
_EXTERNAL = 1
_NEEDED = b"location"  # the key without which a tensor's data is in no other file
_KEY, _VALUE = 1, 2

_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_END, _FIXED32 = range(6)
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_MOST_VARINT_BYTES = 10
_MOST_DEPTH = 100  # protobuf's own limit
_MOST_TEXT_BYTES = 1 << 16  # that are read of a tensor's name, or of what says where its data is
_MOST_AXES = 64
_SMALL_BYTES = 1 << 16

_ELEMENT_BITS: Mapping[int, int] = MappingProxyType(
    {
        **dict.fromkeys((1, 6, 12), 32),  # float, int32, uint32
        **dict.fromkeys((7, 11, 13, 14), 64),  # int64, double, uint64, complex64
        **dict.fromkeys((4, 5, 10, 16), 16),  # uint16, int16, float16, bfloat16
        **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),  # uint8, int8, bool, floats of 8 bits
        **dict.fromkeys((21, 22, 23), 4),  # uint4, int4, float4
        **dict.fromkeys((25, 26), 2),  # uint2, int2
        **dict.fromkeys((27, 28), 6),  # floats of 6 bits
        15: 128,  # complex128
    }
)
"""By TensorProto.DataType."""


class WireError(ValueError):
    """The bytes are no ONNX model in protobuf's wire format."""


@dataclass(frozen=True)
class OutsideTensor:
    """A tensor with its data in another file.

    Attributes:
        name: empty where it has none.
        entries: what the model says of the place, by key: `location`, `offset`, `length`.
        expected_bytes: by its shape and type; None for a type that is not known here.
    """

    name: str
    entries: Mapping[str, str]
    expected_bytes: int | None


@dataclass(frozen=True)
class Slice:
    """A part of a file."""

    path: Path
    start: int
    size: int


@dataclass(frozen=True)
class _Span:
    """A part of the model itself."""

    start: int
    size: int


Piece: TypeAlias = bytes | Slice
_Part: TypeAlias = bytes | Slice | _Span
Replace: TypeAlias = Callable[[OutsideTensor], Sequence[Piece]]


@dataclass(frozen=True)
class _Field:
    """A field of a message.

    Attributes:
        at: where its tag begins; `start` and `end` are of its payload.
        value: of a number; 0 for anything else.
    """

    number: int
    wire: int
    at: int
    start: int
    end: int
    value: int


def outside_tensors(stream: BinaryIO, size: int) -> list[OutsideTensor]:
    """The tensors with data in other files: initializers, sparse ones, and those in attributes, at any depth.

    Args:
        stream: the model's bytes; can seek. `size`: how many.

    Raises:
        WireError: it is damaged or no model.
    """
    found: list[OutsideTensor] = []

    def note(tensor: OutsideTensor) -> Sequence[Piece]:
        found.append(tensor)
        return ()

    _changed(stream, "model", _Span(0, size), note, 0)
    return found


def with_replaced(stream: BinaryIO, size: int, replace: Replace) -> list[Piece]:
    """The model with other fields in place of what says where a tensor's data is; everything else is byte for byte.

    Args:
        replace: fields of a TensorProto for each of `outside_tensors`: `data_inside` or `data_outside`.

    Raises:
        WireError: it is damaged or no model.
    """
    parts = _changed(stream, "model", _Span(0, size), replace, 0) or [_Span(0, size)]
    return [_read(stream, part.start, part.size) if isinstance(part, _Span) else part for part in parts]


def data_inside(data: Slice) -> list[Piece]:
    """The field of a tensor that holds its data."""
    return [_tag(_RAW_DATA, _BYTES) + _encoded(data.size), data]


def data_outside(location: str, offset: int, length: int) -> list[Piece]:
    """The fields of a tensor that say where its data is."""
    entries = {"location": location, "offset": str(offset), "length": str(length)}
    fields = (_text(_KEY, key) + _text(_VALUE, value) for key, value in entries.items())
    external = b"".join(_tag(_EXTERNAL_DATA, _BYTES) + _encoded(len(field)) + field for field in fields)
    return [external + _tag(_DATA_LOCATION, _VARINT) + _encoded(_EXTERNAL)]


def tensor_bytes(dims: Iterable[int], element: int) -> int | None:
    """Bytes of a tensor's data by its shape and type (TensorProto.DataType), at most 2**64; None for unknown types."""
    bits = _ELEMENT_BITS.get(element)
    if bits is None:
        return None
    for size in dims:
        bits = min(bits * size, 1 << 67)
    return -(-bits // 8)


def size_of(parts: Sequence[_Part]) -> int:
    """Bytes altogether."""
    return sum(len(part) if isinstance(part, bytes) else part.size for part in parts)


def _changed(stream: BinaryIO, kind: str, message: _Span, replace: Replace, depth: int) -> list[_Part] | None:
    """The message with its outside tensors replaced; None where it has none."""
    if depth > _MOST_DEPTH:
        raise WireError("messages are nested too deep")
    if message.size <= _SMALL_BYTES and _NEEDED not in _read(stream, message.start, message.size):
        return None  # most nodes; to look for bytes takes a tenth of the time that it takes to read their fields
    if kind == "tensor":
        return _changed_tensor(stream, message, replace)
    parts: list[_Part] = []
    copied = message.start
    for field in _fields(stream, message):
        inner = _INNER[kind].get(field.number)
        if inner is None or field.wire != _BYTES:
            continue
        new = _changed(stream, inner, _Span(field.start, field.end - field.start), replace, depth + 1)
        if new is not None:
            head = _tag(field.number, _BYTES) + _encoded(size_of(new))
            parts += [_Span(copied, field.at - copied), head, *new]
            copied = field.end
    if not parts:
        return None
    return [*parts, _Span(copied, message.start + message.size - copied)]


def _changed_tensor(stream: BinaryIO, message: _Span, replace: Replace) -> list[_Part] | None:
    kept: list[_Part] = []
    entries: dict[str, str] = {}
    name, location, element = "", 0, 0
    dims: list[int] = []
    for field in _fields(stream, message):
        if field.number == _EXTERNAL_DATA and field.wire == _BYTES:
            key, value = _entry(stream, field)
            entries[key] = value
        elif field.number == _DATA_LOCATION and field.wire == _VARINT:
            location = field.value
        elif field.number != _RAW_DATA:  # which is ignored where the data is outside
            kept.append(_Span(field.at, field.end - field.at))
        if field.number == _NAME and field.wire == _BYTES:
            name = _decoded(stream, field)
        elif field.number == _TYPE and field.wire == _VARINT:
            element = field.value
        elif field.number == _DIMS:
            dims += _numbers(stream, field, _MOST_AXES - len(dims))
    if location != _EXTERNAL:
        return None
    return [*kept, *replace(OutsideTensor(name, entries, tensor_bytes(dims, element)))]


def _entry(stream: BinaryIO, entry: _Field) -> tuple[str, str]:
    """Key and value."""
    texts = {_KEY: "", _VALUE: ""}
    for field in _fields(stream, _Span(entry.start, entry.end - entry.start)):
        if field.number in texts and field.wire == _BYTES:
            texts[field.number] = _decoded(stream, field)
    return texts[_KEY], texts[_VALUE]


def _numbers(stream: BinaryIO, field: _Field, most: int) -> list[int]:
    """The numbers of a repeated field, written one by one or together."""
    if field.wire == _VARINT:
        return [field.value][:most]
    if field.wire != _BYTES:
        return []
    data = _read(stream, field.start, min(field.end - field.start, most * _MOST_VARINT_BYTES))
    numbers: list[int] = []
    at = 0
    while at < len(data) and len(numbers) < most:
        value, at = _varint(data, at)
        numbers.append(value)
    return numbers


def _fields(stream: BinaryIO, message: _Span) -> Iterator[_Field]:
    """The fields of a message, but for those in groups, which ONNX has none of."""
    at, end, groups = message.start, message.start + message.size, 0
    while at < end:
        stream.seek(at)
        head = stream.read(min(2 * _MOST_VARINT_BYTES, end - at))
        tag, used = _varint(head, 0)
        number, wire = tag >> 3, tag & 7
        value, size = 0, 0
        if wire == _VARINT:
            value, used = _varint(head, used)
        elif wire == _BYTES:
            size, used = _varint(head, used)
        elif wire in _FIXED:
            size = _FIXED[wire]
        elif wire in (_GROUP, _GROUP_END):
            groups += 1 if wire == _GROUP else -1
        start = at + used
        if number == 0 or wire > _FIXED32 or groups < 0 or size > end - start:
            raise WireError(f"no field of a message at byte {at}")
        if not groups and wire != _GROUP_END:
            yield _Field(number, wire, at, start, start + size, value)
        at = start + size
    if groups:
        raise WireError(f"a group without an end before byte {end}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where it ends."""
    value = 0
    for index in range(at, min(at + _MOST_VARINT_BYTES, len(data))):
        value |= (data[index] & 0x7F) << (7 * (index - at))
        if data[index] < 0x80:
            return value & (1 << 64) - 1, index + 1
    raise WireError("a number without an end")


def _decoded(stream: BinaryIO, field: _Field) -> str:
    return _read(stream, field.start, min(field.end - field.start, _MOST_TEXT_BYTES)).decode(errors="replace")


def _read(stream: BinaryIO, start: int, size: int) -> bytes:
    stream.seek(start)
    data = stream.read(size)
    if len(data) != size:
        raise WireError("the file became shorter while it was read")
    return data


def _tag(number: int, wire: int) -> bytes:
    return _encoded(number << 3 | wire)


def _text(number: int, text: str) -> bytes:
    return _tag(number, _BYTES) + _encoded(len(text.encode())) + text.encode()


def _encoded(value: int) -> bytes:
    """`value` as a varint."""
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)
