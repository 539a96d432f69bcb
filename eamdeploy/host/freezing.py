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
from eamdeploy.eam.records import AttentionShape, Calibration, Checkpoint, CheckpointHeader, FrozenMaps
from eamdeploy.eam.selection import Selection, select, sparsity_of
from eamdeploy.eam.statistics import MapStatistics
from eamdeploy.engines.provenance import package_versions
from eamdeploy.errors import ConfigError
from eamdeploy.folder import folder_digest
from eamdeploy.host.attention import attention_sites
from eamdeploy.host.calibrate import as_tensors, collect_statistics
from eamdeploy.host.given_maps import fit_maps
from eamdeploy.host.means import freeze_pieces, mean_maps
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
from eamdeploy.host.sites import AttentionSite, WindowMaps, window_maps
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
    statistics: dict[str, list[MapStatistics]]
    windows: WindowMaps | None
    provenance: Calibration
    scores: dict[str, NDArray[np.float64]]
    selection: Selection


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
    done = _calibrate(spec, images, options, overrides, None, observer)
    scores: dict[str, dict[str, NDArray[np.float64]]] = {
        name: map_scores.score_pieces(done.statistics, name, "head") for name in _FAST_SCORES
    }
    scores[options.score] = done.scores
    return Analysis(
        timm_model=spec.name,
        weights=spec.source,
        preprocessing=done.how,
        attention=_shapes(done.sites, done.windows),
        calibration=done.provenance,
        granularity=options.granularity,
        window_maps=done.windows,
        bins=options.bins,
        spacing=options.spacing,
        score=options.score,
        scores={name: _head_means(values) for name, values in scores.items()},
        sparsity_asked=options.sparsity,
        sparsity=done.selection.sparsity,
        frozen={path: list(heads) for path, heads in done.selection.heads.items()},
        shares={path: _shares(pieces) for path, pieces in done.selection.pieces.items()},
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
    """`output` is an EAM checkpoint: the lowest-scoring heads frozen to their quantized mean map over the images.

    Raises:
        ConfigError, CheckpointError, UnsupportedGraph: model, weights, images or options can't be used, or `output`
            can't be written; what was there stays.
    """
    require_output(output, Path(spec.weights))
    done = _calibrate(spec, images, options, overrides, class_names, observer)
    frozen = {
        site.path: freeze_pieces(
            site.path,
            mean_maps(site, done.statistics[site.path]),
            done.selection.pieces[site.path],
            options.bits,
            options.quantizer,
        )
        for site in done.sites
        if site.path in done.selection.pieces
    }
    freezing = Freezing(
        granularity=options.granularity,
        window_maps=done.windows,
        bits=options.bits,
        quantizer=options.quantizer,
        score=options.score,
        scores=_head_means(done.scores),
        sparsity_asked=options.sparsity,
        sparsity=done.selection.sparsity,
        heads={path: list(heads) for path, heads in done.selection.heads.items()},
    )
    return _save(spec, done.model, done.sites, done.how, class_names, freezing, frozen, done.provenance, output)


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
    shapes = _shapes(sites, windows)
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
) -> _Calibrated:
    """Everything that `analyze` and `freeze` share: statistics over the images, scores, selection."""
    check_options(options)
    model = load_model(spec)
    sites = attention_sites(model)
    _check_class_names(class_names, model.num_classes)
    how = preprocessing_of(model, overrides)
    folder = images.open()
    statistics = collect_statistics(
        model,
        sites,
        as_tensors(images.batches(folder, how, _BATCH, observer), how),
        bins=options.bins,
        spacing=options.spacing,
        windows=options.window_maps,
        on_images=lambda done: observer.progress("attention maps", done, len(folder.files)),
    )
    n_images = sum(each.n_samples for each in statistics[sites[0].path]) // sites[0].n_windows
    scores = score_pieces(model, sites, statistics, images, how, options, observer)
    return _Calibrated(
        model=model,
        sites=sites,
        how=how,
        statistics=statistics,
        windows=None if sites[0].classes is None else options.window_maps,
        provenance=Calibration(n_images=n_images, digest=folder_digest(folder), source=folder.root.name),
        scores=scores,
        selection=select(scores, _entries_per_piece(sites, scores), options.sparsity),
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
        attention=_shapes(sites, freezing.window_maps),
        freezing=freezing,
        calibration=calibration,
        versions=package_versions(),
    )
    return checkpoints.save(Checkpoint(to_numpy(model), frozen, header), output)


def _shapes(sites: list[AttentionSite], mode: WindowMaps | None) -> dict[str, AttentionShape]:
    windows = {site.path: window_maps(site, mode or "shared") for site in sites}
    return {
        site.path: AttentionShape(
            heads=site.heads, tokens=site.tokens, windows=None if (used := windows[site.path]) is None else list(used)
        )
        for site in sites
    }


def _entries_per_piece(sites: list[AttentionSite], scores: Mapping[str, NDArray[np.float64]]) -> dict[str, int]:
    return {site.path: site.heads * site.entries_per_head // scores[site.path].size for site in sites}


def _head_means(scores: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    return {path: values.reshape(len(values), -1).mean(axis=1).tolist() for path, values in scores.items()}


def _shares(pieces: NDArray[np.bool_]) -> list[float]:
    """The share of frozen pieces of every head that has one."""
    shares = pieces.reshape(len(pieces), -1).mean(axis=1)
    return [float(share) for share in shares if share > 0]
