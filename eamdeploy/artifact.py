"""Files that stages hand to each other: digests, atomic writes, validated JSON, and the card every model carries.

Nothing here needs torch, onnx or a runtime, so that a board can read every artifact's description.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.file_kinds import in_words
from eamdeploy.seal import opened_json, sealed_json

_CHUNK_BYTES = 1 << 20
_PARTIAL = ".partial"

RecordT = TypeVar("RecordT", bound="Record")


def digest_bytes(data: bytes) -> str:
    """SHA-256 of `data` as `sha256:<64 hex digits>`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_file(path: Path) -> str:
    """SHA-256 of the file's bytes as `sha256:<64 hex digits>`, read in chunks.

    Raises:
        ConfigError: the file can't be read.
    """
    sha = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                sha.update(chunk)
    except OSError as err:
        raise ConfigError(f"cannot read {path}: {err.strerror or err}") from err
    return f"sha256:{sha.hexdigest()}"


@contextmanager
def atomic_output(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends well, and leaves no trace when it does not.

    The bytes go to a temporary file in the same folder, are flushed to the disk and then renamed over `path`, so a
    full disk, an error or Ctrl-C leaves whatever was at `path` before. So does `kill -9`, after which the temporary
    file is left, until `path` is written again.

    Raises:
        ConfigError: the folder does not exist, can't be written, or the disk is full; or `path` is a folder or device.
    """
    require_output(path)
    temporary: Path | None = None
    try:
        _remove_leftovers(path)
        descriptor, temporary = _new_temporary(path)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)  # before the file is closed, which unlocks it
    except BaseException as err:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(err, OSError):
            raise ConfigError(
                f"cannot write {path}: {err.strerror or err}",
                hint="Check that the folder exists, is writable and has free space; nothing there was changed.",
            ) from err
        raise


def _new_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, open and locked: a lock ends with its process, and tells a leftover from a file in use.

    Raises:
        OSError: it can't be made.
    """
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent)
        with suppress(OSError):  # a file system without locks, on which leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, Path(name)
        os.close(descriptor)  # another process took it for a leftover just before it was locked


def _remove_leftovers(path: Path) -> None:
    """The temporary files of processes that were killed while they wrote `path` are gone, as far as that can be."""
    pattern = f".{glob.escape(path.name)}.{'[a-z0-9_]' * 8}{_PARTIAL}"
    for leftover in path.parent.glob(pattern):
        with suppress(OSError), leftover.open("rb") as file:  # locked: somebody writes it now
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def require_output(path: Path, *inputs: Path) -> None:
    """A file can be made at `path`, and it replaces none of `inputs`; for stages that work long before they write.

    Raises:
        ConfigError: the folder does not exist, `path` is a folder or a device, or it is one of `inputs`.
    """
    if path.exists() and not path.is_file():
        kind = "folder" if path.is_dir() else "device"
        raise ConfigError(f"cannot write {path}", expected="a file name", got=f"an existing {kind}")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}", expected=f"an existing folder {path.parent}", got="no such folder")
    for source in inputs:
        if path.exists() and source.exists() and path.samefile(source):
            raise ConfigError(f"{path} would replace the input {source}", hint="Give another output file.")


def write_bytes(path: Path, data: bytes) -> None:
    """`path` holds exactly `data`, or is unchanged if that fails (see `atomic_output`)."""
    with atomic_output(path) as file:
        file.write(data)


def write_json(path: Path, document: object) -> None:
    """`path` holds `document` as indented UTF-8 JSON, or is unchanged if that fails."""
    write_bytes(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def printable(value: Any) -> Any:
    """`value` with every text in it as UTF-8 can hold it: names of files are bytes, and what is no UTF-8 in them is
    spelled out as `\\udcff`.
    """
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(printable, value))
    return value


class Record(BaseModel):
    """An immutable, validated piece of JSON; an unknown or missing key is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_written(cls, value: Any) -> Any:
        return printable(value)

    @classmethod
    def parse(cls: type[RecordT], text: str | bytes, where: str) -> RecordT:
        """The record in `text`.

        Raises:
            CheckpointError: it is no JSON or does not fit; the message names `where` and the key.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as err:
            first = err.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "document"
            data = text.encode(errors="replace") if isinstance(text, str) else text
            raise CheckpointError(
                f"{where} is not a valid {cls.__name__}: {key}: {first['msg']}", got=in_words(data, "json", "text")
            ) from err

    def write(self, path: Path) -> None:
        """`path` holds this record as sealed JSON, or is unchanged if that fails."""
        write_bytes(path, self.sealed())

    def sealed(self) -> bytes:
        """This record as JSON in UTF-8, with its seal (see `seal`) as the last key."""
        return sealed_json(self.model_dump_json()).encode()

    @classmethod
    def read(cls: type[RecordT], path: Path) -> RecordT:
        """The record in the file at `path`; where the file has a seal, the contents are those that were written.

        Raises:
            ConfigError: the file can't be read.
            CheckpointError: its contents don't fit, or not its seal.
        """
        try:
            data = path.read_bytes()
        except OSError as err:
            raise ConfigError(f"cannot read {path}: {err.strerror or err}") from err
        return cls.parse(opened_json(data, str(path)), str(path))


class Preprocessing(Record):
    """How a photograph becomes the model's input; the field names are timm's data-config names.

    Attributes:
        size: height and width of the input in pixels.
        mean, std: per channel (RGB), on a 0…1 scale.
        interpolation: Pillow's filter for the resize.
        crop_pct: share of the resized shorter side that the centre crop keeps, in (0, 1].
        crop_mode: `center` resizes the shorter side and crops; `squash` resizes both sides and ignores aspect.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    crop_pct: float = Field(default=0.875, gt=0, le=1)
    crop_mode: Literal["center", "squash"] = "center"

    @field_validator("size")
    @classmethod
    def _positive(cls, size: tuple[int, int]) -> tuple[int, int]:
        if min(size) < 1:
            raise ValueError(f"size must be positive, got {size}")
        return size

    @field_validator("mean", "std")
    @classmethod
    def _finite(cls, values: tuple[float, float, float]) -> tuple[float, float, float]:
        if not all(map(math.isfinite, values)):
            raise ValueError(f"must be finite, got {values}")
        return values

    @field_validator("std")
    @classmethod
    def _nonzero(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError(f"std must be positive, got {std}")
        return std


class FreezingCost(Record):
    """What freezing a whole set of pieces costs, measured on the calibration images.

    Attributes:
        n_images: how many images.
        kl: mean KL divergence of the softmax, from the unfrozen model to the frozen one, in nats.
        agreement: percent of images for which both have the same first class.
    """

    n_images: int = Field(ge=1)
    kl: float = Field(ge=0, allow_inf_nan=False)
    agreement: float = Field(ge=0, le=100)


class Freezing(Record):
    """What is frozen in a model and how it was chosen.

    Attributes:
        granularity: what is frozen as one piece: a head's map, a row of it, or an entry of it.
        window_maps: which windows share a frozen map: all (`shared`), those with the same shift mask (`class`), or
            none (`window`); None for a model without windows.
        heads: heads with at least one frozen piece by attention module path, e.g. `{"blocks.3.attn": [0, 2]}`.
        sparsity: frozen entries ÷ all attention entries, in [0, 1]; `sparsity_asked` is what the user wanted.
        score: what the choice went by, and `scores` its value for every head of every attention module: for rows and
            entries the mean over the head's.
        cost: what the frozen set costs as a whole; None for maps that were not chosen here, and in files made before
            it was measured.
    """

    granularity: Literal["head", "row", "entry"] = "head"
    window_maps: Literal["shared", "class", "window"] | None = None
    bits: Literal[2, 3, 4, 8]
    quantizer: Literal["uniform", "squared"]
    score: str
    scores: dict[str, list[float]] = {}
    sparsity_asked: float | None
    sparsity: float
    heads: dict[str, list[int]]
    cost: FreezingCost | None = None


class ModelCard(Record):
    """What a board must know about an ONNX model without torch; stored under `CARD_KEY` in its metadata.

    Attributes:
        weights: where the weights came from; `random` marks a model that is good for latency only.
        freezing: None for an unfrozen model.
        checkpoint_digest: SHA-256 of the EAM checkpoint this was exported from.
        rewrites: names of the passes applied, in order.
        takes_pixels: the input is uint8 [B, 3, H, W], and the graph normalizes it as `preprocessing` says; otherwise
            it is float32, normalized already.
    """

    timm_model: str
    weights: str
    num_classes: int
    class_names: list[str] | None = None
    preprocessing: Preprocessing
    freezing: Freezing | None = None
    checkpoint_digest: str | None = None
    rewrites: list[str] = []
    takes_pixels: bool = False
    exporter: str = ""
    versions: dict[str, str] = {}


CARD_KEY = "eamdeploy"

RANDOM_WARNING = "The weights are random: latency and size mean something, accuracy and frozen heads do not."
