"""The commands that the campaign kills, on tiny inputs, each with older outputs in place."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tiny_models import KWARGS, NAME, draw_pictures, make_model, save_weights

from eamdeploy.artifacts.files import digest_file
from eamdeploy.artifacts.records import Record
from eamdeploy.artifacts.run_state import RunState
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.engines.manifest import Manifest, read_manifest
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import CheckpointError
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.records.profile import Profile
from hostile.killing import Target, eamdeploy

_CHANGES = {"depth": 1, "embed_dim": 24}
_MODEL = ["--model", NAME, "--model-kwargs", *(f"{key}={value}" for key, value in {**KWARGS, **_CHANGES}.items())]

_TOML = """output = "out"
[model]
name = "{name}"
weights = "weights.safetensors"
[model.kwargs]
{kwargs}
[calibrate]
data = "pictures"
[freeze]
sparsity = {sparsity}
score = "variance"
[export]
exporter = "torchscript"
[evaluate]
data = "pictures"
[profile]
threads = 1
warmup_ms = 0.0
min_seconds = 0.0
min_runs = 2
sittings = 1
"""


def read_alone(path: Path) -> str:
    """What a file says, but for what differs between two good runs; `damaged` where it can't be read."""
    if not path.is_file():
        return "missing"
    kinds: dict[str, type[Record]] = {"evaluation.json": EvaluationReport, "run.json": RunState}
    kind = Manifest if path.name.endswith(".ort.onnx.json") else kinds.get(path.name)
    try:
        if path.name == "profile.json":
            Profile.read(path)
            return "a profile"
        if path.name == "report.html":  # shows times; the seals of what it is made of are checked by the next run
            text = path.read_text()
            return "a page" if text.rstrip().endswith("</html>") else "damaged"
        if kind is not None:
            return _plain(kind.read(path))
    except CheckpointError:
        return "damaged"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain(record: Record) -> str:
    if isinstance(record, RunState):  # digests of times
        return ", ".join(record.stages)
    return record.model_copy(update={"created": ""}).model_dump_json() if isinstance(record, Manifest) else str(record)


def read_outputs(folder: Path) -> Mapping[str, str]:
    """What every file says.

    Raises:
        EamDeployError: a file is damaged, or files that belong together don't.
    """
    files = [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    found = {file.name: read_alone(file) for file in files}
    if damaged := [name for name, says in found.items() if says == "damaged"]:
        raise AssertionError(f"half-written: {', '.join(damaged)}")
    for file in files:
        if file.suffix == ".safetensors":
            checkpoints.load(file)
        elif file.suffix == ".npz":
            ReferenceSet.load(file)
        elif file.suffix == ".onnx":
            if reference_path(file).is_file():
                ReferenceSet.load(reference_path(file)).require_model(file, digest_file(file))
            read_manifest(file)
            open_runner(file, threads=1).close()
    return found


def make_targets(folder: Path) -> dict[str, tuple[Target, Path]]:
    """Every command, and the folder that its trials start from: inputs, and outputs of an earlier run of others."""
    common = folder / "common"
    common.mkdir(parents=True)
    save_weights(make_model(changes=_CHANGES), common / "weights.safetensors")
    draw_pictures(common / "pictures", 4)
    made = {
        "freeze": _freeze(common, folder / "freeze"),
        "recover": _recover(common, folder / "recover"),
        "export": _export(common, folder / "export"),
        "build-ort": _build(folder / "export", folder / "build-ort"),
        "report": _report(folder / "report"),
        "run": _run(common, folder / "run"),
    }
    return {target.name: (target, start) for target, start in made.values()}


def _done(words: list[str], folder: Path) -> None:
    subprocess.run(words, cwd=folder, check=True, capture_output=True)


def _freeze_words(sparsity: float, output: str, *more: str) -> list[str]:
    words = ["freeze", *_MODEL, "--weights", "weights.safetensors", "--data", "pictures", "--score", "variance"]
    return eamdeploy(*words, "--sparsity", sparsity, "-o", output, *more)


def _folder(start: Path, *inputs: Path) -> Path:
    (start / "out").mkdir(parents=True)
    for item in inputs:
        _done(["cp", "-r", str(item), str(start)], start)
    return start


def _freeze(common: Path, start: Path) -> tuple[Target, Path]:
    _folder(start, *common.iterdir())
    _done(_freeze_words(0.4, "out/x.eam.safetensors", "--heatmap", "out/x.svg"), start)
    words = _freeze_words(0.7, "out/x.eam.safetensors", "--heatmap", "out/x.svg")
    return Target("freeze", words, "out", read_outputs), start


def _recover(common: Path, start: Path) -> tuple[Target, Path]:
    _folder(start, *common.iterdir())
    for name, sparsity in (("old", 0.4), ("new", 0.7)):
        _done(_freeze_words(sparsity, f"{name}.eam.safetensors"), start)
    more = ["--data", "pictures", "--held-back", 0.5, "-o", "out/y.eam.safetensors"]
    _done(eamdeploy("recover", "old.eam.safetensors", *more), start)
    training = ["--method", "distill", "--epochs", 4, "--batch", 2]
    words = eamdeploy("recover", "new.eam.safetensors", *more, *training)
    return Target("recover", words, "out", read_outputs), start


def _export(common: Path, start: Path) -> tuple[Target, Path]:
    _folder(start, *common.iterdir())
    for name, sparsity in (("old", 0.4), ("new", 0.7)):
        _done(_freeze_words(sparsity, f"{name}.eam.safetensors"), start)
    more = ["-o", "out/x.onnx", "--baseline", "out/base.onnx", "--exporter", "torchscript", "--no-measure"]
    _done(eamdeploy("export", "old.eam.safetensors", *more), start)
    return Target("export", eamdeploy("export", "new.eam.safetensors", *more), "out", read_outputs), start


def _build(exports: Path, start: Path) -> tuple[Target, Path]:
    _folder(start)
    for name in ("old", "new"):
        more = ["-o", str(start / f"{name}.onnx"), "--exporter", "torchscript", "--no-measure"]
        _done(eamdeploy("export", f"{name}.eam.safetensors", *more), exports)
    _done(eamdeploy("build-ort", "old.onnx", "-o", "out/x.ort.onnx", "--threads", 1), start)
    words = eamdeploy("build-ort", "new.onnx", "-o", "out/x.ort.onnx", "--threads", 1)
    return Target("build-ort", words, "out", read_outputs), start


def _report(start: Path) -> tuple[Target, Path]:
    from report_records import rich_records, write_all

    _folder(start)
    write_all(start, rich_records())
    more = ["-o", "out/x.html", "--markdown", "out/x.md"]
    _done(eamdeploy("report", "evaluation.json", *more), start)
    return Target("report", eamdeploy("report", *sorted(rich_records()), *more), "out", read_outputs), start


def _run(common: Path, start: Path) -> tuple[Target, Path]:
    _folder(start, *common.iterdir())
    kwargs = "\n".join(f"{key} = {json.dumps(value)}" for key, value in {**KWARGS, **_CHANGES}.items())
    for sparsity in (0.4, 0.7):
        (start / "run.toml").write_text(_TOML.format(name=NAME, kwargs=kwargs, sparsity=sparsity))
        if sparsity == 0.4:
            _done(eamdeploy("run", "run.toml"), start)
    return Target("run", eamdeploy("run", "run.toml"), "out", read_outputs), start
