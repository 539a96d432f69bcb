"""Latency of synchronous calls, alone or against each other.

A call is timed from its start to its return, with its input already in memory. Calls that are compared take turns,
A B C A B C …, always in the order given, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifact import Record
from eamdeploy.errors import ConfigError

Call = Callable[[], object]
Clock = Callable[[], int]  # monotonic, in nanoseconds

_UNSTEADY_PERCENT = 5.0


@dataclass(frozen=True)
class Schedule:
    """How long to measure.

    Attributes:
        warmup_ms: time that every call is run for before anything counts; each runs at least once.
        min_seconds, min_runs: every call is timed for at least this long in sum, and at least this often.
    """

    warmup_ms: float = 200.0
    min_seconds: float = 3.0
    min_runs: int = 50

    def __post_init__(self) -> None:
        if not (0 <= self.warmup_ms < float("inf") and 0 <= self.min_seconds < float("inf") and self.min_runs >= 1):
            raise ConfigError(
                "the measuring time can't be used",
                expected="warmup_ms and min_seconds of 0 or more, min_runs of 1 or more",
                got=f"{self.warmup_ms}, {self.min_seconds}, {self.min_runs}",
            )


class Latency(Record):
    """Times of one call.

    Attributes:
        batch: images in each run.
        throughput_images_per_s: images of all runs ÷ time of all runs.
        variation_percent: standard deviation ÷ mean.
        warning: what to think of the figures when they vary by over 5 %.
    """

    runs: int
    batch: int
    min_ms: float
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    throughput_images_per_s: float
    variation_percent: float
    warning: str | None


class SpeedUp(Record):
    """Baseline's time ÷ candidate's time, round by round: over 1 means that the candidate is faster.

    Attributes:
        rounds: pairs of neighbouring runs.
        p5, p25, p75, p95: the spread of the ratio over the rounds.
    """

    rounds: int
    median: float
    p5: float
    p25: float
    p75: float
    p95: float


class Comparison(Record):
    """Calls that took turns.

    Attributes:
        latencies: one for each call, in the order given.
        speed_ups: one for each call after the first, against the first.
    """

    latencies: list[Latency]
    speed_ups: list[SpeedUp]


def measure(call: Call, *, batch: int, schedule: Schedule, clock: Clock = time.perf_counter_ns) -> Latency:
    """Latency of one call that nothing else takes turns with."""
    return summarize(time_rounds([call], schedule, clock)[:, 0], batch)


def compare_interleaved(
    calls: Sequence[Call], *, batch: int, schedule: Schedule, clock: Clock = time.perf_counter_ns
) -> Comparison:
    """Latencies of calls that take turns, and how much faster than the first each other one is.

    Raises:
        ConfigError: there are fewer than two calls.
    """
    if len(calls) < 2:
        raise ConfigError("there is nothing to compare", expected="at least 2 engines", got=len(calls))
    times = time_rounds(calls, schedule, clock)
    return Comparison(
        latencies=[summarize(column, batch) for column in times.T],
        speed_ups=[speed_up(times[:, 0], column) for column in times.T[1:]],
    )


def time_rounds(calls: Sequence[Call], schedule: Schedule, clock: Clock = time.perf_counter_ns) -> NDArray[np.int64]:
    """Nanoseconds of each call in each round, int64 [rounds, calls]; a round runs every call once, in order."""
    _run_rounds(calls, clock, min_ns=round(schedule.warmup_ms * 1e6), min_rounds=1)
    return _run_rounds(calls, clock, min_ns=round(schedule.min_seconds * 1e9), min_rounds=schedule.min_runs)


def _run_rounds(calls: Sequence[Call], clock: Clock, min_ns: int, min_rounds: int) -> NDArray[np.int64]:
    rounds: list[list[int]] = []
    sums = [0] * len(calls)
    while len(rounds) < min_rounds or min(sums) < min_ns:
        row = []
        for index, call in enumerate(calls):
            start = clock()
            call()
            elapsed = clock() - start
            row.append(elapsed)
            sums[index] += elapsed
        rounds.append(row)
    return np.array(rounds, np.int64)


def summarize(times_ns: NDArray[np.int64], batch: int) -> Latency:
    """Figures of int64 [runs] nanoseconds; percentiles are interpolated between runs."""
    times_ms = times_ns / 1e6
    p50, p90, p95, p99 = (float(p) for p in np.percentile(times_ms, [50, 90, 95, 99]))
    mean = float(times_ms.mean())
    variation = 100 * float(times_ms.std()) / mean
    return Latency(
        runs=len(times_ms),
        batch=batch,
        min_ms=float(times_ms.min()),
        mean_ms=mean,
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        throughput_images_per_s=1e3 * batch / mean,
        variation_percent=variation,
        warning=_warning(variation),
    )


def speed_up(baseline_ns: NDArray[np.int64], candidate_ns: NDArray[np.int64]) -> SpeedUp:
    """The ratio of two calls' times, int64 [rounds] each, pair by pair."""
    ratios = baseline_ns / candidate_ns
    p5, p25, median, p75, p95 = (float(p) for p in np.percentile(ratios, [5, 25, 50, 75, 95]))
    return SpeedUp(rounds=len(ratios), median=median, p5=p5, p25=p25, p75=p75, p95=p95)


def _warning(variation_percent: float) -> str | None:
    if variation_percent <= _UNSTEADY_PERCENT:
        return None
    return (
        f"run times vary by {variation_percent:.1f} % (over {_UNSTEADY_PERCENT:g} %): stop other programs, fix the "
        "clocks, or measure longer"
    )
