"""Latency of synchronous calls, alone or against each other.

A call is timed from its start to its return, with its input already in memory. Calls that are compared take turns, so
that a machine that slows down slows all of them, in rounds of a random order and its mirror image, so that each runs
first as often as last.

    sitting 1                  sitting 2 …              a sitting loads everything anew and warms it up
      round 1   B A C  C A B     round 1   C B A  A B C   a round runs every call twice
      round 2   A C B  B C A     round 2   A B C  C B A   a ratio is of two calls' times in one round

Where an engine's weights happen to lie in memory makes it a little faster or slower for as long as it is loaded, by
more than the scatter of a few hundred rounds lets one think: of one engine loaded twice, the second was 0.5 % faster
again and again (DeiT-Tiny, ONNX Runtime 1.32 on x86). Hence sittings, every second one of which loads in the mirror
image of the order before, and an interval that follows from how much they differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eamdeploy.artifacts.records import Record
from eamdeploy.errors import ConfigError

Call = Callable[[], object]
Clock = Callable[[], int]  # monotonic, in nanoseconds
Open = Callable[[Sequence[int]], AbstractContextManager[Sequence[Call]]]
"""Loads what is to be timed, in the order of the numbers given, and yields the calls in their own order."""
Sittings: TypeAlias = Sequence[NDArray[np.int64]]  # nanoseconds [rounds, 2, calls] of each sitting
Verdict = Literal["faster", "slower", "no difference"]

_UNSTEADY_PERCENT = 5.0
_SEED = 0
_RESAMPLES = 1000
# Student's t for an interval of 95 %, by degrees of freedom; the normal distribution's 1.96 beyond.
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_NORMAL = 1.96


@dataclass(frozen=True)
class Schedule:
    """How long to measure.

    Every call is warmed up and run at least once before anything counts. Each sitting has its share of the time and of
    the runs, and its own warm-up.
    """

    warmup_ms: Annotated[float, Field(description="Warm-up of every engine in each sitting.")] = 200.0
    min_seconds: Annotated[float, Field(description="Time every engine for at least this long.")] = 3.0
    min_runs: Annotated[int, Field(description="… and at least this often.")] = 50
    sittings: Annotated[int, Field(description="How often the engines are loaded anew for that.")] = 6

    def __post_init__(self) -> None:
        times = (self.warmup_ms, self.min_seconds)
        if not (all(0 <= time < float("inf") for time in times) and self.min_runs >= 1 and self.sittings >= 1):
            raise ConfigError(
                "the measuring time can't be used",
                expected="warmup_ms and min_seconds of 0 or more, min_runs and sittings of 1 or more",
                got=f"{self.warmup_ms}, {self.min_seconds}, {self.min_runs}, {self.sittings}",
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
    p5_ms: float
    p25_ms: float
    p50_ms: float
    p75_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    throughput_images_per_s: float
    variation_percent: float
    warning: str | None


class SpeedUp(Record):
    """Baseline's time ÷ candidate's time, round by round: over 1 means that the candidate is faster.

    Attributes:
        rounds: how many ratios there are, each of four runs; `sittings`: how often both were loaded anew.
        low, high: 95 % confidence interval of the median; says whether there is a difference.
        p5, p25, p75, p95: the spread of the ratio over the rounds; says how noisy the machine is.
    """

    rounds: int
    sittings: int
    median: float
    low: float
    high: float
    p5: float
    p25: float
    p75: float
    p95: float

    @property
    def verdict(self) -> Verdict:
        """What may be said: a difference only where the interval excludes 1."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no difference"


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
    return summarize(runs_of(time_sittings(lambda _: nullcontext([call]), 1, schedule, clock), 0), batch)


def compare_interleaved(
    load: Open, n_calls: int, *, batch: int, schedule: Schedule, clock: Clock = time.perf_counter_ns
) -> Comparison:
    """Latencies of calls that take turns, and how much faster than the first each other one is.

    Args:
        load: opens the calls.
        n_calls: how many there are.

    Raises:
        ConfigError: there are fewer than two calls.
    """
    if n_calls < 2:
        raise ConfigError("there is nothing to compare", expected="at least 2 engines", got=n_calls)
    times = time_sittings(load, n_calls, schedule, clock)
    return Comparison(
        latencies=[summarize(runs_of(times, index), batch) for index in range(n_calls)],
        speed_ups=[speed_up(times, 0, index) for index in range(1, n_calls)],
    )


def time_sittings(
    load: Open, n_calls: int, schedule: Schedule, clock: Clock = time.perf_counter_ns
) -> list[NDArray[np.int64]]:
    """Nanoseconds of each call in each round, int64 [rounds, 2, calls] for each sitting; warm-ups are left out.

    Args:
        load: opens the calls; closed when the sitting is over.
        n_calls: how many there are.
    """
    rng = np.random.default_rng(_SEED)
    share_ns = schedule.min_seconds * 1e9 / schedule.sittings
    min_rounds = -(-schedule.min_runs // (2 * schedule.sittings))
    sittings = []
    order: list[int] = []
    for number in range(schedule.sittings):
        order = order[::-1] if number % 2 else rng.permutation(n_calls).tolist()
        with load(order) as calls:
            _run_rounds(calls, clock, rng, min_ns=round(schedule.warmup_ms * 1e6), min_rounds=1)
            sittings.append(_run_rounds(calls, clock, rng, min_ns=round(share_ns), min_rounds=min_rounds))
    return sittings


def _run_rounds(
    calls: Sequence[Call], clock: Clock, rng: np.random.Generator, min_ns: int, min_rounds: int
) -> NDArray[np.int64]:
    rounds: list[list[list[int]]] = []
    sums = [0] * len(calls)
    while len(rounds) < min_rounds or min(sums) < min_ns:
        order = rng.permutation(len(calls)).tolist()
        times = [[0] * len(calls), [0] * len(calls)]
        for half, indices in enumerate((order, order[::-1])):
            for index in indices:
                call = calls[index]
                start = clock()
                call()
                elapsed = clock() - start
                times[half][index] = elapsed
                sums[index] += elapsed
        rounds.append(times)
    return np.array(rounds, np.int64)


def runs_of(times: Sittings, call: int) -> NDArray[np.int64]:
    """Nanoseconds of all runs of one call, int64 [runs], in the order of time."""
    return np.concatenate([rounds[:, :, call].reshape(-1) for rounds in times])


def summarize(times_ns: NDArray[np.int64], batch: int) -> Latency:
    """Figures of int64 [runs] nanoseconds; percentiles are interpolated between runs."""
    times_ms = times_ns / 1e6
    p5, p25, p50, p75, p90, p95, p99 = (float(p) for p in np.percentile(times_ms, [5, 25, 50, 75, 90, 95, 99]))
    mean = float(times_ms.mean())
    variation = 100 * float(times_ms.std()) / mean
    return Latency(
        runs=len(times_ms),
        batch=batch,
        min_ms=float(times_ms.min()),
        mean_ms=mean,
        p5_ms=p5,
        p25_ms=p25,
        p50_ms=p50,
        p75_ms=p75,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        throughput_images_per_s=1e3 * batch / mean,
        variation_percent=variation,
        warning=_warning(variation),
    )


def speed_up(times: Sittings, baseline: int, candidate: int) -> SpeedUp:
    """The ratio of two calls' times, round by round: the geometric mean of those in the order and in its mirror image.

    The interval is that of a bootstrap in two stages: sittings are drawn with replacement, and in each its rounds. The
    standard deviation of the resampled medians, on a logarithmic scale, times Student's t for so few sittings.

    Args:
        times: as `time_sittings` gives them.
        baseline, candidate: numbers of the calls.

    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8 on hierarchical data.
    """
    logs = [np.log(rounds[:, :, baseline] / rounds[:, :, candidate]).mean(axis=1) for rounds in times]
    ratios = np.exp(np.concatenate(logs))
    p5, p25, median, p75, p95 = (float(p) for p in np.percentile(ratios, [5, 25, 50, 75, 95]))
    margin = _margin(logs)
    return SpeedUp(
        rounds=len(ratios),
        sittings=len(logs),
        median=median,
        low=median * float(np.exp(-margin)),
        high=median * float(np.exp(margin)),
        p5=p5,
        p25=p25,
        p75=p75,
        p95=p95,
    )


def _margin(logs: Sequence[NDArray[np.float64]]) -> float:
    """Half the width of the 95 % interval of the median of all values; they come in groups."""
    rng = np.random.default_rng(_SEED)
    medians = [
        np.median(np.concatenate([rng.choice(logs[group], len(logs[group])) for group in drawn]))
        for drawn in rng.integers(0, len(logs), (_RESAMPLES, len(logs)))
    ]
    if len(logs) == 1:  # what another sitting would give can't be told from one
        return _NORMAL * float(np.std(medians))
    freedom = len(logs) - 1
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else _NORMAL
    return quantile * float(np.std(medians)) * math.sqrt(len(logs) / freedom)


def _warning(variation_percent: float) -> str | None:
    if variation_percent <= _UNSTEADY_PERCENT:
        return None
    return (
        f"run times vary by {variation_percent:.1f} % (over {_UNSTEADY_PERCENT:g} %): stop other programs, fix the "
        "clocks, or measure longer"
    )
