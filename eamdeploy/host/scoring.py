"""Score every piece of a model's attention maps, by what its maps do or by what freezing the piece costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifact import Preprocessing
from eamdeploy.eam import scores as map_scores
from eamdeploy.eam.statistics import MapStatistics
from eamdeploy.host.calibrate import as_tensors
from eamdeploy.host.fisher import fisher_sensitivity
from eamdeploy.host.means import freeze_pieces, mean_maps
from eamdeploy.host.options import FreezeOptions
from eamdeploy.host.sensitivity import sensitivity
from eamdeploy.host.sites import AttentionSite
from eamdeploy.observer import Observer
from eamdeploy.source import ImageSource

_BATCH, _GRADIENT_BATCH = 16, 8


def score_pieces(
    model: Any,
    sites: list[AttentionSite],
    statistics: Mapping[str, Sequence[MapStatistics]],
    images: ImageSource,
    how: Preprocessing,
    options: FreezeOptions,
    observer: Observer,
) -> dict[str, NDArray[np.float64]]:
    """The score `options.score` of every piece: float64 `[H]`, `[H, N]` or `[H, N, N]` by module path.

    `sensitivity` of a head is exact, with its map quantized as it will be; of rows and entries it is estimated, see
    `fisher`.

    Args:
        statistics: of the maps over `images`, for every window map.

    Raises:
        ConfigError: the images can't be read.
    """
    if options.score != "sensitivity":
        return map_scores.score_pieces(statistics, options.score, options.granularity, seed=options.seed)
    chosen = images if options.score_images is None else replace(images, limit=options.score_images)
    means = {site.path: mean_maps(site, statistics[site.path]) for site in sites}
    measure = _head_sensitivity if options.granularity == "head" else _estimated_sensitivity
    return measure(model, sites, means, chosen, how, options, observer)


def _head_sensitivity(
    model: Any,
    sites: list[AttentionSite],
    means: Mapping[str, NDArray[np.float64]],
    images: ImageSource,
    how: Preprocessing,
    options: FreezeOptions,
    observer: Observer,
) -> dict[str, NDArray[np.float64]]:
    maps = {
        path: freeze_pieces(path, mean, np.ones(len(mean), np.bool_), options.bits, options.quantizer).maps(
            options.quantizer
        )
        for path, mean in means.items()
    }
    folder = images.open()
    estimated = False

    def on_progress(done: int, total: int, seconds_left: float) -> None:
        nonlocal estimated
        if not estimated:
            observer.note(f"sensitivity of {sum(s.heads for s in sites)} heads: about {_duration(seconds_left)}")
            estimated = True
        observer.progress("sensitivity", done, total)

    batches = as_tensors(images.batches(folder, how, _BATCH, observer), how)
    return sensitivity(model, sites, maps, batches, len(folder.files), on_progress, windows=options.window_maps)


def _estimated_sensitivity(
    model: Any,
    sites: list[AttentionSite],
    means: Mapping[str, NDArray[np.float64]],
    images: ImageSource,
    how: Preprocessing,
    options: FreezeOptions,
    observer: Observer,
) -> dict[str, NDArray[np.float64]]:
    folder = images.open()
    return fisher_sensitivity(
        model,
        sites,
        means,
        as_tensors(images.batches(folder, how, _GRADIENT_BATCH, observer), how),
        options.granularity,
        lambda done: observer.progress("sensitivity", done, len(folder.files)),
        windows=options.window_maps,
        seed=options.seed,
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
