"""All stages in order, from a configuration file, each run only when something it depends on has changed.

    freeze ─▶ export ─▶ build ─▶ evaluate ─▶ profile ─▶ report
    model,    ONNX and  engine   accuracy    latency,   one page
    images    its twin  and twin             memory     of all

`run.json` in the output folder remembers, for every stage, a digest of all that went into it and the digests of what
came out. A stage whose inputs are the same and whose outputs are still there, untouched, is not run again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, ValidationError

from eamdeploy.artifact import Record, digest_bytes, digest_file
from eamdeploy.build import build_ort
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.checkpoint import CheckpointHeader
from eamdeploy.engines.base import manifest_path
from eamdeploy.engines.provenance import package_versions, usable_cores
from eamdeploy.errors import CheckpointError, ConfigError, host_packages
from eamdeploy.evaluation import EvaluationReport, evaluate
from eamdeploy.folder import Split, folder_digest
from eamdeploy.observer import SILENT, Observer
from eamdeploy.parity import REFERENCE_IMAGES, reference_path
from eamdeploy.profiling.profile import Profile, profile
from eamdeploy.profiling.timing import Schedule
from eamdeploy.reporting.report import report
from eamdeploy.run_state import RUN_STATE, RunState, StageState
from eamdeploy.source import ImageSource, read_class_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_Batch = Annotated[int | None, Field(ge=1), BeforeValidator(lambda value: None if value == "dynamic" else value)]


class ModelConfig(Record):
    """`[model]`: what `--model`, `--weights` and `--model-kwargs` say."""

    name: str
    weights: str = "pretrained"
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    class_names: Path | None = None


class PreprocessingConfig(Record):
    """`[preprocessing]`: what timm's data config is overridden with."""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None


class ImagesConfig(Record):
    """`[calibrate]`, `[evaluate]`: a folder of images and what to take of it."""

    data: Path
    split: Split = "all"
    images: int | None = None
    skip_bad: bool = False


class FreezeConfig(Record):
    """`[freeze]`: the options of `eamdeploy freeze`."""

    sparsity: float = 0.2
    granularity: Literal["head", "row", "entry"] = "head"
    window_maps: Literal["shared", "class", "window"] = "shared"
    score: Literal["sensitivity", "entropy", "row-entropy", "variance", "random"] = "sensitivity"
    bits: Literal[2, 3, 4, 8] = 4
    quantizer: Literal["uniform", "squared"] = "squared"
    bins: int = 16
    spacing: Literal["uniform", "squared"] = "uniform"
    seed: int = 0
    score_images: int | None = None


class ExportConfig(Record):
    """`[export]`: the options of `eamdeploy export`; `batch` is a number or "dynamic"."""

    batch: _Batch = None
    opset: int = 17
    exporter: Literal["auto", "dynamo", "torchscript"] = "auto"
    fold_preprocess: bool = False
    without: tuple[str, ...] = ()


class ProfileConfig(Record):
    """`[profile]`: the options of `eamdeploy profile`."""

    threads: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)
    warmup_ms: float = 200.0
    min_seconds: float = 3.0
    min_runs: int = 50
    sittings: int = 6


class RunConfig(Record):
    """A whole run; paths are relative to the configuration file's folder.

    Attributes:
        output: folder for everything that the stages write.
        evaluate: None leaves the accuracy out.
    """

    output: Path
    model: ModelConfig
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    calibrate: ImagesConfig
    freeze: FreezeConfig = FreezeConfig()
    export: ExportConfig = ExportConfig()
    evaluate: ImagesConfig | None = None
    profile: ProfileConfig = ProfileConfig()


class RunReport(Record):
    """What `run` did.

    Attributes:
        ran, reused: stages by name.
        files: what is now in the output folder, by file name.
        freezing, evaluation, profile: what the files say, also of reused stages.
    """

    ran: list[str]
    reused: list[str]
    files: dict[str, str]
    freezing: CheckpointHeader
    evaluation: EvaluationReport | None
    profile: Profile


@dataclass(frozen=True)
class _Stage:
    """One step of the run.

    Attributes:
        inputs: everything that its outputs depend on.
        outputs: the files it writes.
        action: writes them.
    """

    inputs: Mapping[str, object]
    outputs: list[Path]
    action: Callable[[], object]


def load_config(path: Path) -> RunConfig:
    """The configuration in a TOML file, its paths made relative to the current folder.

    Raises:
        ConfigError: the file can't be read, is no TOML, or has a wrong, missing or unknown key; the key is named.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        config = RunConfig.model_validate(document)
    except ValidationError as err:
        first = err.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {key}: {first['msg']}", hint="See docs/usage.md for every key.") from err
    except (OSError, ValueError) as err:
        raise ConfigError(f"cannot read the configuration {path}: {err}") from err
    return _anchored(config, path.parent)


def run(config: RunConfig, *, force: bool = False, observer: Observer = SILENT) -> RunReport:
    """The output folder holds checkpoint, models, engines, evaluation, profile and report of `config`.

    Args:
        force: run every stage again.

    Raises:
        EamDeployError: a stage failed, as that stage documents; what earlier stages wrote stays, and the next run goes
            on from there.
    """
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(f"cannot make the folder {config.output}: {err.strerror}") from err
    state_path = config.output / RUN_STATE
    state = RunState() if force else _read_state(state_path, observer)
    ran, reused, files = [], [], {}
    for name, make_stage in _STAGES.items():
        stage = make_stage(config, observer)
        if stage is None:
            state = _without(name, state, state_path)
            continue
        inputs = digest_bytes(json.dumps(stage.inputs, sort_keys=True, default=str).encode())
        if _is_done(state.stages.get(name), inputs, stage.outputs):
            reused.append(name)
        else:
            observer.note(f"{name}: running")
            stage.action()
            finished = StageState(inputs=inputs, outputs={file.name: digest_file(file) for file in stage.outputs})
            state = RunState(stages={**state.stages, name: finished})
            state.write(state_path)
            ran.append(name)
        files.update({file.name: str(file) for file in stage.outputs})
    evaluated = config.output / "evaluation.json"
    return RunReport(
        ran=ran,
        reused=reused,
        files=files,
        freezing=checkpoints.load(config.output / "model.eam.safetensors").header,
        evaluation=EvaluationReport.read(evaluated) if config.evaluate else None,
        profile=Profile.read(config.output / "profile.json"),
    )


# --- the stages ------------------------------------------------------------------------------------------------------


def _freeze_stage(config: RunConfig, observer: Observer) -> _Stage:
    output, model = config.output / "model.eam.safetensors", config.model
    heatmap = config.output / "heatmap.png"
    images = _source(config.calibrate)

    def action() -> None:
        with host_packages("freezing"):
            from eamdeploy.host.freezing import freeze, read_shares
            from eamdeploy.host.model import ModelSpec, PreprocessingOverrides
            from eamdeploy.host.options import FreezeOptions
            from eamdeploy.reporting.heatmap import draw_heatmap
        header = freeze(
            ModelSpec(model.name, model.weights, model.kwargs),
            images,
            output,
            FreezeOptions(**config.freeze.model_dump()),
            overrides=PreprocessingOverrides(**config.preprocessing.model_dump()),
            class_names=read_class_names(model.class_names),
            observer=observer,
        )
        draw_heatmap(
            header.freezing.scores,
            score_name=header.freezing.score,
            frozen=header.freezing.heads,
            shares=read_shares(output),
            title=header.timm_model,
            path=heatmap,
        )

    weights = Path(model.weights)
    inputs = {  # names and contents, no paths, so that a run may be moved or started from another folder
        "config": config.model_dump(mode="json", include={"preprocessing", "freeze"}),
        "model": [model.name, model.kwargs, weights.name, read_class_names(model.class_names)],
        "weights": digest_file(weights) if weights.is_file() else model.weights,
        "images": [images.root.name, images.skip_bad, folder_digest(images.open())],
        "versions": _versions("eamdeploy", "torch", "timm"),
    }
    return _Stage(inputs, [output, heatmap], action)


def _export_stage(config: RunConfig, observer: Observer) -> _Stage:
    checkpoint = config.output / "model.eam.safetensors"
    model, baseline = config.output / "model.onnx", config.output / "baseline.onnx"
    images = replace(_source(config.calibrate), limit=REFERENCE_IMAGES)

    def action() -> None:
        with host_packages("exporting"):
            from eamdeploy.host.exporting import export
        export(
            checkpoint,
            model,
            baseline=baseline,
            batch=config.export.batch,
            opset=config.export.opset,
            exporter=config.export.exporter,
            fold_preprocess=config.export.fold_preprocess,
            without=config.export.without,
            images=images,
            observer=observer,
        )

    inputs = {
        "config": config.export.model_dump(mode="json"),
        "checkpoint": digest_file(checkpoint),
        "images": folder_digest(images.open()),
        "versions": _versions("eamdeploy", "torch", "onnx", "onnxscript"),
    }
    outputs = [model, baseline, reference_path(model), reference_path(baseline)]
    return _Stage(inputs, outputs, action)


def _build_stage(config: RunConfig, observer: Observer) -> _Stage:
    models = [config.output / "model.onnx", config.output / "baseline.onnx"]
    engines = [_engine(model) for model in models]

    def action() -> None:
        for model, engine in zip(models, engines, strict=True):
            build_ort(model, engine, threads=config.profile.threads)

    inputs = {
        "models": [digest_file(file) for model in models for file in (model, reference_path(model))],
        "threads": config.profile.threads,
        "versions": _versions("eamdeploy", "onnxruntime"),
    }
    return _Stage(inputs, [*engines, *map(manifest_path, engines)], action)


def _evaluate_stage(config: RunConfig, observer: Observer) -> _Stage | None:
    if config.evaluate is None:
        return None
    output, images = config.output / "evaluation.json", _source(config.evaluate)
    engine, baseline = (_engine(config.output / name) for name in ("model.onnx", "baseline.onnx"))

    def action() -> None:
        evaluate(engine, images, reference=baseline, observer=observer).write(output)

    header = checkpoints.load(config.output / "model.eam.safetensors").header
    folder = images.open_labelled(header.num_classes, header.class_names)
    inputs = {
        "engines": [digest_file(engine), digest_file(baseline)],
        "images": folder_digest(folder, with_labels=True),
        "versions": _versions("eamdeploy", "onnxruntime"),
    }
    return _Stage(inputs, [output], action)


def _profile_stage(config: RunConfig, observer: Observer) -> _Stage:
    output, options = config.output / "profile.json", config.profile
    engine, baseline = (_engine(config.output / name) for name in ("model.onnx", "baseline.onnx"))

    def action() -> None:
        observer.note("profiling; keep the machine otherwise idle")
        profile(
            [engine],
            baseline,
            threads=options.threads or usable_cores(),
            batch=options.batch,
            schedule=Schedule(options.warmup_ms, options.min_seconds, options.min_runs, options.sittings),
        ).write(output)

    inputs = {
        "config": options.model_dump(mode="json"),
        "engines": [digest_file(engine), digest_file(baseline)],
        "versions": _versions("eamdeploy", "onnxruntime"),
    }
    return _Stage(inputs, [output], action)


def _report_stage(config: RunConfig, observer: Observer) -> _Stage:
    output, state = config.output / "report.html", config.output / RUN_STATE
    shown = ["model.eam.safetensors", "model.ort.onnx.json", "baseline.ort.onnx.json", "profile.json"]
    shown += [] if config.evaluate is None else ["evaluation.json"]

    def action() -> None:
        report([state], output)

    inputs = {
        "files": [digest_file(config.output / name) for name in shown],
        "versions": _versions("eamdeploy"),
    }
    return _Stage(inputs, [output], action)


_STAGES: Mapping[str, Callable[[RunConfig, Observer], _Stage | None]] = {
    "freeze": _freeze_stage,
    "export": _export_stage,
    "build": _build_stage,
    "evaluate": _evaluate_stage,
    "profile": _profile_stage,
    "report": _report_stage,
}


# --- what they share -------------------------------------------------------------------------------------------------


def _is_done(state: StageState | None, inputs: str, outputs: list[Path]) -> bool:
    return (
        state is not None
        and state.inputs == inputs
        and all(file.is_file() and state.outputs.get(file.name) == digest_file(file) for file in outputs)
    )


def _without(name: str, state: RunState, path: Path) -> RunState:
    """`state`, here and at `path`, without a stage that the configuration no longer has."""
    if name not in state.stages:
        return state
    rest = RunState(stages={other: stage for other, stage in state.stages.items() if other != name})
    rest.write(path)
    return rest


def _read_state(path: Path, observer: Observer) -> RunState:
    """The state, or an empty one where there is none or it can't be trusted."""
    if not path.exists():
        return RunState()
    try:
        return RunState.read(path)
    except CheckpointError as err:
        observer.note(f"{err}; every stage runs again")
        return RunState()


def _source(config: ImagesConfig) -> ImageSource:
    return ImageSource(config.data, config.split, config.images, config.skip_bad)


def _engine(model: Path) -> Path:
    """`model.ort.onnx` beside `model.onnx`."""
    return model.with_suffix(".ort.onnx")


def _versions(*packages: str) -> dict[str, str]:
    versions = package_versions()
    return {name: versions[name] for name in packages if name in versions}


def _anchored(config: RunConfig, root: Path) -> RunConfig:
    """`config` with its paths relative to `root`."""

    def below(path: Path | str) -> Path:
        return Path(os.path.normpath(root / path))

    def anchor(section: Any, key: str) -> Any:
        value = getattr(section, key)
        return section if value is None else section.model_copy(update={key: below(value)})

    model = anchor(config.model, "class_names")
    if config.model.weights not in ("pretrained", "random"):
        model = model.model_copy(update={"weights": str(below(config.model.weights))})
    update = {"output": below(config.output), "model": model, "calibrate": anchor(config.calibrate, "data")}
    if config.evaluate is not None:
        update["evaluate"] = anchor(config.evaluate, "data")
    return config.model_copy(update=update)
