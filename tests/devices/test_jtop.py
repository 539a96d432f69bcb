from __future__ import annotations

import re
import sys
import time
from typing import Any

import pytest
from fake_jtop import AGX_ORIN, FakeService, JtopException

from eamdeploy.devices.jtop import JtopSensor, jtop_answers, memory_bytes, rails_mw
from eamdeploy.errors import DeviceError


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    service = FakeService()
    monkeypatch.setitem(sys.modules, "jtop", service.module())
    return service


def test_it_reads_what_the_service_sends(service: FakeService) -> None:
    with JtopSensor(0.2) as sensor:
        time.sleep(0.1)
        readings = sensor.readings()
    assert (sensor.source, sensor.total_rails, sensor.skipped) == ("jtop", ("VDD_IN",), 0)
    assert readings[0].power_mw == {"VDD_CPU_GPU_CV": 7104, "VDD_SOC": 3120, "VDD_IN": 16321}
    assert readings[0].memory_bytes == {"ram": 6873088 * 1024, "nvmap": 262144 * 1024}
    assert len(readings) >= 2
    assert (service.intervals, service.open) == ([0.2], 0)


def test_total_that_is_a_sum_of_overlapping_rails_is_not_taken() -> None:
    rails = {"VDDQ_VDD2_1V8AO": 301, "VDD_CPU_CV": 796, "VDD_GPU_SOC": 2390, "VIN_SYS_5V0": 3522}
    assert rails_mw(AGX_ORIN) == (rails, [])


@pytest.mark.parametrize(
    ("ram", "used"),
    [
        ({"used": 2, "shared": 1}, {"ram": 2048, "nvmap": 1024}),
        ({"used": 2, "shared": 1, "shared_label": "Shared"}, {"ram": 2048, "nvmap": 1024}),
        ({"used": 2, "shared": 1, "shared_label": "VRAM"}, {"ram": 2048, "gpu": 1024}),
        ({"used": 2, "shared": 0}, {"ram": 2048}),
        ({"used": 2}, {"ram": 2048}),
    ],
)
def test_memory_is_in_kilobytes(ram: dict[str, Any], used: dict[str, int]) -> None:
    assert memory_bytes({"RAM": ram}) == (used, [])


@pytest.mark.parametrize(
    "rail", [{"volt": 1}, {"power": None}, {"power": "N/A"}, {"power": float("nan")}, {"power": True}, None, 7, []]
)
def test_rail_without_its_power_is_left_out_and_the_others_are_kept(rail: object) -> None:
    power = {"rail": {"VDD_SOC": rail, "VDD_CPU": {"power": 5}}, "tot": {"power": 9, "name": "VDD_IN"}}
    rails, bad = rails_mw(power)
    assert rails == {"VDD_CPU": 5, "VDD_IN": 9}
    assert bad == [f"VDD_SOC: {rail!r}"]


@pytest.mark.parametrize("power", [None, {}, {"rail": None}, ("old", "form"), "off", {"rail": [], "tot": 5}])
def test_power_of_another_form_is_no_power(power: Any) -> None:
    rails, (bad,) = rails_mw(power)
    assert rails == {} and repr(power) in bad


@pytest.mark.parametrize("memory", [None, {}, {"RAM": None}, {"RAM": {"tot": 5}}, {"RAM": {"used": "much"}}, 5])
def test_memory_of_another_form_is_no_memory(memory: Any) -> None:
    used, (bad,) = memory_bytes(memory)
    assert used == {} and repr(memory) in bad


def test_memory_without_the_gpus_share_is_kept() -> None:
    assert memory_bytes({"RAM": {"used": 2, "shared": "?"}}) == ({"ram": 2048}, ["shared memory: '?'"])


@pytest.mark.parametrize(
    ("power", "memory", "kept"),
    [
        ({"rail": {"VDD_SOC": {"volt": 1}}, "tot": {}}, {"RAM": {"used": 2}}, ({}, {"ram": 2048})),
        ({"rail": {"VDD_SOC": {"power": 1}}, "tot": {}}, {"SWAP": 5}, ({"VDD_SOC": 1}, {})),
    ],
)
def test_power_and_memory_do_not_take_each_other_away(
    service: FakeService, power: Any, memory: Any, kept: tuple[object, object]
) -> None:
    service.power, service.memory = power, memory
    with JtopSensor(0.1) as sensor:
        (first, *_) = sensor.readings()
    assert (first.power_mw, first.memory_bytes) == kept
    assert sensor.notes.left_out >= 1 and sensor.skipped == 0


def test_reading_with_nothing_in_it_is_skipped(service: FakeService) -> None:
    with JtopSensor(0.1) as sensor:
        service.power, service.memory = {}, {}
        time.sleep(0.1)
        assert sensor.skipped >= 1 and "power without rails: {}" in (sensor.notes.skipped_example or "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (JtopException("Lost connection with jtop server"), r"jtop's service stopped: Lost connection.*systemctl"),
        (EOFError("gone"), r"jtop's service stopped: gone"),
        (OSError("no"), r"jtop's service stopped: no"),
        (KeyError("interval"), r"jtop stopped: 'interval'"),
        (AttributeError("'NoneType' object has no attribute 'get'"), r"jtop stopped: 'NoneType' object"),
        (RuntimeError(), r"jtop stopped: RuntimeError"),
    ],
)
def test_service_that_stops_is_noted_and_what_it_sent_before_is_kept(
    service: FakeService, error: Exception, said: str
) -> None:
    with JtopSensor(0.1) as sensor:
        service.breaks = error
        time.sleep(0.2)
        assert sensor.readings() and re.match(said, sensor.notes.failure or "")


def test_service_that_stops_before_its_first_reading_does_not_open(service: FakeService) -> None:
    service.breaks = JtopException("The jtop.service is not active")
    with pytest.raises(DeviceError, match=r"jtop's service stopped: The jtop\.service"), JtopSensor(0.1):
        raise AssertionError("opened")


def test_service_that_falls_silent_is_noted(service: FakeService) -> None:
    service.answers = 3
    with JtopSensor(0.1) as sensor:
        time.sleep(0.2)
        assert sensor.notes.failure == "jtop stopped by itself" and sensor.readings()


def test_whether_it_answers(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jtop_answers(0.1)
    assert service.open == 0
    service.answers = 0
    assert not jtop_answers(0.1)
    for error in (JtopException("The jtop.service is not active"), KeyError("interval"), PermissionError(13, "denied")):
        service.refuses = error
        assert not jtop_answers(0.1)
    monkeypatch.setitem(sys.modules, "jtop", None)
    assert not jtop_answers(0.1)
