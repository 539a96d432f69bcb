"""The commands that made the files, as far as the files tell.

What a record does not hold is not guessed: its place is a word in capitals, or it is named as unknown beside the
command.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eamdeploy.artifacts.card import Freezing, Preprocessing, Recovery, Training
from eamdeploy.artifacts.run_state import RunState
from eamdeploy.eam.analysis import Analysis
from eamdeploy.eam.records import CheckpointHeader
from eamdeploy.engines.manifest import DeviceBuild, Manifest
from eamdeploy.records.evaluation import EvaluatedImages, EvaluationReport
from eamdeploy.records.profile import Profile
from eamdeploy.remote.profile import RemoteProfiles
from eamdeploy.reporting.prose.command_line import Command, command_line
from eamdeploy.reporting.prose.reproduce_profile import local_profile, remote_profiles
from eamdeploy.reporting.records.sources import Sourced, Sources

if TYPE_CHECKING:
    from eamdeploy.records.export import Export


def commands(sources: Sources) -> list[Command]:
    """One for each file, in the order of the pipeline; `run` before all."""
    from eamdeploy.records.export import Export

    models = _models(sources)
    return [
        *(_run(item) for item in sources.of(RunState)),
        *(_analyze(item) for item in sources.of(Analysis)),
        *(_freeze(item, sources.checkpoints) for item in sources.checkpoints),
        *(_export(item, sources) for item in sources.of(Export)),
        *(_build(item, models) for item in sources.of(Manifest)),
        *(_evaluate(item) for item in sources.of(EvaluationReport)),
        *(local_profile(item) for item in sources.of(Profile)),
        *(remote_profiles(item) for item in sources.of(RemoteProfiles)),
    ]


def _models(sources: Sources) -> dict[str, str]:
    """Names of ONNX models by digest, from what `export` and `run` recorded."""
    from eamdeploy.records.export import Export

    found: dict[str, str] = {}
    for run in sources.of(RunState):
        folder = run.file.rpartition("/")[0]
        if "export" in run.record.stages:
            outputs = run.record.stages["export"].outputs.items()
            found |= {digest: f"{folder}/{name}".lstrip("/") for name, digest in outputs}
    for item in sources.of(Export):
        for model in (item.record.frozen, item.record.baseline, item.record.stock):
            found |= {} if model is None else {model.digest: model.file}
    return found


def _run(item: Sourced[RunState]) -> Command:
    return Command(item.file, "eamdeploy run CONFIG.toml", "the name of the configuration file")


def _analyze(item: Sourced[Analysis]) -> Command:
    record = item.record
    options: dict[str, Any] = {
        "--model": record.timm_model,
        "--weights": record.weights,
        "--data": record.calibration.source,
        "--exif-transpose": record.calibration.exif_transpose,
        **_preprocessing(record.preprocessing),
        "--sparsity": record.sparsity_asked,
        "--granularity": record.granularity,
        "--window-maps": record.window_maps,
        "--score": record.score,
        "--bins": record.bins,
        "--spacing": record.spacing,
        "-o": item.file,
    }
    unknown = "folders of images and weights, --model-kwargs, --split, --images, --bits, --quantizer, --seed"
    return Command(
        item.file, command_line("analyze", options), f"{unknown}; {record.calibration.n_images} images were used"
    )


def _freeze(item: Sourced[CheckpointHeader], others: Sequence[Sourced[CheckpointHeader]]) -> Command:
    header = item.record
    freezing, calibration = header.freezing, header.calibration
    if header.recovery is not None:
        teacher = next((each.file for each in others if each.record.content_digest == header.recovery.teacher), None)
        return _recover(item.file, header.recovery, teacher)
    model: dict[str, Any] = {
        "--model": header.timm_model,
        "--weights": header.weights,
        "--model-kwargs": tuple(f"{name}={value!r}" for name, value in header.timm_kwargs.items()) or None,
        "--class-names": None if header.class_names is None else "CLASS_NAMES",
        **_preprocessing(header.preprocessing),
    }
    stored: dict[str, Any] = {"--bits": freezing.bits, "--quantizer": freezing.quantizer, "-o": item.file}
    if calibration is None:
        return Command(
            item.file, command_line("pack", {**model, "--maps": "MAPS", **stored}), "the maps, folder of weights"
        )
    chosen = {
        "--data": calibration.source,
        "--exif-transpose": calibration.exif_transpose,
        "--sparsity": freezing.sparsity_asked,
        "--granularity": freezing.granularity,
        "--window-maps": freezing.window_maps,
        "--rank": _rank(freezing),
        "--score": freezing.score,
    }
    unknown = "folders of images and weights, --split, --images, --bins, --spacing, --seed, --score-images"
    text = command_line("freeze", {**model, **chosen, **stored})
    return Command(item.file, text, f"{unknown}; {calibration.n_images} images were used")


def _rank(freezing: Freezing) -> str | None:
    """What `--rank` was: one number for all heads, or the choice among several kinds; None for whole maps alone."""
    ranks = {freezing.rank_of(path, head) for path, heads in freezing.heads.items() for head in heads}
    if ranks <= {None}:
        return None
    return "auto" if len(ranks) > 1 else str(*ranks)


def _recover(file: str, found: Recovery, teacher: str | None) -> Command:
    options: dict[str, Any] = {
        "--data": found.source,
        "--exif-transpose": found.exif_transpose,
        "--method": found.method,
        "--seed": found.seed,
        **({} if found.training is None else _training(found.training)),
        "-o": file,
    }
    missing = [
        *([] if teacher else ["the checkpoint before recovery"]),
        "where the folder of images lies, --split, --images, --held-back",
    ]
    text = command_line("recover", options, teacher or "CHECKPOINT")
    return Command(file, text, f"{', '.join(missing)}; {found.n_images} images were used")


def _training(found: Training) -> dict[str, Any]:
    return {
        "--epochs": found.epochs_asked,
        "--batch": found.batch,
        "--learning-rate": found.learning_rate,
        "--maps-rate": found.maps_rate,
    }


def _export(item: Sourced[Export], sources: Sources) -> Command:
    record = item.record
    built = [built.record for built in sources.of(Manifest) if built.record.model_digest == record.frozen.digest]
    behind = {manifest.card.checkpoint_digest for manifest in built if manifest.card}
    checkpoint = next((each.file for each in sources.checkpoints if each.digest in behind), "CHECKPOINT")
    options: dict[str, Any] = {
        "-o": record.frozen.file,
        "--baseline": None if record.baseline is None else record.baseline.file,
        "--stock": None if record.stock is None else record.stock.file,
        "--no-measure": record.gain is None,
        "--json": True,
    }
    unknown = "--batch, --opset, --target, --exporter, --without, --data"
    missing = f"the checkpoint, {unknown}" if checkpoint == "CHECKPOINT" else unknown
    return Command(item.file, f"{command_line('export', options, checkpoint)} > {shlex.quote(item.file)}", missing)


def _build(item: Sourced[Manifest], models: Mapping[str, str]) -> Command:
    manifest = item.record
    model = models.get(manifest.model_digest, "MODEL.onnx")
    options: dict[str, Any] = {
        "-o": item.file.removesuffix(".json"),
        "--threads": manifest.threads if manifest.backend == "ort" else None,
        "--provider": None if manifest.provider == "cpu" else manifest.provider,
        **(_ort_options(manifest) if manifest.device is None else _trt_options(manifest.device, manifest.settings)),
        "--no-check": manifest.parity is None,
    }
    unknown = [] if model in models.values() else [f"the name of the model {manifest.model_digest}"]
    if _is_static(manifest):
        unknown.append("where the calibration images lie, other --calib options, --exif-transpose, --min-agreement")
    elif manifest.card is not None and "dynamic_int8" in manifest.card.rewrites:
        unknown.append("--min-agreement")
    if manifest.device is not None:
        kept = "keep_fp32" in manifest.settings or manifest.device.precision == "fp32"
        unknown.append(
            f"{'' if kept else '--keep-fp32, '}--timing-cache and batch sizes, but for what the settings say"
        )
        if manifest.device.calibration is not None:
            unknown.append("where the calibration images lie, --calib-split, --calib-cache, --exif-transpose")
        elif manifest.device.int8 and _may_be_calibrated(manifest):
            unknown.append("whether --calib-data was given, and other --calib options")
    return Command(item.file, command_line(f"build-{manifest.backend}", options, model), "; ".join(unknown))


def _ort_options(manifest: Manifest) -> dict[str, Any]:
    done = [] if manifest.card is None else manifest.card.rewrites
    return {
        "--fused-attention": "fused_attention" in done,
        "--int8": "dynamic_int8" in done or _is_static(manifest),
        "--calib-data": "IMAGES" if _is_static(manifest) else None,
    }


def _is_static(manifest: Manifest) -> bool:
    return manifest.backend == "ort" and manifest.card is not None and "quantize_products" in manifest.card.rewrites


def _may_be_calibrated(manifest: Manifest) -> bool:
    """Whether an INT8 engine may have been calibrated though its manifest has no record of it.

    An older manifest has no such record. A model without a card, or one that was quantized before,
    is never calibrated.
    """
    return manifest.card is not None and "quantize_products" not in manifest.card.rewrites


def _trt_options(device: DeviceBuild, settings: Mapping[str, str]) -> dict[str, Any]:
    return {
        "--fp16": device.precision == "fp16",
        "--bf16": device.precision == "bf16",
        "--int8": device.int8,
        **_calibration(device),
        "--keep-fp32": settings.get("keep_fp32"),
        "--workspace": settings.get("memory_pools.WORKSPACE"),
        "--builder-level": settings.get("builder_optimization_level"),
        "--version-compatible": device.version_compatible,
        "--hardware-compatible": device.hardware_compatible,
        "--cuda-graph": settings.get("cuda_graph") == "True",
        "--layer-profile": device.layer_ms is not None,
        "--baseline": None if device.baseline is None else device.baseline.engine,
    }


def _calibration(device: DeviceBuild) -> dict[str, Any]:
    """The images that told the ranges of activations, where they are on record."""
    found = device.calibration
    if found is None:
        return {}
    return {
        "--calib-data": found.folder,
        "--calib-images": found.images,
        "--calib-method": found.method,
    }


def _evaluate(item: Sourced[EvaluationReport]) -> Command:
    record = item.record
    reference_known = _is_reference_known(record)
    options: dict[str, Any] = {
        "--reference": _reference(record) if reference_known else "REFERENCE",
        "--live": record.reference_all_live,
        **_evaluated_images(record.image_source),
        "--skip-bad": record.n_skipped > 0,
        "--class-order": record.class_order,
        "-o": item.file,
    }
    unknown = [
        *([] if reference_known else ["what the reference was"]),
        "where the folder of images lies",
        *(["--split, --images, --exif-transpose"] if record.image_source is None else []),
        "--class-names, --threads",
    ]
    return Command(item.file, command_line("evaluate", options, record.model), ", ".join(unknown))


def _evaluated_images(found: EvaluatedImages | None) -> dict[str, Any]:
    """The options that name the images; a placeholder where an older report has words only."""
    if found is None:
        return {"--data": "IMAGES"}
    return {
        "--data": found.folder,
        "--split": None if found.split == "all" else found.split,
        "--images": found.limit,
        "--exif-transpose": found.exif_transpose,
    }


def _is_reference_known(record: EvaluationReport) -> bool:
    """Whether the report tells if the reference was a file, or the model with all attention live.

    An older report does so where the digests differ: the model with all attention live has the
    digest of its own checkpoint.
    """
    return record.reference_is_live is not None or record.reference_digest != record.model_digest


def _reference(record: EvaluationReport) -> str | None:
    """The file that was named as the reference; None where none was."""
    return None if record.reference_is_live else record.reference


def _preprocessing(how: Preprocessing) -> dict[str, Any]:
    return {
        "--mean": how.mean,
        "--std": how.std,
        "--crop-pct": how.crop_pct,
        "--interpolation": how.interpolation,
    }
