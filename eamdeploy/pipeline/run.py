"""All stages in order, from a configuration file, each run only when something it depends on has changed.

    freeze ─▶ recover ─▶ export ─▶ build ─▶ evaluate ─▶ profile ─▶ report
    model,    if asked   ONNX and  engine   accuracy    latency,   one page
    images    for        its twin  and twin             memory     of all

`run.json` in the output folder remembers, for every stage, a digest of all that went into it and the digests of what
came out. A stage whose inputs are the same and whose outputs are still there, untouched, is not run again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from eamdeploy.artifacts.files import digest_bytes, digest_file, is_file, is_there
from eamdeploy.artifacts.onnx_files import digest_model
from eamdeploy.artifacts.records import Record
from eamdeploy.artifacts.run_state import RUN_STATE, RunState, StageState
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.checkpoint import CheckpointHeader
from eamdeploy.engines.manifest import manifest_path
from eamdeploy.errors import CheckpointError, ConfigError, EamDeployError
from eamdeploy.observer import SILENT, Observer
from eamdeploy.pipeline.config import RunConfig
from eamdeploy.pipeline.engines import build_stage, evaluate_stage, profile_stage
from eamdeploy.pipeline.host import export_stage, freeze_stage, recover_stage
from eamdeploy.pipeline.stage import Stage, checkpoint_of, engines, versions_of
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.records.profile import Profile
from eamdeploy.stages.report import report


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
            finished = StageState(inputs=inputs, outputs={file.name: digest_model(file) for file in stage.outputs})
            state = RunState(stages={**state.stages, name: finished})
            state.write(state_path)
            ran.append(name)
        files.update({file.name: str(file) for file in stage.outputs})
    evaluated = config.output / "evaluation.json"
    return RunReport(
        ran=ran,
        reused=reused,
        files=files,
        freezing=checkpoints.load(checkpoint_of(config)).header,
        evaluation=EvaluationReport.read(evaluated) if config.evaluate else None,
        profile=Profile.read(config.output / "profile.json"),
    )


def _report_stage(config: RunConfig, observer: Observer) -> Stage:
    output, state = config.output / "report.html", config.output / RUN_STATE
    manifests = [manifest_path(engine).name for engine in engines(config)]
    shown = [checkpoint_of(config).name, *manifests, "profile.json"]
    shown += [] if config.evaluate is None else ["evaluation.json"]

    def action() -> None:
        report([state], output)

    inputs = {
        "files": [digest_file(config.output / name) for name in shown],
        "versions": versions_of("eamdeploy"),
    }
    return Stage(inputs, [output], action)


_STAGES: Mapping[str, Callable[[RunConfig, Observer], Stage | None]] = {
    "freeze": freeze_stage,
    "recover": recover_stage,
    "export": export_stage,
    "build": build_stage,
    "evaluate": evaluate_stage,
    "profile": profile_stage,
    "report": _report_stage,
}


# --- what is remembered -----------------------------------------------------------------------------------------------


def _is_done(state: StageState | None, inputs: str, outputs: list[Path]) -> bool:
    return (
        state is not None
        and state.inputs == inputs
        and all(is_file(file) and state.outputs.get(file.name) == _digest(file) for file in outputs)
    )


def _digest(output: Path) -> str | None:
    """None for a model that lacks a file with its data."""
    try:
        return digest_model(output)
    except EamDeployError:
        return None


def _without(name: str, state: RunState, path: Path) -> RunState:
    """`state`, here and at `path`, without a stage that the configuration no longer has."""
    if name not in state.stages:
        return state
    rest = RunState(stages={other: stage for other, stage in state.stages.items() if other != name})
    rest.write(path)
    return rest


def _read_state(path: Path, observer: Observer) -> RunState:
    """The state, or an empty one where there is none or it can't be trusted."""
    if not is_there(path):
        return RunState()
    try:
        return RunState.read(path)
    except CheckpointError as err:
        observer.note(f"{err}; every stage runs again")
        return RunState()
