from __future__ import annotations

import shutil
import time
from collections.abc import Callable
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
    assert sensor is not None
    with sensor:
        (first, *_) = sensor.readings()
    assert sensor.total_rails == ("POM_5V_IN",)
    assert first.power_mw == {"POM_5V_IN": 2345, "POM_5V_GPU": 42, "POM_5V_CPU": 560}
    assert first.memory_bytes == {}


def test_channels_without_name_current_or_connection_are_no_rails(tmp_path: Path) -> None:
    write_rails(tmp_path, "1-0040", "hwmon0", {"NC": (5000, 5), "VDD_IN": (5000, 100), "VDD_SOC": (5000, 20)})
    folder = tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon0"
    (folder / "curr3_input").unlink()
    assert [(rail.name, rail.ask_power()) for rail in find_rails(tmp_path)] == [("VDD_IN", (500.0, ""))]


HWMON = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon0"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("file", "garbage", "said"),
    [
        ("curr1_input", "-", "VDD_IN: curr1_input: '-' is no whole number"),
        ("curr1_input", "", "VDD_IN: curr1_input: '' is no whole number"),
        ("in1_input", "4.9e3", "VDD_IN: in1_input: '4.9e3' is no whole number"),
        ("in1_input", "9" * 5000, "is no whole number"),
        ("in1_input", None, "VDD_IN: in1_input: No such file or directory"),
    ],
)
def test_rail_that_cannot_be_read_meanwhile_is_left_out_and_said(
    tmp_path: Path, file: str, garbage: str | None, said: str
) -> None:
    write_rails(tmp_path, "1-0040", "hwmon0", {"VDD_IN": (5000, 100), "VDD_SOC": (5000, 20)})
    sensor = ina3221_sensor(0.01, tmp_path)
    assert sensor is not None
    with sensor:
        assert sensor.readings()[0].power_mw == {"VDD_IN": 500.0, "VDD_SOC": 100.0}
        if garbage is None:
            (tmp_path / HWMON / file).unlink()
        else:
            write_files(tmp_path, {f"{HWMON}/{file}": garbage})
        wait_for(lambda: sensor.readings()[-1].power_mw == {"VDD_SOC": 100.0})
        assert said in (sensor.notes.left_out_example or "")
        write_files(tmp_path, {f"{HWMON}/{file}": 1000})
        wait_for(lambda: "VDD_IN" in sensor.readings()[-1].power_mw)
    assert sensor.notes.left_out >= 1 and sensor.notes.failure is None and sensor.total_rails == ("VDD_IN",)


def test_rail_that_cannot_be_read_at_first_is_said_and_counts_from_then_on(tmp_path: Path) -> None:
    write_rails(tmp_path, "1-0040", "hwmon0", {"VDD_IN": (5000, 100), "VDD_SOC": (5000, 20)})
    write_files(tmp_path, {f"{HWMON}/curr1_input": "?"})
    sensor = ina3221_sensor(0.01, tmp_path)
    assert sensor is not None
    with sensor:
        assert sensor.readings()[0].power_mw == {"VDD_SOC": 100.0} and sensor.total_rails == ()
        assert sensor.notes.left_out >= 1
        write_files(tmp_path, {f"{HWMON}/curr1_input": 100})
        wait_for(lambda: sensor.total_rails == ("VDD_IN",))


def test_monitors_that_vanish_are_said_and_what_the_memory_is_goes_on(tmp_path: Path) -> None:
    make_board(tmp_path, tmp_path / "bin", "jetpack6")
    sensor = ina3221_sensor(0.01, tmp_path)
    assert sensor is not None
    with sensor:
        shutil.rmtree(tmp_path / "sys/bus/i2c")
        wait_for(lambda: sensor.readings()[-1].power_mw == {})
        assert sensor.readings()[-1].memory_bytes["ram"] > 0
    assert "No such file" in (sensor.notes.left_out_example or "")


def test_rails_of_the_same_name_are_left_out(tmp_path: Path) -> None:
    """Which of them is meant can't be told, and one would hide the other."""
    write_rails(tmp_path, "1-0040", "hwmon0", {"VDD_IN": (5000, 100), "VDD_SOC": (5000, 20)})
    write_rails(tmp_path, "1-0041", "hwmon1", {"VDD_SOC": (5000, 900)})
    sensor = ina3221_sensor(0.01, tmp_path)
    assert sensor is not None
    with sensor:
        assert sensor.readings()[0].power_mw == {"VDD_IN": 500.0}
    assert sensor.notes.left_out_example == "VDD_SOC: 2 rails have this name"


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
