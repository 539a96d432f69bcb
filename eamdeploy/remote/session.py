"""One program on another machine, with its input and output, through the system's OpenSSH client.

The user's configuration, keys, agent and known hosts count. Nothing ever waits for a person: what would ask is an
error that says what to do.

The program's output is cut into parts by lines that begin with a word nobody can guess, so that what a shell's startup
files print can't be taken for it.
"""

from __future__ import annotations

import os
import secrets
import select
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import IO

from eamdeploy.errors import DeviceError, MissingDependency
from eamdeploy.remote.failures import lost_connection
from eamdeploy.remote.target import SshTarget

_OPTIONS = (
    "BatchMode=yes",  # nothing is asked: passwords, passphrases, unknown host keys
    "ConnectTimeout=15",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=3",
    "LogLevel=INFO",  # the reason of a failure, even where the user's file is quiet
    "ClearAllForwardings=yes",  # forwarded ports of the user's file would be taken by the first of two boards
    "RemoteCommand=none",  # the user's file may have one, for people
    "RequestTTY=no",
    "ControlMaster=no",  # an open connection of the user's is used, none is left behind
)
_TICK_MS = 200
_GRACE_S = 8.0  # for the other side to end its work and remove its files
_CHUNK_BYTES = 1 << 16
_MOST_BYTES = 64 << 20


class Stopped(Exception):
    """The user wants no result any more."""


@dataclass(frozen=True)
class Part:
    """A part of a program's output.

    Attributes:
        kind, detail: what the line that ends the part says: its first word after the secret one, and the rest.
        body: everything before that line.
    """

    kind: str
    detail: str
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode(errors="replace").strip()


class SshSession:
    """A program that runs on `target`, as a context manager; it sees the end of its input when the block ends.

    Args:
        command: what the login shell there gets to run.
        mark: the secret word.
        timeout_s: for everything together, from now.
        stopping: set when the user wants no result any more.
        ssh_config: read in place of the user's and the system's configuration.

    Raises:
        MissingDependency: there is no OpenSSH client here.
    """

    def __init__(
        self, target: SshTarget, command: str, mark: str, *, timeout_s: float, stopping: Event, ssh_config: Path | None
    ) -> None:
        self.target = target
        self._mark = mark.encode()
        self._timeout_s, self._until_s = timeout_s, time.monotonic() + timeout_s
        self._stopping = stopping
        self._unread = b""
        self._connected = False
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        config = [] if ssh_config is None else ["-F", str(ssh_config)]
        options = [word for option in _OPTIONS for word in ("-o", option)]
        try:
            self._process = subprocess.Popen(
                ["ssh", *config, *options, *target.arguments(), command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for us; we let the other side end its work first
            )
        except OSError as err:
            self._errors.close()
            raise MissingDependency(
                f"the program ssh can't be run here: {err.strerror or err}",
                hint="Install OpenSSH's client: sudo apt install openssh-client.",
            ) from err
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        os.set_blocking(self._input.fileno(), False)

    def send(self, data: bytes) -> None:
        """The other side gets `data`.

        Raises:
            DeviceError: the time is over. That the other side reads no more is for `receive` to explain.
            Stopped: the user wants no result any more.
        """
        view = memoryview(data)
        while view:
            self._wait(self._input, select.POLLOUT)
            try:
                view = view[os.write(self._input.fileno(), view[:_CHUNK_BYTES]) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return

    def receive(self, *kinds: str) -> Part:
        """The next part, which is of one of `kinds`.

        Raises:
            DeviceError: there is no connection, or it broke, or the other side fell silent; or the time is over.
            Stopped: the user wants no result any more.
        """
        body = b""
        while True:
            line = self._line()
            if not line:
                raise self._lost(body)
            if line.startswith(self._mark + b" "):
                kind, _, detail = line.decode(errors="replace").strip().partition(" ")[2].partition(" ")
                self._connected = True
                if kind not in kinds:
                    raise DeviceError(f"{self.target} answered out of turn", expected=" or ".join(kinds), got=kind)
                return Part(kind, detail, body)
            body += line
            if len(body) > _MOST_BYTES:
                raise DeviceError(f"{self.target} says too much", expected=f"at most {_MOST_BYTES:,} bytes")

    def _line(self) -> bytes:
        """The next line; empty at the end of the output."""
        while b"\n" not in self._unread:
            self._wait(self._output, select.POLLIN)
            data = os.read(self._output.fileno(), _CHUNK_BYTES)
            if not data:
                line, self._unread = self._unread, b""
                return line
            self._unread += data
            if len(self._unread) > _MOST_BYTES:
                raise DeviceError(f"{self.target} says too much", expected=f"lines of at most {_MOST_BYTES:,} bytes")
        line, _, self._unread = self._unread.partition(b"\n")
        return line + b"\n"

    def _wait(self, file: IO[bytes], event: int) -> None:
        """Until `file` can be read or written without waiting, or has reached its end."""
        poll = select.poll()
        poll.register(file.fileno(), event)
        while True:
            if self._stopping.is_set():
                raise Stopped
            if time.monotonic() > self._until_s:
                raise DeviceError(
                    f"{self.target} was not done in time; its work was ended",
                    expected=f"an end within {self._timeout_s:g} s",
                    hint="Measure less, or give it more time.",
                )
            if poll.poll(_TICK_MS):
                return

    def _lost(self, said: bytes) -> DeviceError:
        """Why the output has ended before its last part, with `said` as its last words."""
        try:
            code = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace")
        return lost_connection(self.target, code, errors, said.decode(errors="replace"), connected=self._connected)

    def __enter__(self) -> SshSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The other side has seen the end of its input and had time to clean up; the connection is closed."""
        self._input.close()
        until_s = time.monotonic() + _GRACE_S
        poll = select.poll()
        poll.register(self._output.fileno(), select.POLLIN)
        while (left_s := until_s - time.monotonic()) > 0:
            if poll.poll(left_s * 1000) and not os.read(self._output.fileno(), _CHUNK_BYTES):
                break
        self._output.close()
        try:
            self._process.wait(max(until_s - time.monotonic(), 0.5))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def new_mark() -> str:
    """A word that no program prints by chance."""
    return f"eamdeploy-{secrets.token_hex(12)}"
