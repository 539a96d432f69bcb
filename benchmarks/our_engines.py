"""Our rows: every flavour at every sparsity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from candidates import Engine, Plan, Runtime, open_onnx
from floor import Arithmetic
from peer_engines import OPSET
from study import Study, code_digest

import eamdeploy
from eamdeploy import build_ort, export, freeze
from eamdeploy.convert.ort_form import OrtForm
from eamdeploy.convert.ranges import Calibration
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.engines.manifest import read_manifest
from eamdeploy.parity.accuracy import Predict
from eamdeploy.vocabulary import Score

SPARSITIES = (0.0, 0.2, 0.5)
REFERENCE_IMAGES = 16
CALIBRATION_IMAGES = 64


@dataclass(frozen=True)
class Flavour:
    """A way to make an engine of a frozen model.

    Attributes:
        form: what `build-ort` is asked for.
        compiled: for one batch size, as its runtime compiles the graph for that; else the batch is dynamic, as the
            peers' on the same runtime.
    """

    name: str
    runtime: Runtime
    arithmetic: Arithmetic
    form: OrtForm
    compiled: bool = False


FLAVOURS = (
    Flavour("FP32", "onnxruntime", "fp32", OrtForm(fused_attention=True)),
    Flavour("INT8", "onnxruntime", "int8", OrtForm(fused_attention=True, int8="dynamic")),
    Flavour("OpenVINO FP32", "openvino", "fp32", OrtForm(provider="openvino"), compiled=True),
    Flavour("OpenVINO INT8", "openvino", "int8", OrtForm(int8="static", provider="openvino"), compiled=True),
)


def plans() -> list[Plan]:
    """Every flavour, each with nothing frozen first."""
    return [_plan(flavour, sparsity) for flavour in FLAVOURS for sparsity in SPARSITIES]


def _plan(flavour: Flavour, sparsity: float) -> Plan:
    return Plan(
        name=_name(flavour, sparsity),
        family="ours",
        runtime=flavour.runtime,
        arithmetic=flavour.arithmetic,
        make=partial(_make, flavour, sparsity),
        unfrozen=_name(flavour, 0.0) if sparsity else None,
    )


def _name(flavour: Flavour, sparsity: float) -> str:
    return f"eamdeploy {flavour.name}, sparsity {sparsity:g}"


def _make(flavour: Flavour, sparsity: float, study: Study) -> Engine:
    engine = _engine(flavour, sparsity, study, 1)
    model = _model(sparsity, study, 1 if flavour.compiled else None)
    return Engine(engine.parent, (engine,), model, partial(_open, flavour, sparsity, study), _frozen(engine))


@contextmanager
def _open(flavour: Flavour, sparsity: float, study: Study, threads: int, batch: int) -> Iterator[Predict]:
    with open_onnx(_engine(flavour, sparsity, study, batch), threads, batch) as predict:
        yield predict


def _engine(flavour: Flavour, sparsity: float, study: Study, batch: int) -> Path:
    """The engine for that batch size, made or found; accuracy is a column of its own, so the gate may pass anything."""
    fixed = batch if flavour.compiled else None
    model = _model(sparsity, study, fixed)
    calibration = Calibration(replace(study.settings.even, limit=CALIBRATION_IMAGES))

    def build(folder: Path) -> None:
        build_ort(
            model,
            folder / "engine.ort.onnx",
            forms=[flavour.form],
            calibration=calibration if flavour.form.int8 == "static" else None,
            min_agreement=0 if flavour.form.int8 else None,
        )

    return study.once(f"{model.parent.name}-{flavour.name.replace(' ', '-')}", build) / "engine.ort.onnx"


def _model(sparsity: float, study: Study, batch: int | None) -> Path:
    """Exported for that batch size; None for a dynamic one."""
    even = study.settings.even
    stem = f"ours-{code_digest(Path(eamdeploy.__file__).parent, Path(__file__))}-{sparsity:g}"
    checkpoint = study.once(stem, partial(_freeze, study, sparsity)) / "model.eam.safetensors"
    reference = replace(even, limit=REFERENCE_IMAGES)

    def write(folder: Path) -> None:
        export(checkpoint, folder / "model.onnx", batch=batch, opset=OPSET, images=reference)

    return study.once(f"{stem}-batch-{batch or 'dynamic'}", write) / "model.onnx"


def _freeze(study: Study, sparsity: float, folder: Path) -> None:
    """By sensitivity, which is not worth its time where nothing is frozen or the weights are random."""
    score: Score = "variance" if study.is_random or sparsity == 0 else "sensitivity"
    options = FreezeOptions(sparsity=sparsity, score=score, score_images=study.settings.score_images)
    freeze(study.spec, study.settings.even, folder / "model.eam.safetensors", options, overrides=study.overrides)


def _frozen(engine: Path) -> str:
    """How much of it is frozen, in words."""
    manifest = read_manifest(engine)
    freezing = manifest.card.freezing if manifest and manifest.card else None
    if freezing is None or not freezing.heads:
        return "nothing frozen"
    heads = sum(map(len, freezing.heads.values()))
    return f"{heads} of {sum(map(len, freezing.scores.values()))} heads frozen by {freezing.score}"
