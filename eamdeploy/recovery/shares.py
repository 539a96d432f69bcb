"""Which images a model learns from, and which are held back to check what it learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.eam.recovery import RecoverOptions, held_back_images
from eamdeploy.errors import ConfigError
from eamdeploy.host.calibrate import as_tensors
from eamdeploy.images.folder import ImageFolder
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import Observer
from eamdeploy.recovery.spool import Spool

SharedBatch: TypeAlias = tuple[torch.Tensor, Sequence[bool]]
"""Normalized images, float32 `[B, 3, H, W]`, and which of them are held back."""

_BATCH = 16


@dataclass(frozen=True)
class Shares:
    """The files that could be read, in two shares.

    Attributes:
        learning: those to learn from, at least one.
        held_back: those that only check, at least one.
    """

    learning: tuple[Path, ...]
    held_back: tuple[Path, ...]


class SharedImages:
    """The images of a folder, each of one share.

    Args:
        folder: of `images`.
    """

    def __init__(
        self, images: ImageSource, folder: ImageFolder, options: RecoverOptions, how: Preprocessing, observer: Observer
    ) -> None:
        self._images, self._folder, self._how, self._observer = images, folder, how, observer
        self._held = {folder.files[number] for number in held_back_images(len(folder.files), options)}
        self._read: list[Path] = []

    def batches(self) -> Iterator[SharedBatch]:
        """Every image that can be read, once.

        Raises:
            ConfigError: an image can't be read, or all that can be are of one share.
        """
        for batch in self._images.batches(self._folder, self._how, _BATCH, self._observer):
            self._read.extend(batch.files)
            held = [file in self._held for file in batch.files]
            yield from ((tensor, held) for tensor in as_tensors([batch], self._how))
            self._observer.progress("images read", len(self._read), len(self._folder.files))
        shares = self.shares
        if not (shares.learning and shares.held_back):
            raise ConfigError(
                f"too few images of {self._folder.root} can be read",
                expected="at least one to learn from and one to check on",
                got=f"{len(shares.learning)} and {len(shares.held_back)}",
            )

    @property
    def shares(self) -> Shares:
        """Those of the images that were read."""
        learning = tuple(file for file in self._read if file not in self._held)
        return Shares(learning, tuple(file for file in self._read if file in self._held))

    def keep_held_back(self, spool: Spool) -> Shares:
        """All images are read, and those that are held back are in `spool`.

        Raises:
            ConfigError: as for `batches`, or the disk is full.
        """
        for tensor, held in self.batches():
            if any(held):
                spool.append(tensor[torch.tensor(held)])
        return self.shares
