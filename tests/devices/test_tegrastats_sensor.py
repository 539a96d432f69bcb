from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_jetson import FakeBoard, make_board, write_program

from eamdeploy.devices.base import SensorNotes
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
    board.lines.write_bytes(whole.encode() + b"\nsomething else\n\xff\xfe\0garbage\n\n")
    with TegrastatsSensor(5, board.root) as sensor:
        wait_for(lambda: sensor.skipped == 2)
        assert len(sensor.readings()) == 1
    garbage = "\N{REPLACEMENT CHARACTER}" * 3 + "garbage"
    assert sensor.notes == SensorNotes(source="tegrastats", skipped=2, skipped_example=garbage)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def test_unknown_fields_are_counted_and_the_rest_of_their_line_is_read(board: FakeBoard) -> None:
    whole = board.lines.read_text().strip()
    strange = whole.replace(" ", "  ").replace("EMC_FREQ", "FAN 30% EMC_FREQ") + "\tNEW_THING\r"
    board.lines.write_text(f"{strange}\n")
    with TegrastatsSensor(5, board.root) as sensor:
        (first,) = sensor.readings()
    assert first.power_mw == {"VDD_GPU_SOC": 2390, "VDD_CPU_CV": 796, "VIN_SYS_5V0": 3522, "VDDQ_VDD2_1V8AO": 301}
    assert sensor.notes == SensorNotes(source="tegrastats", left_out=2, left_out_example="NEW_THING")


def test_line_without_memory_leaves_the_memory_to_the_kernels_files(board: FakeBoard) -> None:
    board.lines.write_text("10-16-2023 10:59:22 VDD_IN 5mW/5mW\n")
    with TegrastatsSensor(5, board.root) as sensor:
        (first,) = sensor.readings()
    assert first.power_mw == {"VDD_IN": 5} and first.memory_bytes["ram"] == 1358000 * 1024


def test_text_without_any_line_end_is_read_in_pieces_and_skipped(board: FakeBoard) -> None:
    line = board.lines.read_text().strip()
    flood = "head -c 1000000 /dev/zero | tr '\\0' x"
    write_program(board.bin / "tegrastats", lines_of(f"echo '{line}'", flood, "exec sleep 60"))
    with TegrastatsSensor(0.1, board.root) as sensor:
        wait_for(lambda: sensor.skipped >= 15)
    assert len(sensor.notes.skipped_example or "") <= 161 and len(sensor.readings()) == 1


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


def test_end_after_some_readings_is_noted_and_they_are_kept(board: FakeBoard) -> None:
    line = board.lines.read_text().strip()
    write_program(board.bin / "tegrastats", lines_of(f"echo '{line}'", "sleep 0.3", "echo gone >&2", "exit 4"))
    with TegrastatsSensor(0.1, board.root) as sensor:
        assert len(sensor.readings()) == 1
        wait_for(lambda: sensor.notes.failure is not None)
        assert "exit code 4: gone" in (sensor.notes.failure or "") and len(sensor.readings()) == 1


def test_program_that_cannot_be_run_is_an_error_with_its_reason(board: FakeBoard) -> None:
    (board.bin / "tegrastats").write_bytes(b"\x7fELF of another machine")
    with (
        pytest.raises(DeviceError, match=r"tegrastats stopped: .*format error"),
        TegrastatsSensor(0.1, board.root),
    ):
        raise AssertionError("opened")


def test_program_that_prints_nothing_useful_is_an_error_with_what_it_printed(
    board: FakeBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(board.bin / "tegrastats", lines_of("echo 'Segmentation fault'", "exec sleep 60"))
    sensor = TegrastatsSensor(0.1, board.root)
    monkeypatch.setattr(sensor, "_patience_s", 0.5)
    with pytest.raises(DeviceError, match="1 that can't be understood, the last: 'Segmentation fault'"), sensor:
        raise AssertionError("opened")


def test_program_and_its_children_are_gone_afterwards(board: FakeBoard, tmp_path: Path) -> None:
    line = board.lines.read_text().strip()
    pids = tmp_path / "pids"
    stubborn = lines_of("trap '' TERM", "sleep 60 &", f"echo $$ $! > {pids}", f"echo '{line}'", "wait", "sleep 60")
    write_program(board.bin / "tegrastats", stubborn)
    with TegrastatsSensor(0.1, board.root) as sensor:
        running = [int(pid) for pid in pids.read_text().split()]
        assert len(running) == 2 and all(is_running(pid) for pid in running)
    # the kernel ends killed processes when it gets to it, which a busy machine may put off
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in running) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(is_running(pid) for pid in running)
    assert not sensor._thread.is_alive()


def test_without_the_program_it_does_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(DeviceError, match="tegrastats is not on PATH"), TegrastatsSensor(0.1, tmp_path):
        raise AssertionError("opened")
