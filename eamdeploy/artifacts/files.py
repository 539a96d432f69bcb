"""Files on the disk: digests, and writing so that a file is there whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from eamdeploy.errors import ConfigError

_CHUNK_BYTES = 1 << 20
_PARTIAL = ".partial"


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


def is_there(path: Path) -> bool:
    """Whether something is at `path`; False too where the system can't tell, as for a name that is too long.

    `Path.exists` raises then, before Python 3.14.
    """
    return os.path.exists(path)  # noqa: PTH110


def is_file(path: Path) -> bool:
    """Whether a file is at `path`; False too where the system can't tell."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: Path) -> bool:
    """Whether a folder is at `path`; False too where the system can't tell."""
    return os.path.isdir(path)  # noqa: PTH112


def require_output(path: Path, *inputs: Path) -> None:
    """A file can be made at `path`, and it replaces none of `inputs`; for stages that work long before they write.

    Raises:
        ConfigError: the folder does not exist, `path` is a folder or a device, its name is too long, or it is one of
            `inputs`.
    """
    if is_there(path) and not is_file(path):
        kind = "folder" if is_folder(path) else "device"
        raise ConfigError(f"cannot write {path}", expected="a file name", got=f"an existing {kind}")
    if not is_folder(path.parent):
        raise ConfigError(f"cannot write {path}", expected=f"an existing folder {path.parent}", got="no such folder")
    _require_short_name(path)
    for source in inputs:
        if is_there(path) and is_there(source) and path.samefile(source):
            raise ConfigError(f"{path} would replace the input {source}", hint="Give another output file.")


def _require_short_name(path: Path) -> None:
    """The file system takes the name, and that of the temporary file beside it."""
    try:
        longest = os.pathconf(path.parent, "PC_NAME_MAX")
    except (OSError, ValueError, AttributeError):
        return
    room = longest - len(f"..{'x' * 8}{_PARTIAL}")
    if len(os.fsencode(path.name)) > room:
        raise ConfigError(
            f"cannot write {path}", expected=f"a name of at most {room} bytes", got=len(os.fsencode(path.name))
        )


def read_chunks(path: Path, size: int, *, start: int = 0, doing: str = "read") -> Iterator[bytes]:
    """So many bytes of the file, piece by piece.

    Args:
        doing: what is done with them, for an error: "became shorter while it was …".

    Raises:
        ConfigError: the file can't be read, or has fewer bytes than that by now.
    """
    left = size
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            while left and (chunk := stream.read(min(_CHUNK_BYTES, left))):
                left -= len(chunk)
                yield chunk
    except OSError as err:
        raise ConfigError(f"cannot read {path}: {err.strerror or err}") from err
    if left:
        raise ConfigError(f"{path} became shorter while it was {doing}", hint="Wait until it is written, try again.")


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
