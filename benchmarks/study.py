"""A model that engines of several kinds are made of and compared on, and the folder in which each is made only once.

Even images calibrate, odd images measure. What was made is used again as long as the weights, the images, the settings,
the packages and the benchmark's code for peers are the same; ours also depend on all of eamdeploy's code.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.files import digest_bytes, digest_file, write_bytes
from eamdeploy.devices.provenance import package_versions
from eamdeploy.host.calibrate import predict
from eamdeploy.host.model import RANDOM, ModelSpec, load_model, preprocessing_of
from eamdeploy.images.folder import folder_digest
from eamdeploy.images.options import PreprocessingOverrides
from eamdeploy.images.preprocess import normalize
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT
from eamdeploy.parity.accuracy import Predict

REFERENCE_BATCH = 16
_ALSO_DECIDE = ("openvino", "nncf")  # versions that the package's own list leaves out


@dataclass(frozen=True)
class Settings:
    """What is the same for every model.

    Attributes:
        data: folder of images.
        keep: the folder for everything that is made.
        crop_pct: share that the centre crop keeps.
        calibration_images, score_images: how many of the even images calibrate, and how many of those rank the heads.
        images: how many of the odd images measure; None for all.
    """

    data: Path
    keep: Path
    crop_pct: float | None = 0.875
    calibration_images: int = 300  # NNCF's own default
    score_images: int = 64
    images: int | None = None

    @property
    def even(self) -> ImageSource:
        return ImageSource(self.data, "even", self.calibration_images)

    @property
    def odd(self) -> ImageSource:
        return ImageSource(self.data, "odd", self.images)


class Study:
    """A model in torch with its images, and the folder of what is made of it."""

    def __init__(self, spec: ModelSpec, settings: Settings) -> None:
        self.spec, self.settings = spec, settings
        self.model: Any = load_model(spec)
        self.how: Preprocessing = preprocessing_of(self.model, self.overrides)
        self.folder = settings.keep / f"{spec.name}-{self._key()}"
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def is_random(self) -> bool:
        """Whether the weights mean nothing, so that labels mean nothing either."""
        return self.spec.weights == RANDOM

    @property
    def overrides(self) -> PreprocessingOverrides:
        return PreprocessingOverrides(crop_pct=self.settings.crop_pct)

    def once(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder `name` with what `make` puts into it; it is called only where there is no such folder yet."""
        path = self.folder / name
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                fresh = Path(scratch) / name
                fresh.mkdir()
                make(fresh)
                fresh.rename(path)  # so that it is there whole or not at all
        return path

    def calibration(self) -> Iterator[NDArray[np.float32]]:
        """The calibration images one by one, normalized, float32 [1, 3, H, W]."""
        source = self.settings.even
        for batch in source.batches(source.open(), self.how, 1, SILENT):
            yield normalize(batch.pixels, self.how)

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The images that measure, uint8 [N, H, W, 3]."""
        source = self.settings.odd
        return np.concatenate([batch.pixels for batch in source.batches(source.open(), self.how, 16, SILENT)])

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """Their classes, int64 [N]; None where they have none, or the weights are random."""
        if self.is_random:
            return None
        labels = self.settings.odd.open_labelled(self.model.num_classes, None).labels
        return None if labels is None else np.array(labels, np.int64)

    @cached_property
    def reference(self) -> NDArray[np.float32]:
        """What the model in torch says of them, float32 [N, classes]."""
        folder = self.once("reference", lambda folder: None)
        return self.logits(partial(predict, self.model), folder, REFERENCE_BATCH)

    def logits(self, engine: Predict, folder: Path, batch: int) -> NDArray[np.float32]:
        """What the engine says of the images, in batches of exactly that many; kept in its `folder`.

        Returns:
            float32 [N, classes]; of images that don't fill a batch at the end, the last is repeated for the engine.
        """
        kept = folder / f"logits-{len(self.pixels)}.npy"
        if not kept.exists():
            parts = []
            for start in range(0, len(self.pixels), batch):
                part = self.pixels[start : start + batch]
                filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
                parts.append(engine(normalize(filled, self.how))[: len(part)])
            saved = io.BytesIO()
            np.save(saved, np.concatenate(parts))
            write_bytes(kept, saved.getvalue())
        return np.asarray(np.load(kept), np.float32)

    def _key(self) -> str:
        weights = self.spec.weights if self.is_random else digest_file(Path(self.spec.weights))
        images = folder_digest(replace(self.settings.odd, split="all", limit=None).open())
        settings = replace(self.settings, data=Path(), keep=Path(), images=None)
        code = code_digest(Path(__file__), Path(__file__).with_name("peer_engines.py"))
        parts = (self.spec.name, self.spec.plain_kwargs, weights, images, settings, versions(), code)
        return short_digest(map(str, parts))


def versions() -> dict[str, str]:
    """Version by name of every package that decides results, those of the peers among them."""
    found = package_versions()
    for name in _ALSO_DECIDE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_digest(*files: Path) -> str:
    """Which code there is in these files and in all files below these folders."""
    sources = [below for file in files for below in (sorted(file.rglob("*.py")) if file.is_dir() else [file])]
    return short_digest(map(digest_file, sources))


def short_digest(parts: Iterable[str]) -> str:
    """12 hex digits that change with any part."""
    return digest_bytes("\0".join(parts).encode()).removeprefix("sha256:")[:12]
