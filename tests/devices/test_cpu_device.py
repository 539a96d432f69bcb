from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_jetson import write_cores, write_files, write_model, write_zones

from eamdeploy.devices.cpu import CpuDevice, cpu_model

CPUINFO = "processor\t: 0\nmodel name\t: Some CPU @ 2.0GHz\nprocessor\t: 1\nmodel name\t: Other"


def write_rapl(root: Path, domain: str, name: str, energy_uj: object) -> None:
    folder = f"sys/class/powercap/{domain}"
    write_files(
        root,
        {f"{folder}/name": name, f"{folder}/energy_uj": energy_uj, f"{folder}/max_energy_range_uj": 262143328850},
    )


def test_name_is_the_kernels_or_the_boards(tmp_path: Path) -> None:
    assert cpu_model(tmp_path), "something is always said"
    write_model(tmp_path, "Raspberry Pi 5 Model B", "raspberrypi,5-model-b")
    write_files(tmp_path, {"proc/cpuinfo": "processor\t: 0\nCPU implementer\t: 0x41"})
    assert cpu_model(tmp_path) == "Raspberry Pi 5 Model B"
    write_files(tmp_path, {"proc/cpuinfo": CPUINFO})
    assert cpu_model(tmp_path) == CpuDevice(tmp_path).state().name == "Some CPU @ 2.0GHz"


def test_state_of_this_machine() -> None:
    device = CpuDevice()
    assert device.kind == device.state().kind == "cpu"


def test_machine_that_tells_nothing(tmp_path: Path) -> None:
    state = CpuDevice(tmp_path).state()
    assert (state.power_mode, state.clocks_locked, state.clocks_mhz) == (None, None, {})
    assert state.temperatures_c == {} and state.throttling == state.warnings == []
    assert CpuDevice(tmp_path).sensor(0.1) is None


def test_clock_that_moves_is_warned_about(tmp_path: Path) -> None:
    write_cores(tmp_path, {0: (600000, 2400000, 1500000), 2: (600000, 2400000, 2400000), 10: (1, 2, 3)}, "ondemand")
    write_files(tmp_path, {"sys/devices/system/cpu/cpu10/online": 0})
    write_zones(
        tmp_path,
        {"cpu-thermal": 80500, "acpitz": 27800, "off": -274000},
        {"pwm-fan": (3, 4), "LCD": (50, 100), "thermal-cpufreq-0": (2, 9), "Processor": (0, 10)},
    )
    state = CpuDevice(tmp_path).state()
    assert (state.power_mode, state.clocks_locked) == ("ondemand", False)
    assert list(state.clocks_mhz.items()) == [("CPU0", 1500.0), ("CPU2", 2400.0)]
    assert state.temperatures_c == {"cpu-thermal": 80.5, "acpitz": 27.8}
    assert state.throttling == ["thermal-cpufreq-0 is at 2 of 9"]
    assert len(state.warnings) == 1 and "governor ondemand" in state.warnings[0] and "cpupower" in state.warnings[0]


@pytest.mark.parametrize(("low", "governor", "locked"), [(2400000, "ondemand", True), (600000, "performance", False)])
def test_clock_that_is_held_is_fine(tmp_path: Path, low: int, governor: str, locked: bool) -> None:
    write_cores(tmp_path, {0: (low, 2400000, 2400000)}, governor)
    state = CpuDevice(tmp_path).state()
    assert state.clocks_locked is locked and state.warnings == []


def test_of_zones_with_one_name_the_hotter_counts(tmp_path: Path) -> None:
    write_zones(tmp_path, {"acpitz": 20000}, {})
    write_files(tmp_path, {"sys/class/thermal/thermal_zone1/type": "acpitz"})
    write_files(tmp_path, {"sys/class/thermal/thermal_zone1/temp": 30000})
    assert CpuDevice(tmp_path).state().temperatures_c == {"acpitz": 30.0}


def test_power_of_the_packages(tmp_path: Path) -> None:
    write_rapl(tmp_path, "intel-rapl:0", "package-0", 262143328800)
    write_rapl(tmp_path, "intel-rapl:0:0", "core", 7)
    write_rapl(tmp_path, "intel-rapl:1", "package-1", 10)
    write_rapl(tmp_path, "intel-rapl:2", "psys", 5)
    write_files(tmp_path, {"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable: 400 kB"})
    sensor = CpuDevice(tmp_path).sensor(0.05)
    assert sensor is not None and (sensor.source, sensor.total_rails) == ("RAPL", ("package-0", "package-1"))
    with sensor:
        write_rapl(tmp_path, "intel-rapl:0", "package-0", 1_000_000)  # it wrapped around
        deadline = time.monotonic() + 5
        while len(readings := sensor.readings()) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
    first, second = readings[:2]
    assert first.power_mw == {}, "a counter tells no power at the first look"
    assert first.memory_bytes == {"ram": 600 * 1024}
    used_uj = 1_000_000 + 262143328850 + 1 - 262143328800
    assert second.power_mw["package-0"] == pytest.approx(used_uj * 1e6 / (second.at_ns - first.at_ns))
    assert second.power_mw["package-1"] == 0


@pytest.mark.parametrize("energy", [None, "Permission denied", ""])
def test_counter_that_can_not_be_read_any_more_leaves_its_package_out(tmp_path: Path, energy: str | None) -> None:
    write_rapl(tmp_path, "intel-rapl:0", "package-0", 5)
    write_rapl(tmp_path, "intel-rapl:1", "package-1", 5)
    sensor = CpuDevice(tmp_path).sensor(0.01)
    assert sensor is not None
    path = tmp_path / "sys/class/powercap/intel-rapl:1/energy_uj"
    with sensor:
        wait_for(lambda: "package-1" in sensor.readings()[-1].power_mw)
        if energy is None:
            path.unlink()
        else:
            path.write_text(energy)
        wait_for(lambda: list(sensor.readings()[-1].power_mw) == ["package-0"])
        path.write_text("9000000")
        broken = len(sensor.readings())
        wait_for(lambda: "package-1" in sensor.readings()[-1].power_mw)
        after = [reading.power_mw["package-1"] for reading in sensor.readings()[broken:] if len(reading.power_mw) > 1]
    assert after[0] == 0, "what was used meanwhile is not that of one reading"
    said = {None: "No such file or directory", "": "'' is no whole number"}.get(energy, "'Permission denied' is no")
    assert (sensor.notes.left_out_example or "").startswith(f"package-1: energy_uj: {said}")
    assert sensor.total_rails == ("package-0", "package-1")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


@pytest.mark.parametrize("energy", ["Permission denied", ""])
def test_counters_that_only_root_may_read_are_no_sensor(tmp_path: Path, energy: str) -> None:
    write_rapl(tmp_path, "intel-rapl:0", "package-0", energy)
    assert CpuDevice(tmp_path).sensor(0.1) is None
