from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eamdeploy.devices.background import PolledSensor
from eamdeploy.devices.base import Reading, SensorNotes
from eamdeploy.errors import ConfigError, DeviceError
from eamdeploy.profiling.power import Power, PowerMeasurement, measure_power

MS = 1_000_000


class Bench:
    """A board with a clock: calls take their time and draw their power, and its sensor reads on every full interval.

    Attributes:
        rails_mw, memory_bytes: while nothing runs, and of calls while they do.
        lost: which readings, counted from 0, can't be understood.
        spikes_mw: what VDD_IN is instead at these milliseconds.
    """

    def __init__(
        self,
        rails_mw: Mapping[str, float],
        *,
        total: tuple[str, ...] = ("VDD_IN",),
        interval_ms: int = 100,
        lost: frozenset[int] = frozenset(),
    ) -> None:
        self.now_ns = 7 * MS
        self.idle_mw = dict(rails_mw)
        self.rails_mw: Mapping[str, float] = self.idle_mw
        self.memory: Mapping[str, int] = {"ram": 1000}
        self.total = total
        self.interval_ns = interval_ms * MS
        self.lost = lost
        self.spikes_mw: Mapping[int, float] = {}
        self.log = ""
        self.count = self.lost_count = 0
        self.taken: list[Reading] = []
        self.breaks_at_ns: float = float("inf")
        self.is_open = False

    @property
    def source(self) -> str:
        return "bench"

    @property
    def total_rails(self) -> tuple[str, ...]:
        return self.total

    @property
    def skipped(self) -> int:
        return self.lost_count

    @property
    def notes(self) -> SensorNotes:
        stopped = self.now_ns >= self.breaks_at_ns
        return SensorNotes(source="bench", skipped=self.lost_count, failure="bench stopped" if stopped else None)

    def readings(self) -> list[Reading]:
        return list(self.taken)

    def __enter__(self) -> Bench:
        if self.breaks_at_ns <= 0:
            raise DeviceError("bench gave no reading")
        self.is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_open = False

    def clock(self) -> int:
        return self.now_ns

    def pass_time(self, ns: int) -> None:
        end = self.now_ns + ns
        while (tick := (self.now_ns // self.interval_ns + 1) * self.interval_ns) <= end:
            self.now_ns = tick
            if tick >= self.breaks_at_ns:
                pass
            elif self.count in self.lost:
                self.lost_count += 1
            else:
                rails_mw = dict(self.rails_mw)
                if tick // MS in self.spikes_mw:
                    rails_mw["VDD_IN"] = self.spikes_mw[tick // MS]
                self.taken.append(Reading(tick, rails_mw, dict(self.memory)))
            self.count += 1
        self.now_ns = end

    def sleep(self, seconds: float) -> None:
        self.log += "-"
        self.pass_time(round(seconds * 1e9))

    def call(self, name: str, ms: float, rails_mw: Mapping[str, float], ram: int = 2000) -> Callable[[], object]:
        def run() -> None:
            assert self.is_open
            if self.log[-1] != name:
                self.log += name
            self.rails_mw, self.memory = rails_mw, {"ram": ram}
            self.pass_time(round(ms * MS))
            self.rails_mw, self.memory = self.idle_mw, {"ram": 1000}

        return run

    def measure(
        self, *calls: Callable[[], object], batch: int = 1, seconds: float = 1.5, idle_seconds: float = 1.2
    ) -> list[Power]:
        measured = self.try_to_measure(*calls, batch=batch, seconds=seconds, idle_seconds=idle_seconds)
        assert measured.notes.failure is None
        powers = [power for power in measured.powers if power is not None]
        assert len(powers) == len(calls)
        return powers

    def try_to_measure(
        self, *calls: Callable[[], object], batch: int = 1, seconds: float = 1.5, idle_seconds: float = 1.2
    ) -> PowerMeasurement:
        return measure_power(
            self, calls, batch, seconds=seconds, idle_seconds=idle_seconds, clock=self.clock, sleep=self.sleep
        )


def test_energy_is_power_times_time_over_images() -> None:
    bench = Bench({"VDD_IN": 2000, "VDD_SOC": 500})
    first = bench.call("a", 5, {"VDD_IN": 10_000, "VDD_SOC": 900}, ram=5000)
    second = bench.call("b", 4, {"VDD_IN": 6_000, "VDD_SOC": 700}, ram=3000)
    slow, fast = bench.measure(first, second, batch=8)
    assert bench.log == "-abab"
    assert slow == Power(
        source="bench",
        rails_mw={"VDD_IN": 10_000, "VDD_SOC": 900},
        total_rails=["VDD_IN"],
        idle_mw=2000,
        mean_mw=10_000,
        energy_mj_per_image=10_000 * 0.005 / 8,
        energy_above_idle_mj_per_image=8_000 * 0.005 / 8,
        samples=28,
        skipped=0,
        seconds=3.0,
        images=2 * 300 * 8,
        images_per_s=1600.0,
        memory_peak_bytes={"ram": 5000},
        warnings=[],
    )
    assert fast.energy_mj_per_image == pytest.approx(6_000 * 0.004 / 8)
    assert fast.energy_above_idle_mj_per_image == pytest.approx(4_000 * 0.004 / 8)
    assert (fast.mean_mw, fast.images_per_s, fast.memory_peak_bytes) == (6000, 2000.0, {"ram": 3000})
    assert not bench.is_open


def test_total_is_the_sum_of_its_rails() -> None:
    bench = Bench({"GPU": 100, "5V": 50, "1V8": 20}, total=("GPU", "5V"))
    (power,) = bench.measure(bench.call("a", 10, {"GPU": 1000, "5V": 400, "1V8": 300}))
    assert (power.idle_mw, power.mean_mw, power.total_rails) == (150, 1400, ["GPU", "5V"])
    assert power.rails_mw == {"GPU": 1000, "5V": 400, "1V8": 300}


def test_readings_that_begin_before_a_block_do_not_count() -> None:
    """The blocks begin at 7, 1207 and 2707 ms, so that their first readings look back to before them."""
    bench = Bench({"VDD_IN": 500})
    bench.spikes_mw = dict.fromkeys((100, 1300, 2800), 999_999.0)
    (power,) = bench.measure(bench.call("a", 10, {"VDD_IN": 1000}))
    assert (power.idle_mw, power.mean_mw, power.samples) == (500, 1000, 28)
    bench = Bench({"VDD_IN": 500})
    bench.spikes_mw = {1400: 1280.0, 4200: 1280.0}
    (power,) = bench.measure(bench.call("a", 10, {"VDD_IN": 1000}))
    assert power.mean_mw == 1000 + 2 * 280 / 28, "the second and the last do"


def test_lost_readings_are_counted_and_so_is_the_gap_they_leave() -> None:
    whole = Bench({"VDD_IN": 1000})
    (all_there,) = whole.measure(whole.call("a", 10, {"VDD_IN": 2000}))
    # readings 12 to 26 are of the first block, and the next after a lost one still lies inside it
    lost = Bench({"VDD_IN": 1000}, lost=frozenset({15, 20, 21}))
    (some_lost,) = lost.measure(lost.call("a", 10, {"VDD_IN": 2000}))
    assert (all_there.samples, all_there.skipped) == (28, 0)
    assert (some_lost.samples, some_lost.skipped) == (25, 3)
    assert some_lost.mean_mw == all_there.mean_mw == 2000


def test_reading_without_a_rail_of_the_total_is_skipped() -> None:
    bench = Bench({"VDD_IN": 1000})
    calls = iter([{"VDD_SOC": 7.0}] * 3)

    def run() -> None:
        bench.call("a", 100, next(calls, {"VDD_IN": 3000.0, "VDD_SOC": 7.0}))()

    (power,) = bench.measure(run)
    assert (power.samples, power.skipped, power.mean_mw) == (26, 2, 3000)
    assert power.rails_mw == {"VDD_SOC": 7, "VDD_IN": 3000}


def test_unknown_total_gives_rails_but_no_energy() -> None:
    bench = Bench({"VDD_X": 1, "VDD_Y": 2}, total=())
    (power,) = bench.measure(bench.call("a", 10, {"VDD_X": 10, "VDD_Y": 20}))
    assert power.rails_mw == {"VDD_X": 10, "VDD_Y": 20}
    assert power.idle_mw is power.mean_mw is power.energy_mj_per_image is power.energy_above_idle_mj_per_image is None
    assert (power.samples, power.total_rails) == (28, [])
    assert power.warnings == ["it is not known which of the rails VDD_X, VDD_Y are this board's total: no energy"]


def test_sensor_without_power_gives_memory() -> None:
    bench = Bench({}, total=())
    (power,) = bench.measure(bench.call("a", 10, {}, ram=4000))
    assert (power.rails_mw, power.memory_peak_bytes, power.samples) == ({}, {"ram": 4000}, 28)
    assert power.warnings == ["the sensor gives no power; it may need root to read it"]


def test_few_readings_are_warned_about() -> None:
    bench = Bench({"VDD_IN": 1000})
    (power,) = bench.measure(bench.call("a", 10, {"VDD_IN": 2000}), seconds=0.5)
    assert power.samples == 8
    assert power.warnings == ["the figures rest on 8 readings (fewer than 10): measure longer"]
    bench = Bench({"VDD_IN": 1000})
    (power,) = bench.measure(bench.call("a", 10, {"VDD_IN": 2000}), idle_seconds=0.5)
    assert power.warnings == ["the idle power rests on 4 readings (fewer than 10)"]


def test_without_any_reading_there_are_no_figures() -> None:
    bench = Bench({"VDD_IN": 1000}, interval_ms=60_000)
    (power,) = bench.measure(bench.call("a", 10, {"VDD_IN": 2000}))
    assert power.mean_mw is power.idle_mw is power.energy_mj_per_image is None
    assert (power.samples, power.images, power.images_per_s) == (0, 300, 100.0)
    assert power.warnings == ["the figures rest on 0 readings (fewer than 10): measure longer"]


def test_power_that_drifts_between_the_passes_is_warned_about() -> None:
    bench = Bench({"VDD_IN": 1000})

    def run() -> None:
        bench.call("a", 10, {"VDD_IN": 2000 if bench.now_ns < 2700 * MS else 2200})()

    (power,) = bench.measure(run)
    assert power.mean_mw == 2100
    assert len(power.warnings) == 1 and "2000 mW in the first pass and 2200 mW in the second" in power.warnings[0]


def test_block_ends_with_the_run_that_reaches_its_time() -> None:
    bench = Bench({"VDD_IN": 0})
    (power,) = bench.measure(bench.call("a", 400, {"VDD_IN": 1000}), seconds=1.0)
    assert power.images == 6 and power.seconds == pytest.approx(2.4)
    assert power.energy_mj_per_image == pytest.approx(400)


def test_sensor_that_stops_ends_the_measurement_and_what_it_gave_before_is_kept() -> None:
    """The blocks begin at 1207 ms and take 1500 ms each; the sensor stops in the second one."""
    bench = Bench({"VDD_IN": 500})
    bench.breaks_at_ns = 3500 * MS
    calls = [bench.call(name, 10, {"VDD_IN": mw}) for name, mw in (("a", 1000.0), ("b", 2000.0), ("c", 3000.0))]
    measured = bench.try_to_measure(*calls)
    assert bench.log == "-ab" and not bench.is_open
    assert measured.notes == SensorNotes(source="bench", failure="bench stopped")
    first, second, third = measured.powers
    assert first is not None and second is not None and third is None
    assert (first.mean_mw, first.idle_mw, first.samples, first.images) == (1000, 500, 14, 150)
    assert first.energy_mj_per_image == pytest.approx(1000 * 0.010)
    assert first.warnings == ["1 of the 2 passes gave no reading that could be used"]
    assert (second.mean_mw, second.samples, second.images) == (2000, 6, 150)
    assert second.energy_mj_per_image == pytest.approx(2000 * 0.010)
    assert second.warnings == [
        "1 of the 2 passes gave no reading that could be used",
        "the figures rest on 6 readings (fewer than 10): measure longer",
    ]


def test_sensor_that_stops_while_nothing_runs_leaves_no_figures() -> None:
    bench = Bench({"VDD_IN": 500})
    bench.breaks_at_ns = 300 * MS
    measured = bench.try_to_measure(bench.call("a", 10, {"VDD_IN": 1000}))
    assert measured == PowerMeasurement([None], SensorNotes(source="bench", failure="bench stopped"))
    assert bench.log == "-"


def test_sensor_that_does_not_open_leaves_no_figures() -> None:
    bench = Bench({"VDD_IN": 500})
    bench.breaks_at_ns = 0
    call = bench.call("a", 10, {"VDD_IN": 1000})
    measured = bench.try_to_measure(call, call)
    assert measured == PowerMeasurement([None, None], SensorNotes(source="bench", failure="bench gave no reading"))
    assert bench.log == ""


def test_sensor_that_falls_silent_without_a_word_is_warned_about() -> None:
    """Its thread hangs in a driver, say: the first pass has its readings, the second none."""
    bench = Bench({"VDD_IN": 500}, lost=frozenset(range(27, 99)))
    (power,) = bench.measure(bench.call("a", 10, {"VDD_IN": 1000}))
    assert (power.mean_mw, power.samples) == (1000, 14)
    assert power.warnings == ["1 of the 2 passes gave no reading that could be used"]


def test_device_error_of_a_call_is_not_taken_for_the_sensors() -> None:
    bench = Bench({"VDD_IN": 0})

    def lost() -> None:
        raise DeviceError("the GPU is lost")

    with pytest.raises(DeviceError, match="the GPU is lost"):
        bench.measure(lost)
    assert not bench.is_open


def test_failure_of_a_call_gets_out_and_closes_the_sensor() -> None:
    bench = Bench({"VDD_IN": 0})

    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        bench.measure(broken)
    assert not bench.is_open


@pytest.mark.parametrize(
    ("batch", "seconds", "idle_seconds"),
    [(0, 1, 1), (1, 0, 1), (1, 1, -1), (1, float("inf"), 1), (1, float("nan"), 1), (1, 1, float("nan"))],
)
def test_times_that_cannot_be_used_are_refused(batch: int, seconds: float, idle_seconds: float) -> None:
    bench = Bench({})
    with pytest.raises(ConfigError, match="power can't be measured with these numbers"):
        bench.measure(lambda: None, batch=batch, seconds=seconds, idle_seconds=idle_seconds)
    with pytest.raises(ConfigError, match=r"at least 1 engine.*got 0"):
        bench.measure()


@given(
    idle=st.integers(0, 50_000),
    busy=st.integers(0, 50_000),
    ms=st.integers(1, 150),
    batch=st.integers(1, 64),
    interval_ms=st.integers(20, 200),
)
def test_constant_power_gives_exactly_its_energy(idle: int, busy: int, ms: int, batch: int, interval_ms: int) -> None:
    bench = Bench({"VDD_IN": idle}, interval_ms=interval_ms)
    (power,) = bench.measure(bench.call("a", ms, {"VDD_IN": busy}), batch=batch)
    assert power.energy_mj_per_image == pytest.approx(busy * ms / 1000 / batch)
    assert power.energy_above_idle_mj_per_image == pytest.approx((busy - idle) * ms / 1000 / batch)


def test_with_a_real_clock_and_a_real_thread() -> None:
    def read(at_ns: int) -> tuple[Reading, list[str]]:
        return Reading(at_ns, {"X": 1000.0}, {"ram": 5}), []

    sensor = PolledSensor("poll", ("X",), read, interval_s=0.01)
    (power,) = measure_power(sensor, [lambda: time.sleep(0.001)], 1, seconds=0.2, idle_seconds=0.2).powers
    assert power is not None
    assert power.mean_mw == power.idle_mw == 1000
    assert power.energy_mj_per_image == pytest.approx(1000 * power.seconds / power.images)
    assert 5 <= power.samples <= 40
