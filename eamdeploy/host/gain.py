"""What freezing gains on this machine: the exported model and its unfrozen twin, taking turns."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from eamdeploy.devices.provenance import machine_summary
from eamdeploy.engines.ort.runner import ENGINE_SETTINGS, OrtRunner
from eamdeploy.profiling.timing import Schedule, compare_interleaved
from eamdeploy.profiling.turns import taking_turns
from eamdeploy.records.gain import Gain

_SCHEDULE = Schedule(min_seconds=1.0, min_runs=20, sittings=4)


def measure_gain(frozen: bytes | Path, twin: bytes | Path, threads: int, schedule: Schedule = _SCHEDULE) -> Gain:
    """Both models loaded as `build-ort` would, and timed in turns with one image each (or their fixed batch).

    Args:
        frozen, twin: ONNX models, or their files.
        threads: threads inside one operator.

    Raises:
        EngineError: ONNX Runtime can't load or run one of them.
    """
    models = {"the unfrozen twin": twin, "the frozen model": frozen}
    opening = [
        partial(OrtRunner, model, threads=threads, settings=ENGINE_SETTINGS, name=name)
        for name, model in models.items()
    ]
    compared = compare_interleaved(taking_turns(opening), len(models), batch=1, schedule=schedule)
    (speed_up,) = compared.speed_ups
    return Gain(speed_up=speed_up, threads=threads, machine=machine_summary())
