from __future__ import annotations

import time
from pathlib import Path

import pytest
from fake_jetson import make_board, write_files, write_rails
from hypothesis import given
from hypothesis import strategies as st

from eamdeploy.devices.ina3221 import find_rails, ina3221_sensor
from eamdeploy.devices.rails import total_rails

MB = 1 << 20
IIO = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"


def test_jetpack_5_multiplies_volts_and_amperes(tmp_path: Path) -> None:
    make_board(tmp_path, tmp_path / "bin", "jetpack5")
    sensor = ina3221_sensor(0.01, tmp_path)
    assert sensor is not None
    with sensor:
        time.sleep(0.05)
        readings = sensor.readings()
    assert (sensor.source, sensor.skipped) == ("sysfs ina3221", 0)
    assert sensor.total_rails == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), "1V8AO is a part of 5V0"
    assert readings[0].power_mw == pytest.approx(
        {"VDD_GPU_SOC": 2390.4, "VDD_CPU_CV": 796.8, "VIN_SYS_5V0": 3522.4, "VDDQ_VDD2_1V8AO": 301.92}
    )
    assert readings[0].memory_bytes == {"ram": 1358000 * 1024, "nvmap": 64 * MB}
    assert len(readings) >= 2


def test_jetpack_4_tells_the_power(tmp_path: Path) -> None:
    rails = {0: ("POM_5V_IN", 2345), 1: ("POM_5V_GPU", 42), 2: ("POM_5V_CPU", 560)}
    for channel, (name, mw) in rails.items():
        write_files(tmp_path, {f"{IIO}/rail_name_{channel}": name, f"{IIO}/in_power{channel}_input": mw})
        write_files(tmp_path, {f"{IIO}/in_current{channel}_input": 1, f"{IIO}/in_voltage{channel}_input": 5000})
    sensor = ina3221_sensor(0.01, tmp_path)
    assert sensor is not None and sensor.total_rails == ("POM_5V_IN",)
    with sensor:
        (first, *_) = sensor.readings()
    assert first.power_mw == {"POM_5V_IN": 2345, "POM_5V_GPU": 42, "POM_5V_CPU": 560}
    assert first.memory_bytes == {}


def test_channels_without_name_current_or_connection_are_no_rails(tmp_path: Path) -> None:
    write_rails(tmp_path, "1-0040", "hwmon0", {"NC": (5000, 5), "VDD_IN": (5000, 100), "VDD_SOC": (5000, 20)})
    folder = tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon0"
    (folder / "curr3_input").unlink()
    assert [(rail.name, rail.power_mw()) for rail in find_rails(tmp_path)] == [("VDD_IN", 500.0)]


def test_rail_that_cannot_be_read_now_is_left_out(tmp_path: Path) -> None:
    write_rails(tmp_path, "1-0040", "hwmon0", {"VDD_IN": (5000, 100), "VDD_SOC": (5000, 20)})
    sensor = ina3221_sensor(0.01, tmp_path)
    assert sensor is not None
    write_files(tmp_path, {"sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon0/curr1_input": "-"})
    with sensor:
        assert sensor.readings()[0].power_mw == {"VDD_SOC": 100.0}


def test_without_monitors_there_is_no_sensor(tmp_path: Path) -> None:
    assert ina3221_sensor(0.1, tmp_path) is None


@pytest.mark.parametrize(
    ("rails", "total"),
    [
        (["VDD_SYS_GPU", "VDD_SYS_SOC", "VDD_4V0_WIFI", "VDD_IN", "VDD_SYS_CPU", "VDD_SYS_DDR"], ["VDD_IN"]),
        (["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"], ["VDD_IN"]),
        (["POM_5V_CPU", "POM_5V_GPU", "POM_5V_IN"], ["POM_5V_IN"]),
        (
            ["VIN_SYS_5V0", "VDDQ_VDD2_1V8AO", "VDD_GPU_SOC", "VDD_CPU_CV"],
            ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"],
        ),
        (["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"], ["VIN"]),
        (["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"], ["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"]),
        (["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"], ["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"]),
        (["GPU", "CPU", "SOC"], []),
        (["VDD_GPU_SOC", "VDD_CPU_CV"], []),
        (["SOMETHING", "ELSE"], []),
        ([], []),
    ],
)
def test_total_of_known_boards_and_of_no_other(rails: list[str], total: list[str]) -> None:
    assert list(total_rails(rails)) == total


@given(st.lists(st.sampled_from(["VDD_IN", "VIN", "VIN_SYS_5V0", "VDD_GPU_SOC", "VDD_CPU_CV", "VDDQ_VDD2_1V8AO"])))
def test_total_is_made_of_rails_that_are_there(rails: list[str]) -> None:
    assert set(total_rails(rails)) <= set(rails)
    assert "VDDQ_VDD2_1V8AO" not in total_rails(rails)
