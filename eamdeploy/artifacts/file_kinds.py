"""What a file is by what is in it, whatever its name says.

Libraries say of a foreign file that a byte is wrong somewhere in their sources, or advise to unpickle it. A message of
ours names what the file is, so that its user knows which file was mixed up, or did not come as itself.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_HEAD_BYTES = 1024
_COPY = "Copy or download it again."
_UNPACK = "Unpack it, and give the file that is meant."


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        key: a short name for tables.
        words: the kind for people, as in "got a web page (HTML)".
        remedy: what to do about such a file, wherever it turns up; None where that depends on what it is wanted for.
    """

    key: str
    words: str
    remedy: str | None = None


_EMPTY = FileKind("empty", "an empty file", _COPY)
_ZIP = FileKind("zip", "a ZIP archive of other files", _UNPACK)

_LFS = FileKind(
    "git-lfs",
    "a Git LFS pointer: a short text in place of the file itself",
    "Get the file itself with: git lfs pull.",
)
_ANNEX = FileKind("git-annex", "a git-annex pointer in place of the file itself", "Get it with: git annex get.")
_HTML = FileKind(
    "html", "a web page (HTML)", "Download the file itself; a page about it, or one with an error, was saved instead."
)
_TEXT = FileKind("text", "a text file")
_JSON = FileKind("json", "JSON text")
_SAFETENSORS = FileKind("safetensors", "a safetensors file")
_PICKLE = FileKind("pickle", "a pickle (which PyTorch files of before 1.6 are)")
_ONNX = FileKind("onnx", "an ONNX model")
_TFLITE = FileKind("tflite", "a TensorFlow Lite model")
_TORCH = FileKind("torch", "a PyTorch file")
_NPZ = FileKind("npz", "a NumPy archive (.npz)")
_CUT_ZIP = FileKind(
    "cut zip", "a ZIP archive that is damaged or was cut off (.pth and .npz files are such archives)", _COPY
)

# Bytes at a fixed place.
_MAGIC: tuple[tuple[int, bytes, FileKind], ...] = (
    (0, b"\x93NUMPY", FileKind("npy", "one array, not an archive of arrays (NumPy .npy)")),
    (0, b"GGUF", FileKind("gguf", "a GGUF file (a language model's)")),
    (0, b"\x89HDF\r\n\x1a\n", FileKind("hdf5", "an HDF5 file (Keras .h5)")),
    (4, b"TFL3", _TFLITE),
    (4, b"ORTM", FileKind("ort", "a model in ONNX Runtime's own format (.ort)")),
    (0, b"ftrt", FileKind("plan", "a TensorRT engine")),
    (0, b"ptrt", FileKind("plan", "a TensorRT engine")),
    (257, b"ustar", FileKind("tar", "a tar archive", _UNPACK)),
    (0, b"\x1f\x8b", FileKind("gzip", "a compressed file (gzip)", _UNPACK)),
    (0, b"BZh", FileKind("bzip2", "a compressed file (bzip2)", _UNPACK)),
    (0, b"\xfd7zXZ\0", FileKind("xz", "a compressed file (xz)", _UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", FileKind("zstd", "a compressed file (Zstandard)", _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", FileKind("7z", "a 7-Zip archive", _UNPACK)),
    (0, b"\x89PNG\r\n", FileKind("image", "an image (PNG)")),
    (0, b"\xff\xd8\xff", FileKind("image", "an image (JPEG)")),
    (0, b"%PDF-", FileKind("pdf", "a PDF file")),
    (0, b"\x7fELF", FileKind("program", "a program or library (ELF)")),
    (0, b"version https://git-lfs.github.com/", _LFS),
    (0, b"/annex/objects/", _ANNEX),
)

# What the names in a ZIP archive must have, all of them or one of them.
_ARCHIVES: tuple[tuple[FileKind, Callable[[list[str]], bool]], ...] = (
    (
        FileKind("torch.export", "a program of torch.export (.pt2)"),
        lambda names: _some(names, r"([^/]+/)?(archive_format|serialized_exported_program\.json)"),
    ),
    (
        FileKind("torchscript", "a TorchScript archive (torch.jit.save)"),
        lambda names: _some(names, r"[^/]+/code/.*|[^/]+/constants\.pkl"),
    ),
    (_TORCH, lambda names: _some(names, r"[^/]+/data\.pkl")),
    (_NPZ, lambda names: bool(names) and all(name.endswith(".npy") for name in names)),
    (
        FileKind("keras", "a Keras model (.keras)"),
        lambda names: _some(names, r"model\.weights\.h5") and _some(names, r"config\.json"),
    ),
    (
        FileKind("core-ml", "a Core ML package"),
        lambda names: _some(names, r"(.*/)?Manifest\.json") and _some(names, r".*\.mlmodel"),
    ),
)


def recognize(source: Path | bytes) -> FileKind | None:
    """What the file at the path, or the file with these bytes, is; None where that can't be told or read."""
    try:
        if isinstance(source, bytes):
            return _kind(source[:_HEAD_BYTES], io.BytesIO(source))
        with source.open("rb") as file:
            return _kind(file.read(_HEAD_BYTES), source)
    except OSError:
        return None


def in_words(source: Path | bytes, *wanted: str, otherwise: object = None) -> str | None:
    """What the file is, for "got …" in a message.

    Args:
        wanted: keys of the kinds that it should have been; for one of them, and for a file of no known kind, it is
            `otherwise` that tells what is wrong.
        otherwise: an exception or a text.
    """
    kind = recognize(source)
    if kind is None or kind.key in wanted:
        return None if otherwise is None else str(otherwise) or type(otherwise).__name__
    return kind.words


def npz_in_words(source: Path, err: Exception) -> str:
    """Why the archive of arrays at the path can't be read, without numpy's advice to unpickle it."""
    if "allow_pickle" in str(err) and (kind := recognize(source)) is not None and kind.key == "npz":
        return "an array of Python objects, which could run code when they are read and are never read here"
    clauses = re.split(r"(?<=[.;])", str(err))  # in time proportional to the text, which may quote the whole file
    plain = "".join("no archive of arrays" if "allow_pickle" in clause else clause for clause in clauses)
    return in_words(source, "npz", otherwise=plain or type(err).__name__) or type(err).__name__


def text_in_words(source: Path, err: Exception) -> str:
    """Why the text at the path, JSON or TOML perhaps, can't be read: what is there instead, or what the parser says."""
    if isinstance(err, OSError):
        return err.strerror or str(err)
    said = "it is no text in UTF-8" if isinstance(err, UnicodeDecodeError) else str(err)
    kind = recognize(source)
    return said if kind is None or kind.key in ("text", "json") else f"it is {kind.words}"


def _kind(head: bytes, source: Path | io.BytesIO) -> FileKind | None:
    if not head:
        return _EMPTY
    for offset, magic, kind in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return kind
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _archive(source)
    if 2 <= int.from_bytes(head[:8], "little") < 1 << 30 and head[8:9] == b"{":
        return _SAFETENSORS
    if head[0] == 0x80 and 2 <= head[1 % len(head)] <= 5:
        return _PICKLE
    if head[0] == 0x08 and 3 <= head[1 % len(head)] < 0x80 and head[2:3] in (b"\x12", b"\x1a", b":", b"B"):
        return _ONNX
    if (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)) and re.match(
        rb".{1,5}?[\xa1-\xbf\xd9][A-Za-z_]", head, re.DOTALL
    ):
        return FileKind("msgpack", "a MessagePack file (Flax .msgpack)")
    return _text(head)


def _archive(source: Path | io.BytesIO) -> FileKind:
    try:
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return _CUT_ZIP
    return next((kind for kind, fits in _ARCHIVES if fits(names)), _ZIP)


def _some(names: list[str], pattern: str) -> bool:
    return any(re.fullmatch(pattern, name) for name in names)


def _text(head: bytes) -> FileKind | None:
    """The kind of a text; None for bytes that are none."""
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        if len(head) < _HEAD_BYTES or err.start < len(head) - 4:  # else a character was cut
            return None
        text = head[: err.start].decode("utf-8-sig")
    if not all(each.isprintable() or each.isspace() for each in text):
        return None
    start = text.lstrip().lower()
    if start.startswith(("<!doctype html", "<html", "<head")):
        return _HTML
    return _JSON if start.startswith(("{", "[")) else _TEXT
