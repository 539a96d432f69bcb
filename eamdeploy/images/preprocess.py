"""From image files to the model's input, bit for bit as timm's evaluation transform does it, without torch."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.file_kinds import in_words
from eamdeploy.errors import ConfigError
from eamdeploy.images.folder import ImageFolder, folder_digest, open_folder

__all__ = [
    "ImageBatch",
    "ImageFolder",
    "folder_digest",
    "iter_batches",
    "network_input",
    "normalize",
    "open_folder",
    "preprocess",
]

# Pillow's modes for grey of 16 bits, and the formats (None: in memory) in which their numbers reach from 0 to 65535.
# Elsewhere the range is another, or not told: TIFF has 12 bits, signed numbers, and white at 0.
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_FULL_RANGE = {
    **dict.fromkeys(_SIXTEEN_BITS, (None, "PNG", "PPM")),
    "I": ("PNG", "PPM"),  # PNG in Pillow 10.0 to 10.2
}
_RANGE_UNKNOWN = ("I", "F", *_SIXTEEN_BITS)

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

# A photograph of 1 × 60000 pixels grows to gigabytes when its shorter side becomes 256; boards have few.
_MAX_RESIZED_PIXELS = 1 << 26

# Pillow takes 4 bytes for a pixel, and twice that while it converts one; its own limit allows 1.4 GB.
_MAX_PIXELS = 120_000_000

# What Pillow's decoders let escape for damaged files, beyond the OSError that they document.
_DECODE_FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    ImportError,  # a part of Pillow that this build lacks
    NotImplementedError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """Preprocessed images.

    Attributes:
        pixels: uint8 [B, H, W, 3], RGB.
        labels: int64 [B], or None for unlabelled images.
        files: the B files they come from.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    files: tuple[Path, ...]


def as_rgb(image: Image.Image, *, exif_transpose: bool = False) -> Image.Image:
    """The image in RGB, 8 bits each, as Pillow converts it; but grey of 16 bits keeps its upper 8, as colour does.

    Pillow itself makes everything over 255 white. Transparency is dropped: the colour below it stays, in whatever mode.

    Args:
        exif_transpose: turn the image as its EXIF orientation says. timm's and torchvision's data sets ignore it.

    Raises:
        ConfigError: the mode's numbers have no range that could be scaled to 8 bits.
    """
    if image.mode in _RANGE_UNKNOWN and image.format not in _FULL_RANGE.get(image.mode, ()):
        raise ConfigError(
            f"the range of its numbers is not known (mode {image.mode}{f', {image.format}' if image.format else ''})",
            expected="8 bits for each channel, or a PNG file of 16, from 0 for black to the largest number for white",
        )
    upright = ImageOps.exif_transpose(image) if exif_transpose else image
    if upright.mode in _RANGE_UNKNOWN:
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)).convert("RGB")
    if upright.mode == "La":  # which Pillow converts to nothing else
        return upright.convert("LA").convert("RGB")
    return upright if upright.mode == "RGB" else upright.convert("RGB")  # a conversion would be a copy


def preprocess(image: Image.Image, how: Preprocessing) -> NDArray[np.uint8]:
    """The image as uint8 [H, W, 3] RGB (see `as_rgb`), resized and centre-cropped to `how.size`.

    Raises:
        ConfigError: the image is so elongated that the resized one would not fit into memory, or `as_rgb` refuses it.

    Source: `timm.data.transforms_factory.transforms_imagenet_eval`, `torchvision.transforms.functional`.
    """
    H, W = how.size
    height, width = _resized_size(image.height, image.width, how)
    if height * width > _MAX_RESIZED_PIXELS:
        raise ConfigError(
            f"an image of {image.width} × {image.height} pixels is too elongated to resize",
            expected=f"at most {_MAX_RESIZED_PIXELS} pixels afterwards",
            got=f"{width} × {height}",
        )
    resized = as_rgb(image).resize((width, height), FILTERS[how.interpolation])
    # torchvision rounds half to even here, as Python does; it never pads, as no side is below the crop's
    top, left = round((height - H) / 2), round((width - W) / 2)
    return np.array(resized.crop((left, top, left + W, top + H)), dtype=np.uint8)


def _resized_size(height: int, width: int, how: Preprocessing) -> tuple[int, int]:
    """Height and width after the resize; each at least that of `how.size`."""
    target_h, target_w = (math.floor(side / how.crop_pct) for side in how.size)
    if how.crop_mode == "squash":
        return target_h, target_w
    if target_h == target_w:  # torchvision's Resize: the longer side is cut off, not rounded
        if width <= height:
            return int(target_w * height / width), target_w
        return target_h, int(target_h * width / height)
    ratio = min(height / target_h, width / target_w)  # timm's ResizeKeepRatio
    return round(height / ratio), round(width / ratio)


def normalize(pixels: NDArray[np.uint8], how: Preprocessing) -> NDArray[np.float32]:
    """float32 [B, 3, H, W] of uint8 [B, H, W, 3]: (x ÷ 255 − mean) ÷ std, each step rounded to float32.

    The same bits as torchvision's ToTensor and Normalize.
    """
    images = _channels_first(pixels).astype(np.float32)
    images /= np.float32(255)
    images -= np.asarray(how.mean, np.float32).reshape(3, 1, 1)
    images /= np.asarray(how.std, np.float32).reshape(3, 1, 1)
    return images


def network_input(pixels: NDArray[np.uint8], how: Preprocessing, *, takes_pixels: bool) -> NDArray[Any]:
    """[B, 3, H, W] of uint8 [B, H, W, 3], as a model takes it: float32, or uint8 if it normalizes itself."""
    return _channels_first(pixels) if takes_pixels else normalize(pixels, how)


def _channels_first(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def iter_batches(
    folder: ImageFolder,
    how: Preprocessing,
    batch_size: int,
    skip_bad: bool = False,
    on_skip: Callable[[Path, str], None] | None = None,
) -> Iterator[ImageBatch]:
    """Batches of `batch_size` images in the folder's order, the last perhaps smaller; one batch in memory at a time.

    Args:
        skip_bad: leave out files that can't be decoded, and fill the batch from those after them.
        on_skip: is called with each file left out and the reason.

    Raises:
        ConfigError: a file can't be decoded and `skip_bad` is off, or no file can, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ConfigError("the batch size can't be used", expected="at least 1", got=batch_size)
    waiting: list[tuple[int, NDArray[np.uint8]]] = []
    n_bad = 0
    for index, file in enumerate(folder.files):
        try:
            waiting.append((index, _read_pixels(file, how, exif_transpose=folder.exif_transpose)))
        except UnusableImage as err:
            if not skip_bad:
                raise ConfigError(
                    f"cannot use image {file}: {err}", hint="Leave such images out with --skip-bad."
                ) from err
            n_bad += 1
            if on_skip is not None:
                on_skip(file, str(err))
        if len(waiting) == batch_size:
            yield _batch(folder, waiting)
            waiting = []
    if waiting:
        yield _batch(folder, waiting)
    if n_bad == len(folder.files):
        raise ConfigError(f"no image of {folder.root} can be used", expected="at least 1", got=f"{n_bad} bad files")


class UnusableImage(Exception):
    """Its text is the reason, without the file's name."""


def read_rgb(file: Path, *, exif_transpose: bool) -> Image.Image:
    """The image in the file, as `as_rgb` makes it.

    Raises:
        UnusableImage: it can't be decoded, or is too large.
    """
    try:
        with Image.open(file) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise UnusableImage(f"{image.width} × {image.height} are more than {_MAX_PIXELS} pixels")
            image.load()
            return as_rgb(image, exif_transpose=exif_transpose)
    except ConfigError as err:
        raise UnusableImage(str(err)) from err
    except UnidentifiedImageError as err:
        kind = in_words(file, "image", "text", "json")
        raise UnusableImage(f"not an image that Pillow can read{f', but {kind}' if kind else ''}") from err
    except _DECODE_FAILURES as err:
        reason = err.strerror if isinstance(err, OSError) else None
        raise UnusableImage(reason or str(err) or type(err).__name__) from err


def _read_pixels(file: Path, how: Preprocessing, *, exif_transpose: bool) -> NDArray[np.uint8]:
    rgb = read_rgb(file, exif_transpose=exif_transpose)
    try:
        return preprocess(rgb, how)
    except ConfigError as err:
        raise UnusableImage(str(err)) from err


def _batch(folder: ImageFolder, images: list[tuple[int, NDArray[np.uint8]]]) -> ImageBatch:
    indices = [index for index, _ in images]
    labels = folder.labels
    return ImageBatch(
        pixels=np.stack([pixels for _, pixels in images]),
        labels=None if labels is None else np.array([labels[i] for i in indices], np.int64),
        files=tuple(folder.files[i] for i in indices),
    )
