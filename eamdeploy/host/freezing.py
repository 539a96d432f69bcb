"""The stages that make an EAM checkpoint: look at the attention maps, choose heads, freeze and quantize them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifact import Freezing, Preprocessing, require_output
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam import scores as map_scores
from eamdeploy.eam.analysis import Analysis
from eamdeploy.eam.quantizers import Bits, Quantizer
from eamdeploy.eam.records import Calibration, Checkpoint, CheckpointHeader, FrozenMaps
from eamdeploy.eam.selection import sparsity_of
from eamdeploy.engines.provenance import package_versions
from eamdeploy.errors import ConfigError
from eamdeploy.folder import folder_digest
from eamdeploy.host.attention import attention_sites
from eamdeploy.host.calibrate import Seen, look
from eamdeploy.host.choosing import Chosen, choose
from eamdeploy.host.given_maps import fit_maps
from eamdeploy.host.model import (
    TIMM_PREPROCESSING,
    ModelSpec,
    PreprocessingOverrides,
    load_model,
    preprocessing_of,
    to_numpy,
)
from eamdeploy.host.options import DEFAULT_OPTIONS, FreezeOptions, check_options
from eamdeploy.host.scoring import score_pieces
from eamdeploy.host.sites import AttentionSite, WindowMaps, attention_shapes
from eamdeploy.observer import SILENT, Observer
from eamdeploy.source import ImageSource

_BATCH = 16
_FAST_SCORES: tuple[map_scores.Score, ...] = ("entropy", "row-entropy", "variance")


@dataclass(frozen=True)
class _Calibrated:
    """A model after its calibration images went through it."""

    model: Any
    sites: list[AttentionSite]
    how: Preprocessing
    seen: Seen
    windows: WindowMaps | None
    provenance: Calibration
    scores: dict[str, NDArray[np.float64]]
    chosen: Chosen


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
    done = _calibrate(spec, images, options, overrides, None, observer, always_measure=False)
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
        scores={name: _head_means(values) for name, values in scores.items()},
        sparsity_asked=options.sparsity,
        sparsity=done.chosen.selection.sparsity,
        frozen={path: list(heads) for path, heads in done.chosen.selection.heads.items()},
        shares={path: _shares(pieces) for path, pieces in done.chosen.selection.pieces.items()},
        versions=package_versions(),
    )


def freeze(
    spec: ModelSpec,
    images: ImageSource,
    output: Path,
    options: FreezeOptions = DEFAULT_OPTIONS,
    *,
    overrides: PreprocessingOverrides = TIMM_PREPROCESSING,
    class_names: list[str] | None = None,
    observer: Observer = SILENT,
) -> CheckpointHeader:
    """`output` is an EAM checkpoint: what costs least is frozen to its quantized mean map over the images.

    Raises:
        ConfigError, CheckpointError, UnsupportedGraph: model, weights, images or options can't be used, or `output`
            can't be written; what was there stays.
    """
    require_output(output, Path(spec.weights))
    done = _calibrate(spec, images, options, overrides, class_names, observer, always_measure=True)
    freezing = Freezing(
        granularity=options.granularity,
        window_maps=done.windows,
        bits=options.bits,
        quantizer=options.quantizer,
        score=options.score,
        scores=_head_means(done.scores),
        sparsity_asked=options.sparsity,
        sparsity=done.chosen.selection.sparsity,
        heads={path: list(heads) for path, heads in done.chosen.selection.heads.items()},
        cost=done.chosen.cost,
    )
    return _save(
        spec, done.model, done.sites, done.how, class_names, freezing, done.chosen.frozen, done.provenance, output
    )


def read_shares(path: Path) -> dict[str, list[float]]:
    """Which share of its entries is frozen, in (0, 1], for every frozen head of the EAM checkpoint at `path`.

    By module path, in the order of `Freezing.heads`.

    Raises:
        CheckpointError, ConfigError: as `checkpoint.load`.
    """
    return {module: item.shares for module, item in checkpoints.load(path).frozen.items()}


def pack(
    spec: ModelSpec,
    maps: Mapping[str, FrozenMaps],
    output: Path,
    *,
    bits: Bits,
    quantizer: Quantizer,
    overrides: PreprocessingOverrides = TIMM_PREPROCESSING,
    class_names: list[str] | None = None,
) -> CheckpointHeader:
    """`output` is an EAM checkpoint of a model and frozen maps from somebody's own EAM training.

    Args:
        maps: by attention module path, as `host.maps_file.read_maps` reads them.

    Raises:
        ConfigError, CheckpointError, UnsupportedGraph: model, weights or maps can't be used, or `output` not written.
    """
    require_output(output, Path(spec.weights))
    model = load_model(spec)
    sites = attention_sites(model)
    _check_class_names(class_names, model.num_classes)
    granularity, windows, fitted = fit_maps(maps, sites, spec.name)
    shapes = attention_shapes(sites, windows)
    freezing = Freezing(
        granularity=granularity,
        window_maps=windows,
        bits=bits,
        quantizer=quantizer,
        score="given",
        sparsity_asked=None,
        sparsity=sparsity_of(fitted, shapes),
        heads={path: item.heads.tolist() for path, item in fitted.items()},
    )
    how = preprocessing_of(model, overrides)
    return _save(spec, model, sites, how, class_names, freezing, fitted, None, output)


def _calibrate(
    spec: ModelSpec,
    images: ImageSource,
    options: FreezeOptions,
    overrides: PreprocessingOverrides,
    class_names: list[str] | None,
    observer: Observer,
    *,
    always_measure: bool,
) -> _Calibrated:
    """Everything that `analyze` and `freeze` share: statistics over the images, scores, what to freeze."""
    check_options(options)
    model = load_model(spec)
    sites = attention_sites(model)
    _check_class_names(class_names, model.num_classes)
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
    return _Calibrated(
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
        ),
    )


def _check_class_names(class_names: list[str] | None, num_classes: int) -> None:
    if class_names is not None and len(class_names) != num_classes:
        raise ConfigError("the class names don't fit the model", expected=f"{num_classes} names", got=len(class_names))


def _save(
    spec: ModelSpec,
    model: Any,
    sites: list[AttentionSite],
    how: Preprocessing,
    class_names: list[str] | None,
    freezing: Freezing,
    frozen: dict[str, FrozenMaps],
    calibration: Calibration | None,
    output: Path,
) -> CheckpointHeader:
    header = CheckpointHeader(
        timm_model=spec.name,
        timm_kwargs=spec.plain_kwargs,
        weights=spec.source,
        num_classes=model.num_classes,
        class_names=class_names,
        preprocessing=how,
        attention=attention_shapes(sites, freezing.window_maps),
        freezing=freezing,
        calibration=calibration,
        versions=package_versions(),
    )
    return checkpoints.save(Checkpoint(to_numpy(model), frozen, header), output)


def _head_means(scores: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    return {path: values.reshape(len(values), -1).mean(axis=1).tolist() for path, values in scores.items()}


def _shares(pieces: NDArray[np.bool_]) -> list[float]:
    """The share of frozen pieces of every head that has one."""
    shares = pieces.reshape(len(pieces), -1).mean(axis=1)
    return [float(share) for share in shares if share > 0]
