from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from fake_jetson import FakeBoard, make_board, write_program

from eamdeploy.devices.tegrastats_sensor import TegrastatsSensor
from eamdeploy.errors import DeviceError

MB = 1 << 20


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeBoard:
    board = make_board(tmp_path / "root", tmp_path / "bin", "jetpack5")
    monkeypatch.setenv("PATH", board.environment["PATH"])
    return board


def lines_of(*commands: str) -> str:
    return "\n".join(("#!/bin/sh", *commands, ""))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_it_reads_what_tegrastats_prints(board: FakeBoard) -> None:
    with TegrastatsSensor(0.02, board.root) as sensor:
        time.sleep(0.3)
        readings = sensor.readings()
    assert sensor.source == "tegrastats"
    assert sensor.total_rails == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
    assert 3 <= len(readings) <= 16
    first = readings[0]
    assert first.power_mw == {"VDD_GPU_SOC": 2390, "VDD_CPU_CV": 796, "VIN_SYS_5V0": 3522, "VDDQ_VDD2_1V8AO": 301}
    assert first.memory_bytes == {"ram": 1205 * MB, "nvmap": 64 * MB}
    assert 0 <= time.monotonic_ns() - first.at_ns < 60e9
    assert sensor.skipped == 0


def test_lines_that_cannot_be_understood_are_counted(board: FakeBoard) -> None:
    whole = board.lines.read_text().strip()
    board.lines.write_text(f"{whole}\n{whole[:-3]}\nsomething else\n")
    with TegrastatsSensor(5, board.root) as sensor:
        deadline = time.monotonic() + 5
        while sensor.skipped < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (len(sensor.readings()), sensor.skipped) == (1, 2)


def test_line_that_is_cut_by_the_end_is_not_read(board: FakeBoard) -> None:
    line = board.lines.read_text().strip()
    write_program(board.bin / "tegrastats", lines_of(f"echo '{line}'", f"printf '%s' '{line}'", "exec sleep 60"))
    with TegrastatsSensor(0.1, board.root) as sensor:
        time.sleep(0.1)
    assert (len(sensor.readings()), sensor.skipped) == (1, 1)


def test_slow_start_is_waited_for(board: FakeBoard) -> None:
    line = board.lines.read_text().strip()
    write_program(board.bin / "tegrastats", lines_of("sleep 0.5", f"echo '{line}'", "exec sleep 60"))
    with TegrastatsSensor(0.1, board.root) as sensor:
        assert len(sensor.readings()) == 1


@pytest.mark.parametrize(
    ("commands", "said"),
    [
        (("echo 'cannot open /dev/nvhost' >&2", "exit 3"), "exit code 3: cannot open /dev/nvhost"),
        (("exit 0",), "exit code 0: nothing on stderr"),
    ],
)
def test_end_by_itself_is_an_error_with_its_stderr(board: FakeBoard, commands: tuple[str, ...], said: str) -> None:
    write_program(board.bin / "tegrastats", lines_of(*commands))
    with pytest.raises(DeviceError, match=f"tegrastats ended by itself; got {said}"), TegrastatsSensor(0.1, board.root):
        raise AssertionError("opened")


def test_end_after_some_readings_is_an_error_of_the_next_look(board: FakeBoard) -> None:
    line = board.lines.read_text().strip()
    write_program(board.bin / "tegrastats", lines_of(f"echo '{line}'", "sleep 0.3", "echo gone >&2", "exit 4"))
    with TegrastatsSensor(0.1, board.root) as sensor:
        assert len(sensor.readings()) == 1
        time.sleep(0.8)
        with pytest.raises(DeviceError, match="exit code 4: gone"):
            sensor.readings()


def test_program_and_its_children_are_gone_afterwards(board: FakeBoard, tmp_path: Path) -> None:
    line = board.lines.read_text().strip()
    pids = tmp_path / "pids"
    stubborn = lines_of("trap '' TERM", "sleep 60 &", f"echo $$ $! > {pids}", f"echo '{line}'", "wait", "sleep 60")
    write_program(board.bin / "tegrastats", stubborn)
    with TegrastatsSensor(0.1, board.root) as sensor:
        running = [int(pid) for pid in pids.read_text().split()]
        assert len(running) == 2 and all(is_running(pid) for pid in running)
    assert not any(is_running(pid) for pid in running)
    assert not sensor._thread.is_alive()


def test_without_the_program_it_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(DeviceError, match="tegrastats is not on PATH"), TegrastatsSensor(0.1, tmp_path):
        raise AssertionError("opened")
