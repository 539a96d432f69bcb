"""The commands that made the files, as far as the files tell.

What a record does not hold is not guessed: its place is a word in capitals, or it is named as unknown beside the
command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eamdeploy.artifact import Preprocessing
from eamdeploy.eam.analysis import Analysis
from eamdeploy.eam.records import CheckpointHeader
from eamdeploy.engines.base import DeviceBuild, Manifest
from eamdeploy.evaluation import EvaluationReport
from eamdeploy.profiling.profile import Profile
from eamdeploy.reporting.sources import Sourced, Sources
from eamdeploy.run_state import RunState

if TYPE_CHECKING:
    from eamdeploy.host.export_record import Export

_IMAGES = re.compile(r"(.*) \((all|even|odd)(?:, at most (\d+))?\)", re.DOTALL)
_LIVE = " with all attention live"


@dataclass(frozen=True)
class Command:
    """A command line.

    Attributes:
        file: what it wrote.
        text: ready for a shell, but for its words in capitals.
        unknown: what the file does not tell; empty if it tells all that matters.
    """

    file: str
    text: str
    unknown: str


def commands(sources: Sources) -> list[Command]:
    """One for each file, in the order of the pipeline; `run` before all."""
    from eamdeploy.host.export_record import Export

    models = _models(sources)
    return [
        *(_run(item) for item in sources.of(RunState)),
        *(_analyze(item) for item in sources.of(Analysis)),
        *(_freeze(item) for item in sources.checkpoints),
        *(_export(item, sources) for item in sources.of(Export)),
        *(_build(item, models) for item in sources.of(Manifest)),
        *(_evaluate(item) for item in sources.of(EvaluationReport)),
        *(_profile(item) for item in sources.of(Profile)),
    ]


def _models(sources: Sources) -> dict[str, str]:
    """Names of ONNX models by digest, from what `export` and `run` recorded."""
    from eamdeploy.host.export_record import Export

    found: dict[str, str] = {}
    for run in sources.of(RunState):
        folder = run.file.rpartition("/")[0]
        if "export" in run.record.stages:
            outputs = run.record.stages["export"].outputs.items()
            found |= {digest: f"{folder}/{name}".lstrip("/") for name, digest in outputs}
    for item in sources.of(Export):
        for model in (item.record.frozen, item.record.baseline):
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
    return Command(item.file, _line("analyze", options), f"{unknown}; {record.calibration.n_images} images were used")


def _freeze(item: Sourced[CheckpointHeader]) -> Command:
    header = item.record
    freezing, calibration = header.freezing, header.calibration
    model: dict[str, Any] = {
        "--model": header.timm_model,
        "--weights": header.weights,
        "--model-kwargs": [f"{name}={value!r}" for name, value in header.timm_kwargs.items()],
        "--class-names": None if header.class_names is None else "CLASS_NAMES",
        **_preprocessing(header.preprocessing),
    }
    stored: dict[str, Any] = {"--bits": freezing.bits, "--quantizer": freezing.quantizer, "-o": item.file}
    if calibration is None:
        return Command(item.file, _line("pack", {**model, "--maps": "MAPS", **stored}), "the maps, folder of weights")
    chosen = {
        "--data": calibration.source,
        "--sparsity": freezing.sparsity_asked,
        "--granularity": freezing.granularity,
        "--window-maps": freezing.window_maps,
        "--score": freezing.score,
    }
    unknown = "folders of images and weights, --split, --images, --bins, --spacing, --seed, --score-images"
    text = _line("freeze", {**model, **chosen, **stored})
    return Command(item.file, text, f"{unknown}; {calibration.n_images} images were used")


def _export(item: Sourced[Export], sources: Sources) -> Command:
    record = item.record
    built = [built.record for built in sources.of(Manifest) if built.record.model_digest == record.frozen.digest]
    behind = {manifest.card.checkpoint_digest for manifest in built if manifest.card}
    checkpoint = next((each.file for each in sources.checkpoints if each.digest in behind), "CHECKPOINT")
    options: dict[str, Any] = {
        "-o": record.frozen.file,
        "--baseline": None if record.baseline is None else record.baseline.file,
        "--no-measure": record.gain is None,
        "--json": True,
    }
    unknown = "--batch, --opset, --target, --exporter, --data"
    missing = f"the checkpoint, {unknown}" if checkpoint == "CHECKPOINT" else unknown
    return Command(item.file, f"{_line('export', options, checkpoint)} > {shlex.quote(item.file)}", missing)


def _build(item: Sourced[Manifest], models: Mapping[str, str]) -> Command:
    manifest = item.record
    model = models.get(manifest.model_digest, "MODEL.onnx")
    options: dict[str, Any] = {
        "-o": item.file.removesuffix(".json"),
        "--threads": manifest.threads if manifest.backend == "ort" else None,
        **({} if manifest.device is None else _trt_options(manifest.device, manifest.settings)),
        "--no-check": manifest.parity is None,
    }
    unknown = [] if model in models.values() else [f"the name of the model {manifest.model_digest}"]
    if manifest.device is not None:
        unknown.append("--keep-fp32, --timing-cache and batch sizes, but for what the settings say")
    return Command(item.file, _line(f"build-{manifest.backend}", options, model), "; ".join(unknown))


def _trt_options(device: DeviceBuild, settings: Mapping[str, str]) -> dict[str, Any]:
    return {
        "--fp16": device.precision == "fp16",
        "--bf16": device.precision == "bf16",
        "--int8": device.int8,
        "--workspace": settings.get("memory_pools.WORKSPACE"),
        "--builder-level": settings.get("builder_optimization_level"),
        "--version-compatible": device.version_compatible,
        "--hardware-compatible": device.hardware_compatible,
        "--cuda-graph": settings.get("cuda_graph") == "True",
        "--layer-profile": device.layer_ms is not None,
        "--baseline": None if device.baseline is None else device.baseline.engine,
    }


def _evaluate(item: Sourced[EvaluationReport]) -> Command:
    record = item.record
    images = _IMAGES.fullmatch(record.images)
    folder, split, limit = images.groups() if images else ("IMAGES", None, None)
    reference = record.reference
    options: dict[str, Any] = {
        "--reference": None if reference is None or reference.endswith(_LIVE) else reference,
        "--data": folder,
        "--split": None if split == "all" else split,
        "--images": limit,
        "--skip-bad": record.n_skipped > 0,
        "-o": item.file,
    }
    return Command(item.file, _line("evaluate", options, record.model), "where the folder of images lies, --threads")


def _profile(item: Sourced[Profile]) -> Command:
    record = item.record
    options: dict[str, Any] = {
        "--baseline": None if record.baseline is None else record.baseline.engine,
        "--threads": record.threads,
        "--batch": record.batch,
        "--warmup-ms": record.warmup_ms,
        "--min-seconds": record.min_seconds,
        "--min-runs": record.min_runs,
        "--no-memory": all(engine.memory is None for engine in record.engines),
        "-o": item.file,
    }
    return Command(item.file, _line("profile", options, *(engine.engine for engine in record.engines)), "")


def _preprocessing(how: Preprocessing) -> dict[str, Any]:
    return {
        "--mean": how.mean,
        "--std": how.std,
        "--crop-pct": how.crop_pct,
        "--interpolation": how.interpolation,
    }


def _line(command: str, options: Mapping[str, Any], *arguments: str) -> str:
    """The command with those options that are set: True stands for a switch, a tuple or list for several words."""
    words = ["eamdeploy", command, *arguments]
    for name, value in options.items():
        if value is None or value is False or value == []:
            continue
        words.append(name)
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)
