"""Images in the order and the views that one epoch of training shows them in, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.images.augment import random_view
from eamdeploy.images.preprocess import normalize, read_rgb

_THREADS = 2
_AHEAD = 2  # batches that are being read while one is learnt from


@dataclass(frozen=True)
class TrainingImages:
    """Files to learn from.

    Attributes:
        files: each can be decoded.
        how: size, filter and normalization of a view.
        exif_transpose: turn the images as their EXIF orientation says.
        seed: order and views follow from it, from the epoch, and from an image's place in `files`, and from nothing
            else, however many processes share the work.
    """

    files: Sequence[Path]
    how: Preprocessing
    exif_transpose: bool
    seed: int

    def batches(self, epoch: int, size: int, part: int = 0, parts: int = 1) -> Iterator[torch.Tensor]:
        """One epoch's batches, normalized, float32 `[size / parts, 3, H, W]`; what does not fill a batch is left out.

        Args:
            size: images of a batch, at most those that there are, a multiple of `parts`.
            part, parts: which share of every batch this process takes.
        """
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.files)).tolist()
        batches = [order[start : start + size][part::parts] for start in range(0, len(order) - size + 1, size)]
        pool, waiting = ThreadPoolExecutor(_THREADS), deque[list[Future[NDArray[np.uint8]]]]()
        try:
            for numbers in batches:
                waiting.append([pool.submit(self._view, epoch, number) for number in numbers])
                if len(waiting) > _AHEAD:
                    yield self._tensor(waiting.popleft())
            while waiting:
                yield self._tensor(waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _tensor(self, views: Sequence[Future[NDArray[np.uint8]]]) -> torch.Tensor:
        return torch.from_numpy(normalize(np.stack([view.result() for view in views]), self.how))

    def _view(self, epoch: int, number: int) -> NDArray[np.uint8]:
        image = read_rgb(self.files[number], exif_transpose=self.exif_transpose)
        return random_view(image, self.how, np.random.default_rng((self.seed, epoch, number)))
