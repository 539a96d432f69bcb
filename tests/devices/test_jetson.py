from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_jetson import GENERATIONS, FakeBoard, Generation, make_board, write_files, write_model, write_program
from fake_jtop import FakeService

from eamdeploy.devices.base import DeviceState
from eamdeploy.devices.jetson import JetsonDevice
from eamdeploy.devices.registry import open_device
from eamdeploy.errors import DeviceError, ExitCode


@pytest.fixture(autouse=True)
def no_jtop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jtop", None)


def open_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: Generation) -> FakeBoard:
    """A board that this process takes for its own until the test ends."""
    board = make_board(tmp_path / "root", tmp_path / "bin", generation)
    for variable, value in board.environment.items():
        monkeypatch.setenv(variable, value)
    return board


def test_agx_orin_with_jetpack_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_board(tmp_path, monkeypatch, "jetpack5")
    state = open_device("jetson").state()
    assert state == DeviceState(
        kind="jetson",
        name="NVIDIA Jetson AGX Orin Developer Kit",
        software={"JetPack": "5.1", "L4T": "35.4.1"},
        power_mode="MAXN",
        power_mode_id=0,
        clocks_locked=False,
        clocks_mhz={
            **{"CPU0": 1113.6, "CPU1": 729.6, "GPU": 306.0, "EMC": 2133.0, "DLA0_CORE": 1600.0, "PVA0_AXI": 832.0}
        },
        temperatures_c={"CPU-therm": 41.437, "GPU-therm": 38.156},
        throttling=[],
        warnings=["clocks are not locked, so that times vary with the load before. Lock them with: sudo jetson_clocks"],
    )


def test_orin_nano_with_jetpack_6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_board(tmp_path, monkeypatch, "jetpack6")
    state = open_device("jetson").state()
    assert state.name == "NVIDIA Jetson Orin Nano Developer Kit"
    assert state.software == {"JetPack": "6.2", "L4T": "36.4.3"}
    assert (state.power_mode, state.power_mode_id, state.clocks_locked) == ("15W", 0, True)
    assert state.clocks_mhz["CPU5"] == 1510.4 and state.clocks_mhz["EMC"] == 2133.0
    assert state.temperatures_c == {"cpu-thermal": 57.125, "gpu-thermal": 58.625, "tj-thermal": 58.625}
    assert state.throttling == [] and state.warnings == []


def test_thor_with_jetpack_7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_board(tmp_path, monkeypatch, "jetpack7")
    state = open_device("jetson").state()
    assert state.name == "NVIDIA Jetson AGX Thor Developer Kit"
    assert state.software == {"JetPack": "7.0", "L4T": "38.2.0"}
    assert (state.power_mode, state.power_mode_id, state.clocks_locked) == ("120W", 1, False)
    assert state.clocks_mhz == {"CPU0": 2601.0, "CPU1": 972.0, "gpu-gpc-0": 1020.0, "gpu-nvd-0": 400.0}
    assert state.temperatures_c == {"cpu-thermal": 58.25, "tj-thermal": 66.625}
    assert state.throttling == ["gpu-throttle-alert is at 1 of 2"]
    clocks, overcurrent = state.warnings
    assert "not locked" in clocks
    assert overcurrent.startswith("oc3_event_cnt counts 27 over-current or under-voltage events")


@pytest.mark.parametrize(
    ("generation", "total_mw", "memory_mb"),
    [
        ("jetpack5", {"VDD_GPU_SOC": 2390, "VDD_CPU_CV": 796, "VIN_SYS_5V0": 3522}, 1205),
        ("jetpack6", {"VDD_IN": 16321}, 6712),
        ("jetpack7", {"VIN": 124486}, 8353),
    ],
)
def test_every_generation_gives_readings(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generation: Generation,
    total_mw: dict[str, int],
    memory_mb: int,
) -> None:
    open_board(tmp_path, monkeypatch, generation)
    sensor = open_device("jetson").sensor(0.02)
    assert sensor is not None
    with sensor:
        time.sleep(0.1)
        readings = sensor.readings()
    assert (sensor.source, sensor.skipped) == ("tegrastats", 0)
    assert len(readings) >= 2
    assert {rail: readings[0].power_mw[rail] for rail in sensor.total_rails} == total_mw
    assert readings[0].memory_bytes["ram"] == memory_mb << 20


@pytest.mark.parametrize(
    ("generation", "total_mw"), [("jetpack5", 6709.6), ("jetpack6", 16320.0), ("jetpack7", 28117.12)]
)
def test_without_tegrastats_the_power_monitors_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: Generation, total_mw: float
) -> None:
    board = open_board(tmp_path, monkeypatch, generation)
    (board.bin / "tegrastats").unlink()
    sensor = open_device("jetson").sensor(0.02)
    assert sensor is not None
    with sensor:
        (first, *_) = sensor.readings()
    assert sensor.source == "sysfs ina3221"
    assert sum(first.power_mw[rail] for rail in sensor.total_rails) == pytest.approx(total_mw)


def test_jtop_is_taken_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = open_board(tmp_path, monkeypatch, "jetpack6")
    service = FakeService()
    monkeypatch.setitem(sys.modules, "jtop", service.module())
    device = JetsonDevice(board.root)
    assert device.sensor(0.1).source == "jtop"
    service.refuses = OSError("The jtop.service is not active")
    assert device.sensor(0.1).source == "tegrastats"


def test_nothing_to_read_power_with_is_an_error_that_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    write_model(tmp_path, "NVIDIA Jetson Orin NX", "nvidia,tegra234")
    with pytest.raises(DeviceError, match=r"jtop does not answer, tegrastats is not on PATH.*sys/bus/i2c/drivers"):
        JetsonDevice(tmp_path).sensor(0.1)


def test_board_without_its_programs_warns_and_reads_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = open_board(tmp_path, monkeypatch, "jetpack6")
    for program in ("nvpmodel", "jetson_clocks"):
        (board.bin / program).unlink()
    state = JetsonDevice(board.root).state()
    assert (state.power_mode, state.power_mode_id, state.clocks_locked) == (None, None, None)
    mode, clocks = state.warnings
    assert mode == "the power mode is not known: nvpmodel is not on PATH"
    assert clocks.startswith("it is not known whether all clocks are locked: jetson_clocks is not on PATH")


def test_programs_that_say_something_else_are_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = open_board(tmp_path, monkeypatch, "jetpack6")
    for program in ("nvpmodel", "jetson_clocks"):
        write_program(board.bin / program, "#!/bin/sh\necho hello\n")
    mode, clocks = JetsonDevice(board.root).state().warnings
    assert "`nvpmodel -q` names none" in mode
    assert "`jetson_clocks --show` does not say so" in clocks


def test_container_that_hides_the_release_is_still_a_jetson(tmp_path: Path) -> None:
    write_model(tmp_path, "NVIDIA Jetson Orin NX Engineering Reference", "nvidia,p3768\0nvidia,tegra234")
    state = JetsonDevice(tmp_path).state()
    assert (state.name, state.software) == ("NVIDIA Jetson Orin NX Engineering Reference", {})


def test_release_alone_is_a_jetson_too(tmp_path: Path) -> None:
    write_files(tmp_path, {"etc/nv_tegra_release": "# R99 (release), REVISION: 1.0"})
    state = JetsonDevice(tmp_path).state()
    assert (state.name, state.software) == ("NVIDIA Jetson", {"L4T": "99.1.0"})


def test_other_machine_is_no_jetson_and_the_error_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"no Jetson.*etc/nv_tegra_release.*proc/device-tree") as caught:
        JetsonDevice(tmp_path)
    assert caught.value.exit_code == ExitCode.UNAVAILABLE
    write_model(tmp_path, "Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b\0brcm,bcm2712")
    with pytest.raises(DeviceError, match="got the board Raspberry Pi 5"):
        JetsonDevice(tmp_path)


PROGRAM = """
from eamdeploy.devices.registry import find_device
device = find_device()
with device.sensor(0.02) as sensor:
    readings = sensor.readings()
    print(device.state().name, sum(readings[0].power_mw[rail] for rail in sensor.total_rails), sep=": ")
"""


@pytest.mark.parametrize(
    ("generation", "said"),
    zip(GENERATIONS, ("AGX Orin: 6708", "Orin Nano: 16321", "AGX Thor: 124486"), strict=True),
)
def test_another_process_takes_the_fake_board_for_its_own(tmp_path: Path, generation: Generation, said: str) -> None:
    board = make_board(tmp_path / "root", tmp_path / "bin", generation)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **board.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().replace(" Developer Kit", "") == f"NVIDIA Jetson {said}"
