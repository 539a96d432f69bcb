"""Views of an image that a model learns from: a random part of it, in the model's size, half of them mirrored."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.images.preprocess import FILTERS

_LEAST_AREA: Final = 0.35
_WIDEST: Final = 4 / 3
_TRIES: Final = 10


def random_view(image: Image.Image, how: Preprocessing, random: np.random.Generator) -> NDArray[np.uint8]:
    """A part of `image` as uint8 [H, W, 3] of `how.size`.

    The part has 35 to 100 % of the area and is 3/4 to 4/3 as wide as high; where no such part fits, it is the largest
    square. The same state of `random` gives the same view.

    Args:
        image: RGB.

    Source: Szegedy et al., Going Deeper with Convolutions, 2015, section 6.
    """
    left, top, width, height = _part(image.width, image.height, random)
    size = how.size[::-1]
    view = image.resize(size, FILTERS[how.interpolation], box=(left, top, left + width, top + height))
    pixels: NDArray[Any] = np.asarray(view, np.uint8)
    return np.ascontiguousarray(pixels[:, ::-1] if random.random() < 0.5 else pixels)


def _part(width: int, height: int, random: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, top, width and height."""
    w = h = float(min(width, height))
    for _ in range(_TRIES):
        area = random.uniform(_LEAST_AREA, 1) * width * height
        ratio = _WIDEST ** random.uniform(-1, 1)
        across, down = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if across <= width and down <= height:
            w, h = across, down
            break
    return random.uniform(0, width - w), random.uniform(0, height - h), w, h
