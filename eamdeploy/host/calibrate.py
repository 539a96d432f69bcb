"""Run calibration images through a model and collect what its attention maps do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.eam.statistics import MapStatistics
from eamdeploy.eam.telling_images import uncertainty
from eamdeploy.host.attention import tapped_maps
from eamdeploy.host.sites import AttentionSite, window_maps
from eamdeploy.images.folder import ImageFolder
from eamdeploy.images.preprocess import ImageBatch, normalize
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import Observer
from eamdeploy.vocabulary import Spacing, WindowMaps

_BATCH = 16


def as_tensors(batches: Iterable[ImageBatch], how: Preprocessing) -> Iterator[torch.Tensor]:
    """Every batch as the model's input, float32 `[B, 3, H, W]`."""
    for batch in batches:
        yield torch.from_numpy(normalize(batch.pixels, how))


@dataclass(frozen=True, eq=False)
class Seen:
    """What one forward pass of a model over the calibration images showed.

    Attributes:
        statistics: of every attention module's maps, by module path, one for each of M window maps.
        folder: the images, in order; those that can't be read are left out.
        unsure: `telling_images.uncertainty` of each image, float64 [N].
    """

    statistics: dict[str, list[MapStatistics]]
    folder: ImageFolder
    unsure: NDArray[np.float64]


def look(
    model: nn.Module,
    sites: list[AttentionSite],
    images: ImageSource,
    how: Preprocessing,
    *,
    bins: int,
    spacing: Spacing,
    windows: WindowMaps,
    observer: Observer,
) -> Seen:
    """The model has seen every image once.

    Args:
        bins, spacing, windows: as for `collect_statistics`.

    Raises:
        ConfigError: the images can't be read.
    """
    folder = images.open(observer)
    files: list[Path] = []
    unsure: list[NDArray[np.float64]] = []

    def readable() -> Iterator[ImageBatch]:
        for batch in images.batches(folder, how, _BATCH, observer):
            files.extend(batch.files)
            yield batch

    statistics = collect_statistics(
        model,
        sites,
        as_tensors(readable(), how),
        bins=bins,
        spacing=spacing,
        windows=windows,
        on_images=lambda done: observer.progress("attention maps", done, len(folder.files)),
        on_logits=lambda logits: unsure.append(uncertainty(logits.numpy())),
    )
    return Seen(statistics, replace(folder, files=tuple(files)), np.concatenate(unsure))


@torch.inference_mode()
def collect_statistics(
    model: nn.Module,
    sites: list[AttentionSite],
    batches: Iterable[torch.Tensor],
    *,
    bins: int,
    spacing: Spacing,
    windows: WindowMaps = "shared",
    on_images: Callable[[int], None],
    on_logits: Callable[[torch.Tensor], None] = lambda _: None,
) -> dict[str, list[MapStatistics]]:
    """The statistics of every attention module's maps over all images, by module path, one for each of M window maps.

    A sample is what one window of one image shows; every window is counted to the window map that stands for it, all
    of them to the only one where the model has no windows.

    Args:
        batches: normalized images, float32 `[B, 3, H, W]`.
        bins, spacing: of the histograms, see `MapStatistics`.
        windows: which windows share a map, see `window_maps`; ignored for models without windows.
        on_images: called with the number of images so far after every batch.
        on_logits: called with the logits `[B, classes]` of every batch.
    """
    used = {site.path: np.array(window_maps(site, windows) or [0]) for site in sites}
    statistics = {
        site.path: [
            MapStatistics((site.heads, site.tokens, site.tokens), bins=bins, spacing=spacing, module=site.path)
            for _ in range(used[site.path].max() + 1)
        ]
        for site in sites
    }

    def on_map(path: str, maps: torch.Tensor) -> None:
        by_image = maps.numpy().reshape(-1, len(used[path]), *maps.shape[1:])  # [B, W, H, N, N]
        for number, each in enumerate(statistics[path]):
            each.update(by_image[:, used[path] == number].reshape(-1, *maps.shape[1:]))

    done = 0
    with tapped_maps(model, sites, on_map):
        for images in batches:
            on_logits(model(images))
            done += len(images)
            on_images(done)
    return statistics


@torch.inference_mode()
def predict(model: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The model's logits, float32 `[B, classes]`, for normalized images `[B, 3, H, W]`."""
    logits: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
    return logits
