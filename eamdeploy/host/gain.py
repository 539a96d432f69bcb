"""What freezing gains on this machine: the exported model and its unfrozen twin, taking turns."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from eamdeploy.artifact import Record
from eamdeploy.engines.ort import ENGINE_SETTINGS, OrtRunner
from eamdeploy.engines.provenance import machine_summary
from eamdeploy.profiling.inputs import random_images
from eamdeploy.profiling.timing import Schedule, SpeedUp, compare_interleaved

_SCHEDULE = Schedule(min_seconds=1.0, min_runs=20)


class Gain(Record):
    """How much faster the frozen model is than its unfrozen twin, here and now.

    Attributes:
        speed_up: the twin's time ÷ the frozen model's, run by run, on ONNX Runtime CPU with one image.
        steady: whether the middle half of the ratios lies on one side of 1, so that it is more than noise.
    """

    speed_up: SpeedUp
    steady: bool
    threads: int = Field(ge=1)
    machine: str


def measure_gain(frozen: bytes, twin: bytes, threads: int, schedule: Schedule = _SCHEDULE) -> Gain:
    """Both models loaded as `build-ort` would, and timed in turns with one image each (or their fixed batch).

    Args:
        frozen, twin: ONNX models.
        threads: threads inside one operator.

    Raises:
        EngineError: ONNX Runtime can't load or run one of them.
    """
    with (
        OrtRunner(twin, threads=threads, settings=ENGINE_SETTINGS, name="the unfrozen twin") as baseline,
        OrtRunner(frozen, threads=threads, settings=ENGINE_SETTINGS, name="the frozen model") as candidate,
    ):
        batch = candidate.io.batch or 1
        images = random_images(candidate, batch)
        calls = [partial(runner.infer, images) for runner in (baseline, candidate)]
        (speed_up,) = compare_interleaved(calls, batch=batch, schedule=schedule).speed_ups
    steady = speed_up.p25 > 1 or speed_up.p75 < 1
    return Gain(speed_up=speed_up, steady=steady, threads=threads, machine=machine_summary())
