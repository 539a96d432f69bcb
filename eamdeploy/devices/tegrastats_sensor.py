"""A sensor that runs a Jetson's `tegrastats` and reads what it prints."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from eamdeploy.devices.background import BackgroundSensor
from eamdeploy.devices.base import Reading
from eamdeploy.devices.sysfs import memory_in_use
from eamdeploy.devices.tegrastats import parse_line
from eamdeploy.errors import DeviceError

PROGRAM = "tegrastats"

_STDERR_BYTES = 2000
_LONGEST_LINE = 1 << 16  # some hundred times a real one


class TegrastatsSensor(BackgroundSensor):
    """Runs tegrastats while it is open.

    Args:
        root: where `/proc` is looked for, for the GPU's share of the memory.
    """

    def __init__(self, interval_s: float, root: Path = Path("/")) -> None:
        super().__init__(PROGRAM)
        self._interval_ms = max(round(interval_s * 1e3), 1)
        self._root = root
        self._process: subprocess.Popen[str] | None = None

    def watch(self, stopped: threading.Event) -> None:
        program = shutil.which(PROGRAM)
        if program is None:
            raise DeviceError(f"{PROGRAM} is not on PATH")
        with tempfile.TemporaryFile() as complaints:
            self._process = subprocess.Popen(
                [program, "--interval", str(self._interval_ms)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=complaints,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # so that it can be ended with its children, where it is a script
            )
            with self._process as process:
                try:
                    assert process.stdout is not None
                    if not stopped.is_set():  # else closed before there was a process to interrupt
                        self._read(process.stdout)
                        with suppress(subprocess.TimeoutExpired):
                            process.wait(timeout=1)  # for its own exit code
                finally:
                    _end(process)
            if not stopped.is_set():
                complaints.seek(0)
                said = complaints.read(_STDERR_BYTES).decode(errors="replace").strip()
                raise DeviceError(
                    f"{PROGRAM} ended by itself",
                    got=f"exit code {process.returncode}: {said or 'nothing on stderr'}",
                    hint="Try it in a terminal; on some boards it needs root to read everything.",
                )

    def _read(self, lines: IO[str]) -> None:
        while text := lines.readline(_LONGEST_LINE):
            at_ns = time.monotonic_ns()
            if not text.strip():
                continue
            line = parse_line(text) if text.endswith("\n") else None  # else cut by its end, or no text at all
            if line is None:
                self.skip(text)
                continue
            self.leave_out(*line.unknown)
            memory = memory_in_use(self._root)
            if line.ram_used_bytes is not None:
                memory["ram"] = line.ram_used_bytes
            self.note(Reading(at_ns, line.power_mw, memory))

    def interrupt(self) -> None:
        """Ends the program, and with that the reading of its lines."""
        if self._process is not None:
            _end(self._process)


def _end(process: subprocess.Popen[str]) -> None:
    """The process and its children have ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(OSError):  # it is gone already, or another user's
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)
