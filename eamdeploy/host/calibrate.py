"""Run calibration images through a model and collect what its attention maps do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eamdeploy.artifact import Preprocessing
from eamdeploy.eam.statistics import MapStatistics, Spacing
from eamdeploy.host.attention import AttentionSite, tapped_maps
from eamdeploy.images import ImageBatch, normalize


def as_tensors(batches: Iterable[ImageBatch], how: Preprocessing) -> Iterator[torch.Tensor]:
    """Every batch as the model's input, float32 `[B, 3, H, W]`."""
    for batch in batches:
        yield torch.from_numpy(normalize(batch.pixels, how))


@torch.inference_mode()
def collect_statistics(
    model: nn.Module,
    sites: list[AttentionSite],
    batches: Iterable[torch.Tensor],
    *,
    bins: int,
    spacing: Spacing,
    on_images: Callable[[int], None],
) -> dict[str, MapStatistics]:
    """The statistics of every attention module's maps over all images, by module path.

    Args:
        batches: normalized images, float32 `[B, 3, H, W]`.
        bins, spacing: of the histograms, see `MapStatistics`.
        on_images: called with the number of images so far after every batch.
    """
    statistics = {
        site.path: MapStatistics((site.heads, site.tokens, site.tokens), bins=bins, spacing=spacing, module=site.path)
        for site in sites
    }
    done = 0
    with tapped_maps(model, sites, lambda path, maps: statistics[path].update(maps.numpy())):
        for images in batches:
            model(images)
            done += len(images)
            on_images(done)
    return statistics


@torch.inference_mode()
def predict(model: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """The model's logits, float32 `[B, classes]`, for normalized images `[B, 3, H, W]`."""
    logits: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
    return logits
