from __future__ import annotations

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
    assert rails_mw(AGX_ORIN) == {"VDDQ_VDD2_1V8AO": 301, "VDD_CPU_CV": 796, "VDD_GPU_SOC": 2390, "VIN_SYS_5V0": 3522}


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
    assert memory_bytes({"RAM": ram}) == used


def test_reading_without_its_numbers_is_skipped(service: FakeService) -> None:
    with JtopSensor(0.1) as sensor:
        service.power = {"rail": {"VDD_SOC": {"volt": 1}}, "tot": {}}
        time.sleep(0.1)
        assert sensor.skipped >= 1


@pytest.mark.parametrize("error", [JtopException("Lost connection with jtop server"), EOFError("gone"), OSError("no")])
def test_service_that_stops_is_an_error(service: FakeService, error: Exception) -> None:
    with JtopSensor(0.1) as sensor:
        service.breaks = error
        time.sleep(0.2)
        with pytest.raises(DeviceError, match=f"jtop's service stopped: {error}.*systemctl"):
            sensor.readings()


def test_service_that_falls_silent_is_an_error(service: FakeService) -> None:
    service.answers = 3
    with JtopSensor(0.1) as sensor:
        time.sleep(0.2)
        with pytest.raises(DeviceError, match="jtop stopped by itself"):
            sensor.readings()


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
