"""Archives of arrays (`.npz`), read without unpickling and with one kind of error for everything that can be wrong."""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.file_kinds import npz_in_words
from eamdeploy.errors import CheckpointError, ConfigError

# What numpy, zipfile and zlib let escape for damaged files. RuntimeError: one that says that it is encrypted;
# TypeError, SyntaxError and TokenError: a header that is no literal.
_FAILURES = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    RuntimeError,
    MemoryError,
    OSError,  # a place before the start of the file
)


_KINDS = "biufU"  # booleans, numbers, texts


def read_npz(path: Path, what: str, hint: str | None = None) -> dict[str, NDArray[Any]]:
    """The arrays in the archive at `path`, by name.

    Args:
        what: what the file is if it is not damaged, for the message: "reference set"; `hint`: what to try.

    Raises:
        ConfigError: the file can't be read.
        CheckpointError: it is damaged, no archive of arrays, or has arrays of something else than numbers and texts.
    """
    try:
        file = path.open("rb")
    except OSError as err:
        raise ConfigError(f"cannot read {path}: {err.strerror or err}") from err
    with file:
        try:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive of named arrays")
            with archive:
                arrays: dict[str, Any] = dict(archive)
            for name, array in arrays.items():
                if not isinstance(array, np.ndarray) or array.dtype.kind not in _KINDS:
                    raise ValueError(f"{name!r} in it is no array of numbers or texts")
            return arrays
        except _FAILURES as err:
            raise CheckpointError(f"{path} is damaged or no {what}", got=npz_in_words(path, err), hint=hint) from err
