"""The stage that looks at the attention maps over images and marks what would be frozen."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eamdeploy.devices.provenance import package_versions
from eamdeploy.eam import scores as map_scores
from eamdeploy.eam.analysis import Analysis
from eamdeploy.eam.options import DEFAULT_OPTIONS, FreezeOptions
from eamdeploy.host.freezing import calibrate, head_means
from eamdeploy.host.model import ModelSpec
from eamdeploy.host.sites import attention_shapes
from eamdeploy.images.options import TIMM_PREPROCESSING, PreprocessingOverrides
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT, Observer
from eamdeploy.vocabulary import MapScore

_FAST_SCORES: tuple[MapScore, ...] = ("entropy", "row-entropy", "variance")


def analyze(
    spec: ModelSpec,
    images: ImageSource,
    options: FreezeOptions = DEFAULT_OPTIONS,
    *,
    overrides: PreprocessingOverrides = TIMM_PREPROCESSING,
    observer: Observer = SILENT,
) -> Analysis:
    """The entropy, row entropy and variance of every head, and what would be frozen; nothing is written.

    Raises:
        ConfigError, CheckpointError, UnsupportedGraph: model, weights, images or options can't be used.
    """
    done = calibrate(spec, images, options, overrides, None, observer, always_measure=False)
    scores: dict[str, dict[str, NDArray[np.float64]]] = {
        name: map_scores.score_pieces(done.seen.statistics, name, "head") for name in _FAST_SCORES
    }
    scores[options.score] = done.scores
    return Analysis(
        timm_model=spec.name,
        weights=spec.source,
        preprocessing=done.how,
        attention=attention_shapes(done.sites, done.windows),
        calibration=done.provenance,
        granularity=options.granularity,
        window_maps=done.windows,
        bins=options.bins,
        spacing=options.spacing,
        score=options.score,
        scores={name: head_means(values) for name, values in scores.items()},
        sparsity_asked=options.sparsity,
        sparsity=done.chosen.selection.sparsity,
        frozen={path: list(heads) for path, heads in done.chosen.selection.heads.items()},
        shares={path: _shares(pieces) for path, pieces in done.chosen.selection.pieces.items()},
        versions=package_versions(),
    )


def _shares(pieces: NDArray[np.bool_]) -> list[float]:
    """The share of frozen pieces of every head that has one."""
    shares = pieces.reshape(len(pieces), -1).mean(axis=1)
    return [float(share) for share in shares if share > 0]
