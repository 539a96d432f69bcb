"""The stages that make an EAM checkpoint: look at the attention maps, choose heads, freeze and quantize them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifact import Freezing, Preprocessing, Record, require_output
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam import scores as map_scores
from eamdeploy.eam.checkpoint import AttentionShape, Calibration, Checkpoint, CheckpointHeader, FrozenMaps
from eamdeploy.eam.quantizers import Bits, Quantizer, quantize_rows
from eamdeploy.eam.selection import Selection, select
from eamdeploy.eam.statistics import MapStatistics, Spacing
from eamdeploy.engines.provenance import package_versions
from eamdeploy.errors import ConfigError
from eamdeploy.folder import folder_digest
from eamdeploy.host.attention import AttentionSite, attention_sites
from eamdeploy.host.calibrate import as_tensors, collect_statistics
from eamdeploy.host.model import (
    TIMM_PREPROCESSING,
    ModelSpec,
    PreprocessingOverrides,
    load_model,
    preprocessing_of,
    to_numpy,
)
from eamdeploy.host.sensitivity import sensitivity
from eamdeploy.observer import SILENT, Observer
from eamdeploy.source import ImageSource

Score = Literal["sensitivity", "entropy", "row-entropy", "variance", "random"]
SCORES: tuple[Score, ...] = get_args(Score)

_BATCH = 16


@dataclass(frozen=True)
class FreezeOptions:
    """What to freeze and how.

    Attributes:
        sparsity: frozen ÷ all attention entries, in [0, 1].
        score: what ranks the heads; lowest first.
        bits, quantizer: how a frozen map is stored.
        bins, spacing: of the histograms behind `entropy`.
        seed: for the score `random`.
        score_images: images for `sensitivity`, spread evenly over the calibration images; None for all.
    """

    sparsity: float = 0.2
    granularity: Literal["head"] = "head"
    score: Score = "sensitivity"
    bits: Bits = 4
    quantizer: Quantizer = "squared"
    bins: int = 16
    spacing: Spacing = "uniform"
    seed: int = 0
    score_images: int | None = None


DEFAULT_OPTIONS = FreezeOptions()


class Analysis(Record):
    """What the attention maps of a model look like over a set of images; the output of `analyze`.

    Attributes:
        scores: by score, by attention module path, one value per head.
        frozen: the heads that `freeze` would take at `sparsity_asked` by `score`.
    """

    timm_model: str
    weights: str
    preprocessing: Preprocessing
    attention: dict[str, AttentionShape]
    calibration: Calibration
    bins: int
    spacing: Spacing
    score: Score
    scores: dict[str, dict[str, list[float]]]
    sparsity_asked: float
    sparsity: float
    frozen: dict[str, list[int]]
    versions: dict[str, str]


@dataclass(frozen=True)
class _Calibrated:
    """A model after its calibration images went through it."""

    model: Any
    sites: list[AttentionSite]
    how: Preprocessing
    statistics: dict[str, MapStatistics]
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
    scores = {name: map_scores.score_heads(done.statistics, name) for name in ("entropy", "row-entropy", "variance")}
    return Analysis(
        timm_model=spec.name,
        weights=spec.source,
        preprocessing=done.how,
        attention=_shapes(done.sites),
        calibration=done.provenance,
        bins=options.bins,
        spacing=options.spacing,
        score=options.score,
        scores={name: _lists(values) for name, values in {**scores, options.score: done.scores}.items()},
        sparsity_asked=options.sparsity,
        sparsity=done.selection.sparsity,
        frozen={path: list(heads) for path, heads in done.selection.heads.items()},
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
        path: _quantize(path, np.array(heads), done.statistics[path].mean()[list(heads)], options)
        for path, heads in done.selection.heads.items()
    }
    freezing = Freezing(
        granularity=options.granularity,
        bits=options.bits,
        quantizer=options.quantizer,
        score=options.score,
        scores=_lists(done.scores),
        sparsity_asked=options.sparsity,
        sparsity=done.selection.sparsity,
        heads={path: list(heads) for path, heads in done.selection.heads.items()},
    )
    return _save(spec, done.model, done.sites, done.how, class_names, freezing, frozen, done.provenance, output)


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
    shapes = _shapes(sites)
    unknown = [path for path in maps if path not in shapes]
    if unknown:
        raise ConfigError(f"{spec.name} has no attention module {unknown[0]}", expected=f"one of {', '.join(shapes)}")
    frozen_entries = sum(len(item.heads) * shapes[path].entries_per_head for path, item in maps.items())
    entries = sum(shape.heads * shape.entries_per_head for shape in shapes.values())
    freezing = Freezing(
        bits=bits,
        quantizer=quantizer,
        score="given",
        sparsity_asked=None,
        sparsity=frozen_entries / entries,
        heads={path: item.heads.tolist() for path, item in maps.items()},
    )
    how = preprocessing_of(model, overrides)
    return _save(spec, model, sites, how, class_names, freezing, dict(maps), None, output)


def _calibrate(
    spec: ModelSpec,
    images: ImageSource,
    options: FreezeOptions,
    overrides: PreprocessingOverrides,
    class_names: list[str] | None,
    observer: Observer,
) -> _Calibrated:
    """Everything that `analyze` and `freeze` share: statistics over the images, scores, selection."""
    _check(options)
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
        on_images=lambda done: observer.progress("attention maps", done, len(folder.files)),
    )
    n_images = next(iter(statistics.values())).n_samples
    scores = _scores(model, sites, statistics, images, how, options, observer)
    return _Calibrated(
        model=model,
        sites=sites,
        how=how,
        statistics=statistics,
        provenance=Calibration(n_images=n_images, digest=folder_digest(folder), source=folder.root.name),
        scores=scores,
        selection=select(scores, {site.path: site.entries_per_head for site in sites}, options.sparsity),
    )


def _check(options: FreezeOptions) -> None:
    """Bad options fail before minutes of work, not after."""
    select({"": np.zeros(1)}, {"": 1}, options.sparsity)
    if options.score not in SCORES:
        raise ConfigError("unknown score", expected=f"one of {', '.join(SCORES)}", got=options.score)
    quantize_rows(np.ones((1, 1)), options.bits, options.quantizer)
    if options.score_images is not None and options.score_images < 1:
        raise ConfigError("cannot score on that number of images", expected="at least 1", got=options.score_images)


def _check_class_names(class_names: list[str] | None, num_classes: int) -> None:
    if class_names is not None and len(class_names) != num_classes:
        raise ConfigError("the class names don't fit the model", expected=f"{num_classes} names", got=len(class_names))


def _scores(
    model: Any,
    sites: list[AttentionSite],
    statistics: Mapping[str, MapStatistics],
    images: ImageSource,
    how: Preprocessing,
    options: FreezeOptions,
    observer: Observer,
) -> dict[str, NDArray[np.float64]]:
    if options.score != "sensitivity":
        return map_scores.score_heads(statistics, options.score, seed=options.seed)
    maps = {
        path: _quantize(path, np.arange(module.shape[0]), module.mean(), options).maps(options.quantizer)
        for path, module in statistics.items()
    }
    chosen = images if options.score_images is None else replace(images, limit=options.score_images)
    folder = chosen.open()
    estimated = False

    def on_progress(done: int, total: int, seconds_left: float) -> None:
        nonlocal estimated
        if not estimated:
            observer.note(f"sensitivity of {sum(s.heads for s in sites)} heads: about {_duration(seconds_left)}")
            estimated = True
        observer.progress("sensitivity", done, total)

    batches = as_tensors(chosen.batches(folder, how, _BATCH, observer), how)
    return sensitivity(model, sites, maps, batches, len(folder.files), on_progress)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _quantize(path: str, heads: NDArray[np.int64], maps: NDArray[np.float64], options: FreezeOptions) -> FrozenMaps:
    codes, scales = quantize_rows(maps, options.bits, options.quantizer, where=path)
    return FrozenMaps(heads, codes, scales)


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
        timm_kwargs=dict(spec.kwargs),
        weights=spec.source,
        num_classes=model.num_classes,
        class_names=class_names,
        preprocessing=how,
        attention=_shapes(sites),
        freezing=freezing,
        calibration=calibration,
        versions=package_versions(),
    )
    checkpoints.save(Checkpoint(to_numpy(model), frozen, header), output)
    return header


def _shapes(sites: list[AttentionSite]) -> dict[str, AttentionShape]:
    return {site.path: AttentionShape(heads=site.heads, tokens=site.tokens) for site in sites}


def _lists(scores: Mapping[str, NDArray[np.float64]]) -> dict[str, list[float]]:
    return {path: [float(value) for value in values] for path, values in scores.items()}
