from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eamdeploy.errors import ConfigError
from eamdeploy.profiling.timing import (
    Call,
    Schedule,
    compare_interleaved,
    measure,
    runs_of,
    speed_up,
    summarize,
    time_sittings,
)

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


NO_WARMUP = Schedule(warmup_ms=0, min_seconds=0, min_runs=1, sittings=1)


def loaded(*calls: Call) -> Callable[[Sequence[int]], nullcontext[Sequence[Call]]]:
    return lambda order: nullcontext(calls)


def test_figures_of_known_times() -> None:
    latency = summarize(np.arange(1, 101) * MS, batch=4)
    assert (latency.runs, latency.batch, latency.min_ms, latency.mean_ms) == (100, 4, 1.0, 50.5)
    assert [latency.p50_ms, latency.p90_ms, latency.p95_ms, latency.p99_ms] == pytest.approx([50.5, 90.1, 95.05, 99.01])
    assert [latency.p5_ms, latency.p25_ms, latency.p75_ms] == pytest.approx([5.95, 25.75, 75.25])
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
    quarters = (figures.p5_ms, figures.p25_ms, figures.p50_ms, figures.p75_ms)
    ordered = [figures.min_ms, *quarters, figures.p90_ms, figures.p95_ms, figures.p99_ms, max(times) / 1e6]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(ordered))


@pytest.mark.parametrize(
    ("min_seconds", "min_runs", "runs"), [(3.0, 50, 300), (3.0, 500, 500), (0, 7, 8), (0.0201, 1, 4)]
)
def test_it_measures_until_both_limits_hold(bench: Bench, min_seconds: float, min_runs: int, runs: int) -> None:
    schedule = Schedule(warmup_ms=0, min_seconds=min_seconds, min_runs=min_runs, sittings=1)
    assert measure(bench.call("a", 10), batch=1, schedule=schedule, clock=bench.clock).runs == runs


def test_warm_up_lasts_its_time_and_is_not_counted(bench: Bench) -> None:
    slow_start = bench.call("a", *[50] * 4, *[1] * 10)
    schedule = Schedule(warmup_ms=200, min_seconds=0, min_runs=10, sittings=1)
    latency = measure(slow_start, batch=1, schedule=schedule, clock=bench.clock)
    assert len(bench.log) == 14
    assert (latency.runs, latency.mean_ms) == (10, 1.0)


def test_default_schedule_is_the_documented_one() -> None:
    assert Schedule() == Schedule(warmup_ms=200, min_seconds=3, min_runs=50, sittings=6)


@pytest.mark.parametrize(
    ("warmup_ms", "min_seconds", "min_runs", "sittings"),
    [(-1, 3, 50, 5), (200, -1, 50, 5), (200, 3, 0, 5), (float("nan"), 3, 50, 5), (0, float("inf"), 1, 5), (0, 3, 1, 0)],
)
def test_schedule_that_never_ends_or_measures_nothing_is_refused(
    warmup_ms: float, min_seconds: float, min_runs: int, sittings: int
) -> None:
    with pytest.raises(ConfigError, match="measuring time"):
        Schedule(warmup_ms, min_seconds, min_runs, sittings)


def test_calls_take_turns_in_an_order_and_its_mirror_image(bench: Bench) -> None:
    calls = [bench.call(name, index + 1) for index, name in enumerate("abc")]
    schedule = Schedule(warmup_ms=0, min_seconds=0, min_runs=60, sittings=1)
    (times,) = time_sittings(loaded(*calls), 3, schedule, bench.clock)
    rounds = [bench.log[start : start + 6] for start in range(0, len(bench.log), 6)]
    assert len(rounds) == 31  # one of warm-up
    assert all(each[:3] == each[:2:-1] for each in rounds) and len({each[:3] for each in rounds}) == 6
    np.testing.assert_array_equal(times, np.tile([MS, 2 * MS, 3 * MS], (30, 2, 1)))  # by call, not by turn


def test_every_sitting_loads_anew_and_has_its_share(bench: Bench) -> None:
    """Each second one in the opposite order."""
    events: list[str] = []

    @contextmanager
    def load(order: Sequence[int]) -> Iterator[list[Call]]:
        events.append("".join(map(str, order)))
        yield [bench.call("a", 10), bench.call("b", 10)]
        events.append("close")

    schedule = Schedule(warmup_ms=20, min_seconds=0.4, min_runs=7, sittings=4)
    times = time_sittings(load, 2, schedule, bench.clock)
    assert events[1::2] == ["close"] * 4
    first, second, third, fourth = events[::2]
    assert (first, third) == (second[::-1], fourth[::-1]) and {first, second} == {"01", "10"}
    assert [each.shape for each in times] == [(5, 2, 2)] * 4 and len(bench.log) == 4 * (20 + 4)
    assert runs_of(times, 1).tolist() == [10 * MS] * 40


def test_every_call_gets_its_time_also_the_fast_one(bench: Bench) -> None:
    calls = [bench.call("a", 10), bench.call("b", 1)]
    schedule = Schedule(warmup_ms=0, min_seconds=0.05, min_runs=1, sittings=1)
    comparison = compare_interleaved(loaded(*calls), len(calls), batch=1, schedule=schedule, clock=bench.clock)
    assert [latency.runs for latency in comparison.latencies] == [50, 50]


def test_speed_up_is_baseline_over_candidate_round_by_round(bench: Bench) -> None:
    # the machine slows down threefold on the way: the latencies vary, the ratio does not
    calls = [bench.call("a", 2, 4, 6), bench.call("b", 1, 2, 3), bench.call("c", 4, 8, 12)]
    schedule = Schedule(warmup_ms=0, min_seconds=0, min_runs=30, sittings=3)
    comparison = compare_interleaved(loaded(*calls), len(calls), batch=1, schedule=schedule, clock=bench.clock)
    faster, slower = comparison.speed_ups
    assert (faster.rounds, faster.sittings, faster.verdict, slower.verdict) == (15, 3, "faster", "slower")
    for ratio, wanted in ((faster, 2), (slower, 0.5)):
        assert [ratio.p5, ratio.low, ratio.median, ratio.high, ratio.p95] == pytest.approx([wanted] * 5)
    assert all(latency.warning for latency in comparison.latencies)


def test_spread_of_the_ratio() -> None:
    half = np.stack([np.arange(101) + 100, np.full(101, 100)], axis=1)
    ratio = speed_up([np.stack([half, half], axis=1)], 0, 1)
    assert [ratio.p5, ratio.p25, ratio.median, ratio.p75, ratio.p95] == pytest.approx([1.05, 1.25, 1.5, 1.75, 1.95])


def noisy(sittings: int, rounds: int, *, ratio: float, between: float, seed: int) -> list[Any]:
    """Times of two calls that differ by `ratio`, by the luck of a sitting, and by noise of 10 %."""
    rng = np.random.default_rng(seed)
    means = [[np.log(ratio) + rng.normal(0, between), 0] for _ in range(sittings)]
    return [np.exp(rng.normal([[mean]], 0.1, (rounds, 2, 2))) * 1e7 for mean in means]


@pytest.mark.parametrize("between", [0.0, 0.03])
def test_interval_of_equal_calls_holds_1_about_95_times_in_100(between: float) -> None:
    """Also where a sitting's luck moves all of its rounds; that is what sittings are for."""
    verdicts = [speed_up(noisy(5, 60, ratio=1, between=between, seed=seed), 0, 1).verdict for seed in range(100)]
    assert verdicts.count("no difference") >= 91


def test_one_long_sitting_would_be_fooled_by_its_luck() -> None:
    verdicts = [speed_up(noisy(1, 300, ratio=1, between=0.03, seed=seed), 0, 1).verdict for seed in range(50)]
    assert verdicts.count("no difference") < 40


def test_interval_narrows_until_a_true_difference_is_seen() -> None:
    few, many = (speed_up(noisy(5, n, ratio=1.03, between=0.002, seed=1), 0, 1) for n in (10, 1000))
    assert many.high - many.low < few.high - few.low
    assert many.verdict == "faster" and many.low < 1.03 < many.high


def test_one_call_is_no_comparison(bench: Bench) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare_interleaved(loaded(bench.call("a", 1)), 1, batch=1, schedule=NO_WARMUP, clock=bench.clock)


def test_failure_of_a_call_gets_out(bench: Bench) -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        measure(broken, batch=1, schedule=NO_WARMUP, clock=bench.clock)


def test_real_clock_measures_something() -> None:
    assert measure(lambda: sum(range(1000)), batch=1, schedule=Schedule(0, 0, 5, 1)).min_ms > 0
