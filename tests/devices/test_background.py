from __future__ import annotations

import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eamdeploy.devices.background import BackgroundSensor, EnergyCounter, PolledSensor
from eamdeploy.devices.base import Reading
from eamdeploy.errors import DeviceError


class Scripted(BackgroundSensor):
    """Notes one reading, skips some, and then does what it is told."""

    def __init__(self, then: str, readings: int = 1, skips: int = 0) -> None:
        super().__init__("script", patience_s=0.2)
        self.then, self.count, self.skips = then, readings, skips

    @property
    def total_rails(self) -> tuple[str, ...]:
        return ()

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
    sensor = PolledSensor("poll", ("A",), lambda at_ns: Reading(at_ns, {"A": 1.0}, {}), interval_s=0.01)
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
    def read(at_ns: int) -> Reading:
        time.sleep(0.03)
        return Reading(at_ns, {}, {})

    with PolledSensor("slow", (), read, interval_s=0.001) as sensor:
        time.sleep(0.1)
    assert len(sensor.readings()) <= 6


@pytest.mark.parametrize(
    ("then", "message"), [("raise", "script stopped: cable fell out"), ("end", "script stopped by itself")]
)
def test_end_by_itself_is_an_error_of_the_next_look(then: str, message: str) -> None:
    sensor = Scripted(then)
    try:
        with sensor:
            wait_until_it_ended(sensor)
            with pytest.raises(DeviceError, match=message):
                sensor.readings()
    except DeviceError as err:  # it ended before it was open
        assert message in str(err)


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
