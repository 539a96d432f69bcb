from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eamdeploy.devices.background import BackgroundSensor, EnergyCounter, PolledSensor
from eamdeploy.devices.base import Reading, SensorNotes
from eamdeploy.errors import DeviceError


class Scripted(BackgroundSensor):
    """Notes one reading, skips some, and then does what it is told."""

    def __init__(self, then: str, readings: int = 1, skips: int = 0) -> None:
        super().__init__("script", patience_s=0.2)
        self.then, self.count, self.skips = then, readings, skips

    def watch(self, stopped: threading.Event) -> None:
        for _ in range(self.skips):
            self.skip("???")
        for index in range(self.count):
            self.note(Reading(index, {}, {}))
        if self.then == "raise":
            raise OSError("cable fell out")
        if self.then == "wait":
            stopped.wait()


def wait_until_it_ended(sensor: BackgroundSensor) -> None:
    sensor._thread.join(5)


def test_it_reads_until_it_is_closed() -> None:
    sensor = PolledSensor("poll", ("A",), lambda at_ns: (Reading(at_ns, {"A": 1.0}, {}), []), interval_s=0.01)
    with sensor as same:
        assert same is sensor
        assert sensor.readings(), "it is open when there is a first reading"
        time.sleep(0.1)
        several = sensor.readings()
    assert sensor.total_rails == ("A",) and sensor.skipped == 0
    assert 3 <= len(several) <= 11
    assert all(before.at_ns < after.at_ns for before, after in pairwise(several))
    after = len(sensor.readings())
    time.sleep(0.05)
    assert len(sensor.readings()) == after
    assert not sensor._thread.is_alive()


def test_slow_read_does_not_pile_up() -> None:
    def read(at_ns: int) -> tuple[Reading, list[str]]:
        time.sleep(0.03)
        return Reading(at_ns, {}, {}), []

    with PolledSensor("slow", (), read, interval_s=0.001) as sensor:
        time.sleep(0.1)
    assert len(sensor.readings()) <= 6


@pytest.mark.parametrize(
    ("then", "message"), [("raise", "script stopped: cable fell out"), ("end", "script stopped by itself")]
)
def test_end_by_itself_is_noted_and_the_readings_before_it_are_kept(then: str, message: str) -> None:
    with Scripted(then, readings=2) as sensor:
        wait_until_it_ended(sensor)
        assert sensor.notes == SensorNotes(source="script", failure=message)
        assert len(sensor.readings()) == 2
    assert sensor.notes.warnings() == [f"power is missing or incomplete: {message}"]


@pytest.mark.parametrize(
    ("then", "message"), [("raise", "script stopped: cable fell out"), ("end", "script stopped by itself")]
)
def test_end_before_the_first_reading_is_an_error(then: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message), Scripted(then, readings=0):
        raise AssertionError("opened")


def test_end_of_the_block_is_no_failure() -> None:
    with Scripted("wait") as sensor:
        pass
    wait_until_it_ended(sensor)
    assert sensor.notes == SensorNotes(source="script") and sensor.notes.warnings() == []


def test_what_could_not_be_read_is_counted_with_an_example() -> None:
    with Scripted("wait") as sensor:
        sensor.leave_out()
        sensor.leave_out("FAN 30%", "FOO\t12\0")
        sensor.skip("garbage " * 100)
    notes = sensor.notes
    assert (notes.skipped, notes.left_out, notes.left_out_example) == (1, 2, "FOO 12\N{REPLACEMENT CHARACTER}")
    assert notes.skipped_example is not None and len(notes.skipped_example) == 161, "160 characters and an ellipsis"
    skipped, left_out = notes.warnings()
    assert skipped.startswith("script: 1 readings could not be understood and were skipped, e.g. 'garbage garbage")
    assert left_out == (
        "script: 2 fields could not be read or are not known here and were left out, "
        "e.g. 'FOO 12\N{REPLACEMENT CHARACTER}'"
    )


@pytest.mark.parametrize(
    ("power_mw", "memory_bytes", "skipped", "left_out"),
    [({}, {}, True, 0), ({"A": 1.0}, {}, False, 1), ({}, {"ram": 1}, False, 1)],
)
def test_reading_counts_as_long_as_something_of_it_could_be_read(
    power_mw: dict[str, float], memory_bytes: dict[str, int], skipped: bool, left_out: int
) -> None:
    def read(at_ns: int) -> tuple[Reading, list[str]]:
        first.append(at_ns)
        return (
            (Reading(at_ns, {"A": 1.0}, {}), [])
            if len(first) == 1
            else (
                Reading(at_ns, power_mw, memory_bytes),
                ["curr1_input: gone"],
            )
        )

    first: list[int] = []
    with PolledSensor("poll", ("A",), read, interval_s=0.01) as sensor:
        deadline = time.monotonic() + 5
        while len(first) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    notes = sensor.notes
    assert (notes.skipped > 0, notes.left_out > 0) == (skipped, left_out > 0)
    assert "curr1_input: gone" in (notes.skipped_example, notes.left_out_example)
    assert notes.failure is None


def test_total_of_a_board_is_of_all_rails_that_were_ever_read() -> None:
    """VIN has the others in it: as long as it can't be read, these are the total."""
    modules = {"VDD_GPU": 1.0, "VDD_CPU_SOC_MSS": 2.0, "VIN_SYS_5V0": 3.0}
    with Scripted("wait") as sensor:
        assert not sensor.total_rails
        sensor.note(Reading(1, modules, {}))
        assert sensor.total_rails == tuple(modules)
        sensor.note(Reading(2, {"VIN": 9.0}, {}))
        assert sensor.total_rails == ("VIN",)


@pytest.mark.parametrize(("skips", "got"), [(0, "got nothing"), (3, r"got 3 that can't be understood, the last: '\?")])
def test_without_a_first_reading_it_does_not_open(skips: int, got: str) -> None:
    sensor = Scripted("wait", readings=0, skips=skips)
    with pytest.raises(DeviceError, match=rf"script gave no reading; expected one within 0.2 s; {got}"), sensor:
        raise AssertionError("opened")
    assert not sensor._thread.is_alive()


def test_error_of_the_block_gets_out_and_closes_it() -> None:
    sensor = Scripted("wait")
    with pytest.raises(RuntimeError, match="engine"), sensor:
        raise RuntimeError("engine")
    assert not sensor._thread.is_alive()


def test_power_is_energy_per_time() -> None:
    meter = EnergyCounter()
    assert meter.power_mw(0, 1_000_000) is None
    assert meter.power_mw(500_000_000, 3_000_000) == 4000.0  # 2 J in 0.5 s
    assert meter.power_mw(500_000_000, 4_000_000) is None, "no time went by"


@given(
    wrap=st.integers(10**6, 10**12),
    start=st.integers(0, 10**12),
    used=st.integers(0, 10**6 - 1),
    milliseconds=st.integers(1, 10_000),
)
def test_counter_that_wraps_around_gives_the_same_power(wrap: int, start: int, used: int, milliseconds: int) -> None:
    meter = EnergyCounter(wraps_at_uj=wrap)
    meter.power_mw(0, start % (wrap + 1))
    power_mw = meter.power_mw(milliseconds * 10**6, (start + used) % (wrap + 1))
    assert power_mw == pytest.approx(used / milliseconds)


def test_counter_that_was_set_back_gives_no_power() -> None:
    meter = EnergyCounter()
    meter.power_mw(0, 5)
    assert meter.power_mw(1, 4) is None
    assert meter.power_mw(2, 6) == pytest.approx(2e6), "it goes on from there"


def test_counter_that_could_not_be_read_gives_no_power_over_the_gap() -> None:
    """Else a reading would tell of work before the one in front of it, which may be another engine's."""
    meter = EnergyCounter()
    meter.power_mw(0, 0)
    assert meter.power_mw(1_000_000, None) is None
    assert meter.power_mw(2_000_000, 9_000_000) is None
    assert meter.power_mw(3_000_000, 9_000_005) == pytest.approx(5)
