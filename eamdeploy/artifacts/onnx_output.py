"""An ONNX model is written: one file or two, whole or not at all.

A model that is still to be proved is staged beside its place first.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from eamdeploy.artifacts.files import atomic_output, is_there, require_output
from eamdeploy.artifacts.onnx_files import ModelData, _chunks, data_path, model_files
from eamdeploy.errors import ConfigError

_SUFFIX = ".onnx"


def require_model_output(output: Path, source: Path) -> None:
    """A model can be written to `output`, in one file or two, and replaces no file of the model `source`.

    Raises:
        ConfigError: it can't; also what `model_files` says of `source`.
        CheckpointError: as for `model_files`.
    """
    files = model_files(source) if is_there(source) else (source,)
    require_output(output, *files)
    if output.suffix.lower() == _SUFFIX:
        require_output(data_path(output), *files)


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def model_output(path: Path, model: ModelData) -> Iterator[None]:
    """The model's file or two files are on the disk in full; they become `path` and `data_path(path)` when the block
    ends well, and leave no trace when it does not.

    Raises:
        ConfigError: one can't be written.
    """
    if model.is_one_file:
        with atomic_output(path) as file:
            _write(file, [model.model])
            yield
        return
    with atomic_output(path) as file, atomic_output(data_path(path)) as data_file:
        _write(file, [model.named(data_path(path).name)])
        _write(data_file, _chunks(model.data))
        yield


def write_model(path: Path, model: ModelData) -> None:
    """`path`, and above `ONE_FILE_BYTES` a second file beside it, hold exactly `model`, or both are as they were.

    Raises:
        ConfigError: one can't be written.
    """
    with model_output(path, model):
        pass


def _write(file: IO[bytes] | BinaryIO, chunks: Iterator[bytes] | list[bytes]) -> None:
    for chunk in chunks:
        file.write(chunk)
    file.flush()
    os.fsync(file.fileno())  # a full disk shows here, and not after another file was renamed


class Staging:
    """Where models of two files lie until they are checked: each in a folder of its own beside the output."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def source(self, model: ModelData) -> bytes | Path:
        """What a runtime opens: one file from memory, so that nothing of it is on the disk; two as files.

        Raises:
            ConfigError: they can't be written.
        """
        if model.is_one_file:
            return model.model
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix=f".{self._output.name}.", dir=self._output.parent)
            folder = Path(self._folder.name) / str(self._count)
            folder.mkdir()
        except OSError as err:
            raise ConfigError(f"cannot write beside {self._output}: {err.strerror or err}") from err
        self._count += 1
        path = folder / self._output.with_suffix(_SUFFIX).name
        write_model(path, model)
        return path

    def close(self) -> None:
        """Nothing of it is left."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


@contextmanager
def staging(output: Path) -> Iterator[Staging]:
    """A `Staging` for `output` until the block ends."""
    stage = Staging(output)
    try:
        yield stage
    finally:
        stage.close()


def move_model(staged: Path, output: Path) -> None:
    """The two files of a staged model have become `output` and its second file.

    Raises:
        ConfigError: they can't be moved.
    """
    try:
        data_path(staged).replace(data_path(output))
        staged.replace(output)
    except OSError as err:
        raise ConfigError(f"cannot write {output}: {err.strerror or err}") from err
