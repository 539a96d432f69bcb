"""Writes the digit images that the embedded models are calibrated and measured on: `python models/digit_images.py`.

They are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set; see calib_data/README.md.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.files import write_bytes

REPOSITORY = Path(__file__).resolve().parent.parent
CALIBRATE = Path("calib_data/digits/calibrate")
HELDOUT = Path("calib_data/digits/heldout")
CALIBRATION_IMAGES = 64
HELDOUT_SHARE = 0.2
CLASSES = 10
PREPROCESSING = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0)


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits as grey images: `pixels` uint8 [B,H,W], `labels` int64 [B]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Indices into `Digits`: int64 [B] each; `calibrate` is a part of `train`, `heldout` is disjoint from it."""

    train: NDArray[np.int64]
    calibrate: NDArray[np.int64]
    heldout: NDArray[np.int64]


def load_digits() -> Digits:
    """All 1797 digits, their 17 grey levels spread over 0…255 and resized 8×8 → 32×32 (bicubic)."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    levels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return resized(Digits(levels, bunch.target.astype(np.int64)), PREPROCESSING.size)


def resized(digits: Digits, size: tuple[int, int]) -> Digits:
    """The digits at H × W pixels, resized as eamdeploy resizes them (bicubic)."""
    if size == digits.pixels.shape[1:]:
        return digits
    height, width = size
    images = [Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in digits.pixels]
    return Digits(np.stack([np.asarray(image) for image in images]), digits.labels)


def split_digits(labels: NDArray[np.int64]) -> Split:
    """The fixed split: of each class the last fifth, in the data set's order, is held out.

    Neighbours in the data set look written by one hand, so that most held-out digits seem to come from people the model
    has never seen; digits drawn at random would be easier. Calibration digits are spread evenly over each class's
    training digits.
    """
    train: list[int] = []
    calibrate: list[int] = []
    heldout: list[int] = []
    for label in range(CLASSES):
        members = np.flatnonzero(labels == label)
        cut = len(members) - math.floor(len(members) * HELDOUT_SHARE)
        count = CALIBRATION_IMAGES // CLASSES + (label < CALIBRATION_IMAGES % CLASSES)
        train.extend(members[:cut].tolist())
        calibrate.extend(members[np.arange(count) * cut // count].tolist())
        heldout.extend(members[cut:].tolist())
    return Split(*(np.sort(np.asarray(part, dtype=np.int64)) for part in (train, calibrate, heldout)))


def write_folder(digits: Digits, indices: Sequence[int], folder: Path) -> None:
    """`folder` holds the chosen digits as grey PNG files named by their index, and `labels.csv` (`file,label`)."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["file,label"]
    for index in indices:
        write_bytes(folder / f"{index:04}.png", encode_png(digits.pixels[index]))
        lines.append(f"{index:04}.png,{digits.labels[index]}")
    write_bytes(folder / "labels.csv", ("\n".join(lines) + "\n").encode())


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """The grey image [H,W] as a PNG file whose bytes are the same everywhere, for H·(W+1) below 64 KiB.

    The pixels are stored, not deflated: compressed bytes differ between zlib's versions and forks, and the digest of
    a calibration folder must not.
    """
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    length = len(rows).to_bytes(2, "little")
    stored = b"\x78\x01\x01" + length + bytes(~byte & 0xFF for byte in length) + rows
    stored += zlib.adler32(rows).to_bytes(4, "big")
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", stored) + _png_chunk(b"IEND", b"")


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def write_all(digits: Digits, split: Split) -> None:
    """Both folders of calib_data/digits are up to date."""
    write_folder(digits, split.calibrate.tolist(), REPOSITORY / CALIBRATE)
    write_folder(digits, split.heldout.tolist(), REPOSITORY / HELDOUT)


if __name__ == "__main__":
    all_digits = load_digits()
    write_all(all_digits, split_digits(all_digits.labels))
