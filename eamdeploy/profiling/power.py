"""Power, energy and memory while engines run.

Sensors read some ten times in a second and can't tell runs of milliseconds from each other, so that engines don't take
turns here as they do for latency. Each runs alone for seconds, after a while without work: idle A B A B. A reading
counts if the one before it was in the same block too, as it may look back as far as that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from eamdeploy.artifacts.records import Record
from eamdeploy.devices.base import Reading, Sensor, SensorNotes
from eamdeploy.errors import ConfigError, DeviceError
from eamdeploy.profiling.timing import Call, Clock

_PASSES = 2
_FEW_SAMPLES = 10
_DRIFT_PERCENT = 5.0


class Power(Record):
    """What one engine drew, over its two blocks.

    Attributes:
        source: what the readings come from, e.g. "tegrastats".
        rails_mw: mean power by rail.
        total_rails: rails whose sum is all that the device draws; empty where that is not known, and then there is no
            total and no energy.
        idle_mw: mean total without work, with the engines loaded; None without readings.
        mean_mw: mean total while it ran; None without readings.
        energy_mj_per_image: mean total × time ÷ images.
        energy_above_idle_mj_per_image: the same with the idle power taken off; noise can make it negative.
        samples: readings behind the means.
        skipped: readings in its blocks of which nothing could be used, or which lacked a rail of the total.
        seconds, images: of both blocks, from the first run's start to the last one's end.
        memory_peak_bytes: most memory of the device in use in its blocks, by name; other programs' is in it.
        warnings: what to think of the figures.
    """

    source: str
    rails_mw: dict[str, float]
    total_rails: list[str]
    idle_mw: float | None
    mean_mw: float | None
    energy_mj_per_image: float | None
    energy_above_idle_mj_per_image: float | None
    samples: int
    skipped: int
    seconds: float
    images: int
    images_per_s: float
    memory_peak_bytes: dict[str, int]
    warnings: list[str]


@dataclass(frozen=True)
class PowerMeasurement:
    """What a sensor gave.

    Attributes:
        powers: of every call, in their order; None for one that did not run before the sensor stopped.
        notes: what it could not read, and why it stopped, if it did.
    """

    powers: list[Power | None]
    notes: SensorNotes


@dataclass(frozen=True)
class _Block:
    """A time in which one thing was done.

    Attributes:
        skipped: of the sensor, meanwhile.
    """

    start_ns: int
    end_ns: int
    runs: int
    skipped: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True)
class _Samples:
    """Readings that lie wholly inside one block, and those of them that have every rail of the total."""

    all: list[Reading]
    totals_mw: list[float]

    @classmethod
    def of(cls, block: _Block, readings: Sequence[Reading], total: Sequence[str]) -> _Samples:
        inside = [
            after
            for before, after in pairwise(readings)
            if block.start_ns <= before.at_ns and after.at_ns <= block.end_ns
        ]
        totals = [
            sum(each.power_mw[rail] for rail in total) for each in inside if total and each.power_mw.keys() >= {*total}
        ]
        return cls(inside, totals)


def measure_power(
    sensor: Sensor,
    calls: Sequence[Call],
    batch: int,
    *,
    seconds: float = 5.0,
    idle_seconds: float = 3.0,
    clock: Clock = time.monotonic_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> PowerMeasurement:
    """Power of every call, each of which runs `batch` images.

    A sensor that can't be read, or stops, is no error: what it gave before counts, and the notes say what became of it.

    Args:
        sensor: new, not yet open; it is closed afterwards.
        seconds: of each of a call's two blocks.
        idle_seconds: without work, before the first block.
        clock: the one that the sensor's readings have their times from.

    Raises:
        ConfigError: there is no call, or a time can't be used.
    """
    if not calls or batch < 1 or not (0 < seconds < float("inf") and 0 <= idle_seconds < float("inf")):
        raise ConfigError(
            "power can't be measured with these numbers",
            expected="at least 1 engine, batch of 1 or more, seconds above 0, idle_seconds of 0 or more",
            got=f"{len(calls)} engines, batch {batch}, seconds {seconds}, idle_seconds {idle_seconds}",
        )
    blocks: list[list[_Block]] = [[] for _ in calls]
    with ExitStack() as stack:
        try:
            stack.enter_context(sensor)
        except DeviceError as err:
            return PowerMeasurement([None] * len(calls), sensor.notes.model_copy(update={"failure": str(err)}))
        idle = _rest(idle_seconds, sensor, clock, sleep)
        for call, own in list(zip(calls, blocks, strict=True)) * _PASSES:
            if sensor.notes.failure is not None:
                break  # here, and not after minutes of work that nothing reads
            own.append(_run(call, seconds, sensor, clock))
        readings, total, notes = sensor.readings(), sensor.total_rails, sensor.notes
    resting = _Samples.of(idle, readings, total)
    powers = [_summarize(own, batch, readings, resting, sensor.source, total) if own else None for own in blocks]
    return PowerMeasurement(powers, notes)


def _rest(seconds: float, sensor: Sensor, clock: Clock, sleep: Callable[[float], None]) -> _Block:
    start, skipped = clock(), sensor.skipped
    sleep(seconds)
    return _Block(start, clock(), 0, sensor.skipped - skipped)


def _run(call: Call, seconds: float, sensor: Sensor, clock: Clock) -> _Block:
    skipped, runs = sensor.skipped, 0
    start = now = clock()
    while now - start < seconds * 1e9:
        call()
        runs += 1
        now = clock()
    return _Block(start, now, runs, sensor.skipped - skipped)


def _summarize(
    blocks: Sequence[_Block],
    batch: int,
    readings: Sequence[Reading],
    resting: _Samples,
    source: str,
    total: Sequence[str],
) -> Power:
    passes = [_Samples.of(block, readings, total) for block in blocks]
    counted = [reading for each in passes for reading in each.all]
    totals_mw = [mw for each in passes for mw in each.totals_mw]
    mean_mw, idle_mw = _mean(totals_mw), _mean(resting.totals_mw)
    seconds = sum(block.seconds for block in blocks)
    images = batch * sum(block.runs for block in blocks)
    samples = len(totals_mw) if total else len(counted)
    return Power(
        source=source,
        rails_mw=_means([reading.power_mw for reading in counted]),
        total_rails=list(total),
        idle_mw=idle_mw,
        mean_mw=mean_mw,
        energy_mj_per_image=None if mean_mw is None else mean_mw * seconds / images,
        energy_above_idle_mj_per_image=(
            None if mean_mw is None or idle_mw is None else (mean_mw - idle_mw) * seconds / images
        ),
        samples=samples,
        skipped=sum(block.skipped for block in blocks) + len(counted) - samples,
        seconds=seconds,
        images=images,
        images_per_s=images / seconds,
        memory_peak_bytes=_peaks([reading.memory_bytes for reading in counted]),
        warnings=_warnings(passes, resting, samples, total),
    )


def _warnings(passes: Sequence[_Samples], resting: _Samples, samples: int, total: Sequence[str]) -> list[str]:
    found = []
    rails = sorted({rail for each in passes for reading in each.all for rail in reading.power_mw})
    if samples and not rails:
        found.append("the sensor gives no power; it may need root to read it")
    elif samples and not total:
        found.append(f"it is not known which of the rails {', '.join(rails)} are this board's total: no energy")
    silent = _PASSES - sum(bool(each.totals_mw if total else each.all) for each in passes)
    if samples and silent:
        found.append(f"{silent} of the {_PASSES} passes gave no reading that could be used")
    if samples < _FEW_SAMPLES:
        found.append(f"the figures rest on {samples} readings (fewer than {_FEW_SAMPLES}): measure longer")
    elif len(resting.totals_mw) < _FEW_SAMPLES and total:
        found.append(f"the idle power rests on {len(resting.totals_mw)} readings (fewer than {_FEW_SAMPLES})")
    means = [fmean(each.totals_mw) for each in passes if each.totals_mw]
    if len(means) == _PASSES and 100 * abs(means[1] - means[0]) > _DRIFT_PERCENT * abs(means[0]):
        found.append(
            f"power was {means[0]:.0f} mW in the first pass and {means[1]:.0f} mW in the second (over "
            f"{_DRIFT_PERCENT:g} % apart): let the board warm up, or stop other programs"
        )
    return found


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _means(readings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By name, over the readings that have it, in the order of their first appearance."""
    names = dict.fromkeys(name for each in readings for name in each)
    return {name: fmean(each[name] for each in readings if name in each) for name in names}


def _peaks(readings: Sequence[Mapping[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for each in readings for name in each)
    return {name: max(each[name] for each in readings if name in each) for name in names}
