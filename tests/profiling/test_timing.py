from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eamdeploy.errors import ConfigError
from eamdeploy.profiling.timing import Schedule, compare_interleaved, measure, speed_up, summarize, time_rounds

MS = 1_000_000


class Bench:
    """A clock, and calls that take the times they are told; it notes who ran."""

    def __init__(self) -> None:
        self.now_ns = 123_456_789
        self.log = ""

    def clock(self) -> int:
        return self.now_ns

    def call(self, name: str, *times_ms: float) -> Callable[[], object]:
        times: Iterator[float] = cycle(times_ms)

        def run() -> None:
            self.now_ns += round(next(times) * MS)
            self.log += name

        return run


@pytest.fixture
def bench() -> Bench:
    return Bench()


NO_WARMUP = Schedule(warmup_ms=0, min_seconds=0, min_runs=1)


def test_figures_of_known_times() -> None:
    latency = summarize(np.arange(1, 101) * MS, batch=4)
    assert (latency.runs, latency.batch, latency.min_ms, latency.mean_ms) == (100, 4, 1.0, 50.5)
    assert [latency.p50_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms] == pytest.approx([50.5, 90.1, 95.05, 99.01])
    assert latency.throughput_images_per_s == pytest.approx(4 / 0.0505)
    assert latency.variation_percent == pytest.approx(100 * np.sqrt((100**2 - 1) / 12) / 50.5)


@pytest.mark.parametrize(("slow_ms", "warns"), [(11.0, False), (11.2, True)])
def test_unsteady_times_carry_a_warning(slow_ms: float, warns: bool) -> None:
    latency = summarize(np.array([10 * MS, round(slow_ms * MS)] * 50), batch=1)  # 4.76 % and 5.66 %
    assert (latency.warning is not None) is warns
    assert not warns or "5.7 %" in str(latency.warning)


@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=50))
def test_percentiles_are_in_order(times: list[int]) -> None:
    figures = summarize(np.array(times, np.int64), batch=1)
    ordered = [figures.min_ms, figures.p50_ms, figures.p90_ms, figures.p95_ms, figures.p99_ms, max(times) / 1e6]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(ordered))


@pytest.mark.parametrize(
    ("min_seconds", "min_runs", "runs"), [(3.0, 50, 300), (3.0, 500, 500), (0, 7, 7), (0.0101, 1, 2)]
)
def test_it_measures_until_both_limits_hold(bench: Bench, min_seconds: float, min_runs: int, runs: int) -> None:
    schedule = Schedule(warmup_ms=0, min_seconds=min_seconds, min_runs=min_runs)
    assert measure(bench.call("a", 10), batch=1, schedule=schedule, clock=bench.clock).runs == runs


def test_warm_up_lasts_its_time_and_is_not_counted(bench: Bench) -> None:
    slow_start = bench.call("a", *[50] * 4, *[1] * 10)
    schedule = Schedule(warmup_ms=200, min_seconds=0, min_runs=10)
    latency = measure(slow_start, batch=1, schedule=schedule, clock=bench.clock)
    assert len(bench.log) == 14
    assert (latency.runs, latency.mean_ms) == (10, 1.0)


def test_default_schedule_is_the_documented_one() -> None:
    assert Schedule() == Schedule(warmup_ms=200, min_seconds=3, min_runs=50)


@pytest.mark.parametrize(
    ("warmup_ms", "min_seconds", "min_runs"),
    [(-1, 3, 50), (200, -1, 50), (200, 3, 0), (float("nan"), 3, 50), (0, float("inf"), 1)],
)
def test_schedule_that_never_ends_or_measures_nothing_is_refused(
    warmup_ms: float, min_seconds: float, min_runs: int
) -> None:
    with pytest.raises(ConfigError, match="measuring time"):
        Schedule(warmup_ms, min_seconds, min_runs)


def test_calls_take_turns_in_the_order_given(bench: Bench) -> None:
    calls = [bench.call(name, 1) for name in "abc"]
    times = time_rounds(calls, Schedule(warmup_ms=0, min_seconds=0, min_runs=3), bench.clock)
    assert bench.log == "abc" * 4  # one round of warm-up
    assert times.shape == (3, 3)


def test_every_call_gets_its_time_also_the_fast_one(bench: Bench) -> None:
    calls = [bench.call("a", 10), bench.call("b", 1)]
    schedule = Schedule(warmup_ms=0, min_seconds=0.05, min_runs=1)
    comparison = compare_interleaved(calls, batch=1, schedule=schedule, clock=bench.clock)
    assert [latency.runs for latency in comparison.latencies] == [50, 50]


def test_speed_up_is_baseline_over_candidate_pair_by_pair(bench: Bench) -> None:
    # the machine slows down threefold on the way: the latencies vary, the ratio does not
    calls = [bench.call("a", 2, 4, 6), bench.call("b", 1, 2, 3), bench.call("c", 4, 8, 12)]
    schedule = Schedule(warmup_ms=0, min_seconds=0, min_runs=30)
    comparison = compare_interleaved(calls, batch=1, schedule=schedule, clock=bench.clock)
    faster, slower = comparison.speed_ups
    assert (faster.p5, faster.median, faster.p95, faster.rounds) == (2, 2, 2, 30)
    assert (slower.p5, slower.median, slower.p95) == (0.5, 0.5, 0.5)
    assert all(latency.warning for latency in comparison.latencies)


def test_spread_of_the_ratio() -> None:
    ratio = speed_up(np.arange(101) + 100, np.full(101, 100))
    assert [ratio.p5, ratio.p25, ratio.median, ratio.p75, ratio.p95] == pytest.approx([1.05, 1.25, 1.5, 1.75, 1.95])


def test_one_call_is_no_comparison(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare_interleaved([bench.call("a", 1)], batch=1, schedule=NO_WARMUP, clock=bench.clock)


def test_failure_of_a_call_gets_out(bench: Bench) -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure(broken, batch=1, schedule=NO_WARMUP, clock=bench.clock)


def test_real_clock_measures_something() -> None:
    assert measure(lambda: sum(range(1000)), batch=1, schedule=Schedule(0, 0, 5)).min_ms > 0
