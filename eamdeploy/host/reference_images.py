"""The images of a reference set: photographs of the user's, or synthetic ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import Observer
from eamdeploy.parity.reference_set import REFERENCE_IMAGES

_SEED = 0


def reference_pixels(
    how: Preprocessing, images: ImageSource | None, observer: Observer
) -> tuple[NDArray[np.uint8], str]:
    """Images for the parity gate, uint8 `[n, H, W, 3]`, and in words where they come from.

    Args:
        images: at most `REFERENCE_IMAGES` are taken unless a limit is set; None for synthetic images.

    Raises:
        ConfigError: the images can't be read.
    """
    if images is None:
        return _synthetic_pixels(how), f"{REFERENCE_IMAGES} synthetic images"
    chosen = replace(images, limit=images.limit or REFERENCE_IMAGES)
    folder = chosen.open(observer)
    batches = chosen.batches(folder, how, REFERENCE_IMAGES, observer)
    pixels = np.concatenate([batch.pixels for batch in batches])
    return pixels, f"{len(pixels)} images of {folder.root.name}"


def _synthetic_pixels(how: Preprocessing) -> NDArray[np.uint8]:
    """Smooth coloured blobs with a little noise: unlike white noise, they move the logits as photographs do."""
    height, width = how.size
    rng = np.random.default_rng(_SEED)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = rng.uniform(-3, 3, (REFERENCE_IMAGES, 3, 4, 2))  # 4 plane waves in each channel of each image
    phases = rng.uniform(0, 2 * np.pi, (REFERENCE_IMAGES, 3, 4))
    angles = 2 * np.pi * np.einsum("ncwa,ahx->ncwhx", waves, np.stack([y, x])) + phases[..., None, None]
    smooth = np.sin(angles).sum(axis=2) / 4 + rng.normal(0, 0.1, (REFERENCE_IMAGES, 3, height, width))
    pixels: NDArray[np.uint8] = np.clip(127.5 * (1 + smooth), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels
