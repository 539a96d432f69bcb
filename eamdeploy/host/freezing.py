"""What `analyze` and `freeze` share: statistics over the images, scores, and what to freeze."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.eam.factors import check_rank
from eamdeploy.eam.kinds import kinds_of
from eamdeploy.eam.options import FreezeOptions, check_options
from eamdeploy.eam.records import Calibration
from eamdeploy.host.attention import attention_sites
from eamdeploy.host.calibrate import Seen, look
from eamdeploy.host.choosing import Chosen, choose
from eamdeploy.host.model import ModelSpec, load_model, preprocessing_of
from eamdeploy.host.saving import check_class_names
from eamdeploy.host.scoring import score_pieces
from eamdeploy.host.sites import AttentionSite
from eamdeploy.images.folder import folder_digest
from eamdeploy.images.options import PreprocessingOverrides
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import Observer
from eamdeploy.vocabulary import WindowMaps


@dataclass(frozen=True)
class Calibrated:
    """A model after its calibration images went through it."""

    model: Any
    sites: list[AttentionSite]
    how: Preprocessing
    seen: Seen
    windows: WindowMaps | None
    provenance: Calibration
    scores: dict[str, NDArray[np.float64]]
    chosen: Chosen


def calibrate(
    spec: ModelSpec,
    images: ImageSource,
    options: FreezeOptions,
    overrides: PreprocessingOverrides,
    class_names: list[str] | None,
    observer: Observer,
    *,
    always_measure: bool,
) -> Calibrated:
    """Everything that `analyze` and `freeze` share: statistics over the images, scores, what to freeze."""
    check_options(options)
    model = load_model(spec)
    sites = attention_sites(model)
    _check_ranks(options, sites)
    check_class_names(class_names, model.num_classes)
    how = preprocessing_of(model, overrides)
    seen = look(
        model,
        sites,
        images,
        how,
        bins=options.bins,
        spacing=options.spacing,
        windows=options.window_maps,
        observer=observer,
    )
    scores = score_pieces(model, sites, seen, images, how, options, observer)
    folder = images.open()
    return Calibrated(
        model=model,
        sites=sites,
        how=how,
        seen=seen,
        windows=None if sites[0].classes is None else options.window_maps,
        provenance=Calibration(
            n_images=len(seen.folder.files),
            digest=folder_digest(folder),
            source=folder.root.name,
            exif_transpose=images.exif_transpose,
        ),
        scores=scores.values,
        chosen=choose(
            model,
            sites,
            seen,
            images,
            how,
            scores.selections(sites, options.sparsity),
            options,
            observer,
            always_measure=always_measure,
            kinds=scores.kinds,
            saved=scores.saved,
        ),
    )


def _check_ranks(options: FreezeOptions, sites: list[AttentionSite]) -> None:
    """The one rank that is asked for is none above a module's tokens.

    Raises:
        ConfigError: it is.
    """
    kinds = kinds_of(options.rank)
    if len(kinds) == 1 and kinds[0] is not None:
        for site in sites:
            check_rank(kinds[0], site.tokens, site.path)


def head_means(scores: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    return {path: values.reshape(len(values), -1).mean(axis=1).tolist() for path, values in scores.items()}
