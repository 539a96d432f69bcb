"""Our rows: every flavour at every sparsity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from candidates import Engine, Open, Plan, Runtime, open_onnx
from floor import Arithmetic
from peer_engines import OPSET
from study import Study, code_digest

import eamdeploy
from eamdeploy import build_ort, export, freeze
from eamdeploy.engines.base import read_manifest
from eamdeploy.host.options import FreezeOptions, Score

SPARSITIES = (0.0, 0.2, 0.5)
REFERENCE_IMAGES = 16


@dataclass(frozen=True)
class Flavour:
    """A way to make an engine of an exported model.

    Attributes:
        build: writes the engine to its second argument; the study has images for calibration.
        open: how that is loaded.
    """

    name: str
    runtime: Runtime
    arithmetic: Arithmetic
    build: Callable[[Path, Path, Study], object]
    open: Callable[[Path], Open] = lambda engine: partial(open_onnx, engine)


FLAVOURS = (
    Flavour("FP32", "onnxruntime", "fp32", lambda model, engine, study: build_ort(model, engine)),
    # accuracy is a column of its own here, so the gate may pass anything
    Flavour(
        "INT8", "onnxruntime", "int8", PLACEHOLDER
    ),
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
    code = code_digest(Path(eamdeploy.__file__).parent, Path(__file__))
    stem = f"ours-{code}-{sparsity:g}"
    model = study.once(stem, partial(_export, study, sparsity)) / "model.onnx"
    folder = study.once(
        f"{stem}-{flavour.name.replace(' ', '-')}",
        lambda folder: flavour.build(model, folder / "engine.ort.onnx", study),
    )
    engine = folder / "engine.ort.onnx"
    return Engine(folder, (engine,), model, flavour.open(engine), _frozen(engine))


def _export(study: Study, sparsity: float, folder: Path) -> None:
    """Frozen by sensitivity, which is not worth its time where nothing is frozen or the weights are random."""
    score: Score = "variance" if study.is_random or sparsity == 0 else "sensitivity"
    options = FreezeOptions(sparsity=sparsity, score=score, score_images=study.settings.score_images)
    even = study.settings.even
    checkpoint = folder / "model.eam.safetensors"
    freeze(study.spec, even, checkpoint, options, overrides=study.overrides)
    export(checkpoint, folder / "model.onnx", opset=OPSET, images=replace(even, limit=REFERENCE_IMAGES))


def _frozen(engine: Path) -> str:
    """How much of it is frozen, in words."""
    manifest = read_manifest(engine)
    freezing = manifest.card.freezing if manifest and manifest.card else None
    if freezing is None or not freezing.heads:
        return "nothing frozen"
    heads = sum(map(len, freezing.heads.values()))
    return f"{heads} of {sum(map(len, freezing.scores.values()))} heads frozen by {freezing.score}"
