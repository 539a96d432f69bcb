"""An ONNX model and the files that it keeps data in: which they are, their size and digest, read as one and written.

ONNX keeps a tensor's data in the model's file or in another one beside it ("external data"), which torch's exporter
does by default and a model above protobuf's limit of 2 GiB has to. Everything here needs the base packages only.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from eamdeploy.artifacts.files import digest_bytes, digest_file, is_file, is_there, read_chunks
from eamdeploy.artifacts.onnx_wire import (
    OutsideTensor,
    Piece,
    Slice,
    WireError,
    data_inside,
    data_outside,
    outside_tensors,
    size_of,
    with_replaced,
)
from eamdeploy.errors import CheckpointError, ConfigError

ONE_FILE_BYTES = 2_000_000_000
"""A model that we write is one file up to this size, and two above. Protobuf's limit is 2 GiB; the rest is for what
tools add to a model on the way, such as shapes."""

OUTSIDE_BYTES = 1024
"""In a model of two files, a tensor of at least this size is in the second; smaller ones decide shapes."""
_OTHERS = (".safetensors", ".plan", ".engine", ".npz", ".json", ".html", ".png")  # what else we write
_ALIGNMENT = 4096  # so that a tensor can be mapped into memory
_LONGEST_NAME = 255


@dataclass(frozen=True)
class ModelData:
    """A serialized ONNX model.

    Attributes:
        model: the file `x.onnx`.
        data: the contents of a second file by offset, zeros in between; empty for a model of one file.
    """

    model: bytes
    data: Mapping[int, Piece] = field(default_factory=dict)

    @property
    def is_one_file(self) -> bool:
        return not self.data

    @property
    def data_bytes(self) -> int:
        """Of the second file."""
        return max((offset + size_of([piece]) for offset, piece in self.data.items()), default=0)

    def named(self, name: str) -> bytes:
        """The file `x.onnx` whose second file has that name."""
        if self.is_one_file:
            return self.model

        def renamed(tensor: OutsideTensor) -> list[Piece]:
            return data_outside(name, int(tensor.entries["offset"]), int(tensor.entries["length"]))

        return _joined(with_replaced(io.BytesIO(self.model), len(self.model), renamed))

    def bytes_at(self, path: Path) -> int:
        """What `model_bytes` says when the model is written to `path`."""
        return len(self.named(data_path(path).name)) + self.data_bytes

    def digest_at(self, path: Path) -> str:
        """What `digest_model` says when the model is written to `path`."""
        if self.is_one_file:
            return digest_bytes(self.model)
        sha = hashlib.sha256()
        for chunk in _chunks(self.data):
            sha.update(chunk)
        return _combined([digest_bytes(self.named(data_path(path).name)), f"sha256:{sha.hexdigest()}"])

    def tensor_data(self, offset: int) -> bytes | None:
        """What the second file has at a tensor's offset; None where no tensor begins there."""
        piece = self.data.get(offset)
        return None if piece is None else b"".join(_chunks({0: piece}))


class DataLayout:
    """Where tensors go in a second file, one after another.

    Attributes:
        end: where the last one ends.
    """

    def __init__(self) -> None:
        self.end = 0

    def place(self, size: int) -> int:
        """The offset of a tensor of that many bytes."""
        offset = -(-self.end // _ALIGNMENT) * _ALIGNMENT
        self.end = offset + size
        return offset


def data_path(path: Path) -> Path:
    """Where the second file of a model that we write lies: `x.onnx.data` beside `x.onnx`, as torch's exporter does."""
    return path.with_name(f"{path.name}.data")


# --- what there is ----------------------------------------------------------------------------------------------------


def model_files(path: Path) -> tuple[Path, ...]:
    """The file itself, and if it is an ONNX model with data in other files, those too: all there and long enough.

    What is no ONNX model counts as one file; whatever opens it says what is wrong with it.

    Raises:
        ConfigError: a file can't be read, or one with data is missing.
        CheckpointError: one with data is too short, or is not in the model's folder, or the model contradicts itself.
    """
    if path.suffix.lower() in _OTHERS:
        return (path,)
    names = sorted({os.path.normpath(tensor.entries["location"]) for tensor, _ in _outside(path)})
    return tuple(dict.fromkeys([path, *(path.parent / name for name in names)]))


def model_bytes(path: Path) -> int:
    """Size of all its files.

    Raises:
        ConfigError, CheckpointError: as for `model_files`.
    """
    return sum(file.stat().st_size for file in model_files(path))


def digest_model(path: Path) -> str:
    """SHA-256 as `sha256:<64 hex digits>`: of the file's bytes; with data in other files, of the digests of all files.

    Raises:
        ConfigError, CheckpointError: as for `model_files`.
    """
    files = model_files(path)
    return digest_file(path) if len(files) == 1 else _combined(list(map(digest_file, files)))


def _combined(digests: list[str]) -> str:
    return digest_bytes("\n".join(digests).encode())


def _outside(path: Path) -> list[tuple[OutsideTensor, Slice]]:
    """The tensors with data in other files, and where that is; none in what is no ONNX model."""
    try:
        with path.open("rb") as stream:
            tensors = outside_tensors(stream, os.fstat(stream.fileno()).st_size)
    except WireError:
        return []
    except OSError as err:
        raise ConfigError(f"cannot read {path}: {err.strerror or err}") from err
    return [(tensor, _slice(path, tensor)) for tensor in tensors]


def _slice(path: Path, tensor: OutsideTensor) -> Slice:
    """Where a tensor's data is, which is all there."""
    file = _data_file(path, tensor)
    start = _number(path, tensor, "offset") or 0
    size = _number(path, tensor, "length")
    if size is not None and tensor.expected_bytes not in (None, size):
        raise CheckpointError(
            f"{path} contradicts itself about tensor {tensor.name or 'without a name'}, which is in {file.name}",
            expected=f"{tensor.expected_bytes:,} bytes by its shape",
            got=f"a length of {size:,}",
            hint="Export the model again.",
        )
    size = tensor.expected_bytes if size is None else size
    there = file.stat().st_size
    size = max(there - start, 0) if size is None else size
    if start + size > there:
        raise CheckpointError(
            f"{file} is too short for {path.name}, which keeps tensor {tensor.name or 'without a name'} in it",
            expected=f"at least {start + size:,} bytes",
            got=f"{there:,}",
            hint=f"Copy {file.name} again, or export the model again.",
        )
    return Slice(file, start, size)


def _data_file(path: Path, tensor: OutsideTensor) -> Path:
    location = tensor.entries.get("location", "")
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    absolute = posix.is_absolute() or windows.drive or windows.root
    if absolute or ".." in (*posix.parts, *windows.parts) or posix.name == "" or "\0" in location:
        raise _elsewhere(path, repr(_shown(location)))
    file = path.parent / location
    if not is_there(file):
        raise ConfigError(
            f"{path} keeps its weights in {_shown(location)}, which is not beside it",
            expected=f"a file of that name in {path.parent}",
            hint=f"Copy {_shown(location)} together with {path.name}.",
        )
    if not is_file(file):
        raise ConfigError(f"{path} keeps its weights in {_shown(location)}, which is no file")
    if not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(path.parent)):
        raise _elsewhere(path, f"{_shown(location)}, a link to {os.path.realpath(file)}")
    return file


def _shown(location: str) -> str:
    """A name out of a foreign file, no longer than a message can bear."""
    return location if len(location) <= _LONGEST_NAME else f"{location[:_LONGEST_NAME]}…"


def _elsewhere(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        f"{path} keeps its weights where a model may not",
        expected="a file in the model's own folder",
        got=got,
        hint="Copy it there, or export the model again.",
    )


def _number(path: Path, tensor: OutsideTensor, key: str) -> int | None:
    text = tensor.entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise CheckpointError(
            f"{path} says wrongly where it keeps tensor {tensor.name or 'without a name'}",
            expected=f"a number as its {key}",
            got=repr(text),
        )
    return int(text)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_model(path: Path) -> ModelData:
    """The model with all its data: a model of one file byte for byte, one of several as we would write it.

    With up to `ONE_FILE_BYTES` it is joined: each tensor holds its data, and nothing else is changed.

    Raises:
        ConfigError, CheckpointError: as for `model_files`.
    """
    outside = _outside(path)
    try:
        if not outside:
            return ModelData(path.read_bytes())
        inside = path.stat().st_size + sum(data.size for _, data in outside) <= ONE_FILE_BYTES
        return _read_inside(path, outside) if inside else _read_outside(path, outside)
    except WireError as err:
        raise ConfigError(f"{path} changed while it was read", hint="Wait until it is written, try again.") from err
    except OSError as err:
        raise ConfigError(f"cannot read {path}: {err.strerror or err}") from err


def _read_inside(path: Path, outside: list[tuple[OutsideTensor, Slice]]) -> ModelData:
    pending = iter(outside)
    with path.open("rb") as stream:
        pieces = with_replaced(stream, path.stat().st_size, lambda _: data_inside(next(pending)[1]))
    return ModelData(_joined(pieces))


def _read_outside(path: Path, outside: list[tuple[OutsideTensor, Slice]]) -> ModelData:
    """With all data in one other file, each part of a file once."""
    pending, layout = iter(outside), DataLayout()
    offsets: dict[Slice, int] = {}

    def moved(_: OutsideTensor) -> list[Piece]:
        data = next(pending)[1]
        if data.size < OUTSIDE_BYTES:
            return data_inside(data)
        if data not in offsets:
            offsets[data] = layout.place(data.size)
        return data_outside(data_path(path).name, offsets[data], data.size)

    with path.open("rb") as stream:
        pieces = with_replaced(stream, path.stat().st_size, moved)
    return ModelData(_joined(pieces), {offset: data for data, offset in offsets.items()})


def _joined(pieces: list[Piece]) -> bytes:
    buffer = io.BytesIO()  # gives its bytes away without a copy
    for piece in pieces:
        for chunk in _chunks({0: piece}):
            buffer.write(chunk)
    return buffer.getvalue()


def _chunks(data: Mapping[int, Piece]) -> Iterator[bytes]:
    """The bytes of a file by offset.

    Raises:
        ConfigError: a file that they come from can't be read any more, or is shorter now.
    """
    at = 0
    for offset, piece in data.items():
        yield bytes(offset - at)
        if isinstance(piece, bytes):
            yield piece
        else:
            yield from read_chunks(piece.path, piece.size, start=piece.start)
        at = offset + size_of([piece])
