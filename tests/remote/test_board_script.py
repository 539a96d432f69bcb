"""The program for the board, run by the shells of this machine without SSH between."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from eamdeploy.remote.board_script import WORK, board_script, bootstrap
from eamdeploy.remote.cargo import Cargo, pack_cargo

MARK = "secret"
SHELLS = ("sh", "bash", "busybox")
SLOW = 'echo $$ >"$HOME/pid"; sleep 300 & echo $! >"$HOME/own_child"; wait'
PATIENCE_S = 15.0
PROGRAMS = ("cat", "dd", "df", "env", "head", "mktemp", "rm", "sh", "sleep", "tail", "tar", "wc")


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A shell of this machine under the name `sh`, alone in its folder."""
    found = shutil.which(request.param)
    if found is None:
        pytest.skip(f"no {request.param} on this machine")
    link = tmp_path / "shell" / "sh"
    link.parent.mkdir()
    link.symlink_to(found)
    return link


class Run:
    """The program at work, in a home folder and a temporary folder of its own, with a fake eamdeploy."""

    def __init__(
        self, folder: Path, shell: Path, profile: str, deadline_s: float = 60, path: str | None = None
    ) -> None:
        self.home, self.temporary = folder / "home", folder / "tmp"
        self._read = ""
        self.home.mkdir()
        self.temporary.mkdir()
        program = self.home / "eamdeploy"
        program.write_text(f'#!/bin/sh\ncase "$1" in doctor) echo {{}};; profile) {profile};; esac\n')
        program.chmod(0o755)
        (folder / "x.onnx").write_bytes(bytes(100_000))
        self.cargo: Cargo = pack_cargo([folder / "x.onnx"])
        arguments = ["profile", f"{WORK}0/x.onnx", "it's", "--json"]
        script = board_script(
            MARK,
            ["~/eamdeploy"],
            arguments,
            [file.name for file in self.cargo.files],
            archive_bytes=self.cargo.archive_bytes,
            deadline_s=deadline_s,
        )
        path = path or f"{shell.parent}:{os.environ['PATH']}"
        environment = {"PATH": path, "HOME": str(self.home), "TMPDIR": str(self.temporary)}
        self.process = subprocess.Popen(
            [shell, "-c", bootstrap(script)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # as sshd does
        )
        assert self.process.stdin is not None
        self.process.stdin.write(script)
        self.process.stdin.flush()

    def send(self) -> None:
        """Everything has arrived, and it is told to measure: not before, as busybox's `head` reads too much."""
        assert self.process.stdin is not None and self.process.stdout is not None
        for data in self.cargo.archive():
            self.process.stdin.write(data)
        self.process.stdin.flush()
        while not self._read.endswith(f"\n{MARK} sizes\n"):
            line = self.process.stdout.readline().decode()
            assert line, self._read
            self._read += line
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()

    def output(self) -> str:
        """All of it, when the program has ended by itself with its input still open."""
        assert self.process.stdout is not None
        self._read += self.process.stdout.read().decode()
        self.process.wait(PATIENCE_S)
        return self._read

    def pids(self) -> list[int]:
        files = [self.home / "pid", self.home / "own_child"]
        texts = [file.read_text().strip() if file.exists() else "" for file in files]
        return [int(text) for text in texts] if all(texts) else []

    def close_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts the program, which is dead when the test ends."""
    runs: list[Run] = []

    def begin(shell: Path, profile: str, deadline_s: float = 60, path: str | None = None) -> Run:
        runs.append(Run(tmp_path, shell, profile, deadline_s, path))
        return runs[-1]

    yield begin
    for run in runs:
        for pid in [run.process.pid, *run.pids()]:
            if psutil.pid_exists(pid):
                psutil.Process(pid).kill()
        run.process.wait()
        for stream in (run.process.stdin, run.process.stdout):
            if stream is not None:
                stream.close()


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < until_s, what
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def has_members(group: int) -> bool:
    """Whether a process of that process group runs."""
    members = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == group:
                members.append(pid)
    return any(map(is_running, members))


def require_clean(run: Run) -> None:
    wait_for("the folder is gone", lambda: not list(run.temporary.iterdir()))
    wait_for("the processes have ended", lambda: not any(map(is_running, run.pids())))
    wait_for("its own have ended", lambda: run.process.poll() is not None and not has_members(run.process.pid))


def test_it_measures_and_leaves_nothing(shell: Path, start: Callable[..., Run]) -> None:
    run = start(shell, 'wc -c <"$2"; echo "$3"; echo "$TMPDIR"; echo warning >&2; exit 3')
    run.send()
    parts = [line for line in run.output().splitlines() if line]
    folder = parts[1]
    assert folder.startswith(f"{run.temporary}/eamdeploy.")
    at = parts.index(f"{MARK} copied 0")
    assert parts[at + 1 :] == [
        *("100000", f"{MARK} sizes"),
        *("100000", "it's", folder, f"{MARK} profile 3"),
        *("warning", f"{MARK} errors"),
    ]
    assert [line for line in parts[:at] if line.startswith(MARK)] == [
        f"{MARK} {word}" for word in ("begin", "folder", "disk", "doctor 0", "errors")
    ]
    assert run.process.returncode == 0
    require_clean(run)


def test_the_end_of_its_input_ends_the_measurement(shell: Path, start: Callable[..., Run]) -> None:
    run = start(shell, SLOW)
    run.send()
    wait_for("it measures", lambda: bool(run.pids()))
    run.close_input()
    require_clean(run)
    assert run.process.wait(PATIENCE_S) == 143


@pytest.mark.parametrize("pieces", [1, 3, None])
def test_it_measures_nothing_before_all_is_there_and_it_is_told_to(
    shell: Path, start: Callable[..., Run], pieces: int | None
) -> None:
    run = start(shell, "touch $HOME/measured")
    assert run.process.stdin is not None
    run.process.stdin.write(b"".join(list(run.cargo.archive())[:pieces]))
    run.close_input()
    assert run.output() and run.process.returncode == 1
    require_clean(run)
    assert not (run.home / "measured").exists()


def test_its_own_deadline_ends_it(shell: Path, start: Callable[..., Run]) -> None:
    run = start(shell, SLOW, deadline_s=2)
    run.send()
    assert f"{MARK} sizes" in run.output(), "with its input still open"
    assert run.process.returncode == 143
    require_clean(run)


def test_killed_it_is_cleaned_up_after(shell: Path, start: Callable[..., Run]) -> None:
    run = start(shell, SLOW)
    run.send()
    wait_for("it measures", lambda: bool(run.pids()))
    run.process.kill()
    run.process.wait()
    run.close_input()  # sshd does, when the program that it started is dead
    require_clean(run)


def test_where_there_is_no_setsid(start: Callable[..., Run], tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in PROGRAMS:
        found = shutil.which(name)
        assert found is not None, name
        (folder / name).symlink_to(found)
    run = start(folder / "sh", 'echo $$ >"$HOME/pid"; echo $$ >"$HOME/own_child"; exec sleep 300', path=str(folder))
    run.send()
    wait_for("it measures", lambda: bool(run.pids()))
    run.close_input()
    require_clean(run)
