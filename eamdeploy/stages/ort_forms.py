"""Engines for ONNX Runtime: one form of a model, or the fastest of several, and always under the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eamdeploy.artifacts.files import require_output
from eamdeploy.artifacts.onnx_files import ModelData, digest_model
from eamdeploy.artifacts.onnx_output import Staging, staging
from eamdeploy.convert.ort_form import OrtForm
from eamdeploy.engines.manifest import Manifest, ReferenceFile, TriedForm, manifest_path, publish
from eamdeploy.engines.ort import build as ort
from eamdeploy.engines.ort.runner import OrtRunner
from eamdeploy.errors import (
    DeviceError,
    EamDeployError,
    EngineError,
    ParityError,
    UnsupportedGraph,
    conversion_packages,
)
from eamdeploy.observer import Observer
from eamdeploy.parity.gate import TOLERANCES, Tolerance
from eamdeploy.parity.reference_set import ReferenceSet
from eamdeploy.profiling.timing import Schedule, SpeedUp, runs_of, speed_up, time_sittings
from eamdeploy.profiling.turns import taking_turns

if TYPE_CHECKING:
    from eamdeploy.convert.ranges import Calibration

TUNING_SCHEDULE = Schedule(min_seconds=3.0, sittings=4)


@dataclass(frozen=True)
class Request:
    """What to build of which model, whatever its form.

    Attributes:
        reference: images and logits of the model; None leaves the engine unchecked, and its manifest says so.
        reduced: what INT8 is held to; other forms are held to FP32's noise.
        reference_file: where `reference` is from; None where that is not known.
    """

    model: Path
    output: Path
    threads: int
    calibration: Calibration | None
    reference: ReferenceSet | None
    reduced: Tolerance
    reference_file: ReferenceFile | None = None


@dataclass(frozen=True)
class _Candidate:
    """A form that passed the gate."""

    form: OrtForm
    checked: ort.Checked


def build(
    request: Request, forms: Sequence[OrtForm], observer: Observer, schedule: Schedule = TUNING_SCHEDULE
) -> Manifest:
    """The engine in the fastest of the forms that pass the gate is in place; its manifest says what else was tried.

    A later form is chosen over the first only where the interval of its speed-up excludes 1. One alone is not timed.

    Raises:
        ParityError, EngineError, DeviceError, UnsupportedGraph: no form passes; the first one's reason.
        ConfigError, CheckpointError, MissingDependency: as `build_ort` says.
    """
    data = ort.read_source(request.model, request.output)
    require_output(manifest_path(request.output), request.model)
    with staging(request.output) as stage:
        chosen, tried = _chosen(request, forms, data, stage, observer, schedule)
        manifest = chosen.checked.manifest.model_copy(update={"tried": tried, "reference": request.reference_file})
        publish(request.output, chosen.checked.source, manifest)
    return manifest


def _chosen(
    request: Request,
    forms: Sequence[OrtForm],
    data: ModelData,
    stage: Staging,
    observer: Observer,
    schedule: Schedule,
) -> tuple[_Candidate, list[TriedForm] | None]:
    """The candidate to keep, and what is to be told of every form where there was a choice."""
    digest = digest_model(request.model)
    passed: list[_Candidate] = []
    refused: dict[OrtForm, EamDeployError] = {}
    for form in forms:
        if len(forms) > 1:
            observer.note(f"building: {form.name}")
        try:
            passed.append(_Candidate(form, _checked(request, form, data, digest, stage, observer)))
        except (ParityError, EngineError, DeviceError, UnsupportedGraph) as err:
            refused[form] = err
    if not passed:
        raise next(iter(refused.values()))
    if len(forms) == 1:
        return passed[0], None
    return _choose(request, forms, passed, refused, observer, schedule)


def _choose(
    request: Request,
    forms: Sequence[OrtForm],
    passed: Sequence[_Candidate],
    refused: Mapping[OrtForm, EamDeployError],
    observer: Observer,
    schedule: Schedule,
) -> tuple[_Candidate, list[TriedForm]]:
    """The fastest candidate, and what is to be told of every form."""
    observer.note(f"timing {len(passed)} forms in turns")
    times, speed_ups = _timed(passed, request.threads, schedule)
    best = fastest(speed_ups)
    rows = {
        candidate.form: _tried(candidate.form, times[index], speed_ups[index], chosen=index == best)
        for index, candidate in enumerate(passed)
    }
    return passed[best], [rows.get(form) or _refused(form, refused[form]) for form in forms]


def fastest(speed_ups: Sequence[SpeedUp | None]) -> int:
    """Which to keep, by the speed-ups of all against the first, which has none itself."""
    faster = {index: found.median for index, found in enumerate(speed_ups) if found and found.verdict == "faster"}
    return max(faster, key=faster.__getitem__, default=0)


def _checked(
    request: Request, form: OrtForm, data: ModelData, digest: str, stage: Staging, observer: Observer
) -> ort.Checked:
    engine = data
    if not form.is_exported:
        with conversion_packages("converting a model"):
            from eamdeploy.convert.ort import convert
        engine = convert(data, form, str(request.model), request.calibration, observer)
    return ort.check(
        stage.source(engine),
        str(request.model),
        request.output,
        model_digest=digest,
        threads=request.threads,
        reference=request.reference,
        tolerance=request.reduced if form.int8 else TOLERANCES["f32-engine"],
        settings=form.settings,
        provider=form.provider,
    )


def _timed(passed: Sequence[_Candidate], threads: int, schedule: Schedule) -> tuple[list[float], list[SpeedUp | None]]:
    """Median milliseconds of each candidate, one image (or its fixed batch) at a time, and its speed-up."""
    opening = [
        partial(
            OrtRunner,
            candidate.checked.source,
            threads=threads,
            settings=candidate.checked.manifest.settings,
            name=candidate.form.name,
            provider=candidate.checked.manifest.provider,
        )
        for candidate in passed
    ]
    sittings = time_sittings(taking_turns(opening), len(passed), schedule)
    medians = [float(np.median(runs_of(sittings, index))) / 1e6 for index in range(len(passed))]
    return medians, [None, *(speed_up(sittings, 0, index) for index in range(1, len(passed)))]


def _refused(form: OrtForm, why: EamDeployError) -> TriedForm:
    return TriedForm(form=form.name, made_of=form.record, refused=str(why))


def _tried(form: OrtForm, p50_ms: float, found: SpeedUp | None, *, chosen: bool) -> TriedForm:
    return TriedForm(
        form=form.name,
        made_of=form.record,
        p50_ms=p50_ms,
        speed_up=None if found is None else found.median,
        low=None if found is None else found.low,
        high=None if found is None else found.high,
        chosen=chosen,
    )
