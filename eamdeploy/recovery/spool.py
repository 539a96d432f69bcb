"""Activations that wait for the next step on the disk, so that memory does not grow with the images."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from eamdeploy.errors import ConfigError


class Spool:
    """Float32 tensors in a file without a name, which is gone with the process; read back in order, one at a time.

    Args:
        folder: where the disk has room.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shapes: list[torch.Size] = []
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        except OSError as err:
            raise self._failed(err) from err

    def append(self, tensor: torch.Tensor) -> None:
        """`tensor` is the last one.

        Raises:
            ConfigError: the disk is full.
        """
        try:
            self._file.write(tensor.detach().contiguous().numpy().astype(np.float32, copy=False).data)
        except OSError as err:
            raise self._failed(err) from err
        self._shapes.append(tensor.shape)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Every tensor, as it was appended; nothing may be appended before the last one."""
        try:
            self._file.seek(0)
            for shape in self._shapes:
                array = np.empty(tuple(shape), np.float32)
                self._file.readinto(array.data)
                yield torch.from_numpy(array)
        except OSError as err:
            raise self._failed(err) from err

    def close(self) -> None:
        """The room on the disk is free again."""
        with suppress(OSError):  # what was not written yet is not wanted any more
            self._file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _failed(self, err: OSError) -> ConfigError:
        return ConfigError(
            f"cannot keep activations in a temporary file in {self._folder}: {err.strerror or err}",
            hint="Make room there, write to another folder, or take fewer images (--images N).",
        )
