from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.images.augment import random_view

HOW = Preprocessing(size=(24, 32), mean=(0, 0, 0), std=(1, 1, 1))


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right and green downwards, so that a pixel says where it was."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, across * 0], axis=-1).astype(np.uint8))


def view(image: Image.Image, seed: int) -> NDArray[np.uint8]:
    return random_view(image, HOW, np.random.default_rng(seed))


def test_a_view_is_a_part_of_the_image_in_the_models_size() -> None:
    shares, mirrored = [], []
    for seed in range(200):
        pixels = view(ramp(120, 90), seed).astype(int)
        assert pixels.shape == (24, 32, 3)
        across, down = pixels[0, -1, 0] - pixels[0, 0, 0], pixels[-1, 0, 1] - pixels[0, 0, 1]
        assert down > 0, "never upside down"
        shares.append(abs(across) * down / 255**2 * (32 / 31) * (24 / 23))
        mirrored.append(across < 0)
    assert 0.3 < min(shares) < 0.45 and 0.8 < max(shares) <= 1.05
    assert 0.35 < np.mean(mirrored) < 0.65


def test_the_state_decides() -> None:
    assert np.array_equal(view(ramp(60, 60), 4), view(ramp(60, 60), 4))
    assert not np.array_equal(view(ramp(60, 60), 4), view(ramp(60, 60), 5))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (3, 2)])
def test_any_shape_has_a_view(size: tuple[int, int]) -> None:
    assert view(ramp(*size), 0).shape == (24, 32, 3)
