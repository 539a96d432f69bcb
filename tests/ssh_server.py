"""A real OpenSSH server on the loopback address that plays a board, and a client's configuration that knows it.

Neither touches the user's ~/.ssh or the system's server: keys, configuration and the board's files lie in one folder.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

import eamdeploy

_ADDRESS = "127.0.0.1"
_PRIVILEGE_SEPARATION = Path("/run/sshd")
_START_S = 20.0
REPOSITORY = Path(eamdeploy.__file__).parents[1]


def require_sshd() -> str:
    """The path of sshd; a test that asks is skipped where there is none."""
    found = shutil.which("sshd", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
    if found is None:
        pytest.skip("no OpenSSH server on this machine (package openssh-server)")
    if shutil.which("ssh") is None:
        pytest.skip("no OpenSSH client on this machine (package openssh-client)")
    return found


class Board:
    """A server with a home folder and a temporary folder of its own.

    Attributes:
        target: its address as `ssh://…`.
        host: its name in the client's configuration; `alias` is the target with it.
        temporary: the board's TMPDIR; empty when everything there was cleaned up.
        programs: a folder in the board's PATH.
        ssh_config: the client's configuration.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.host = folder / name, name
        self.temporary, self.programs, self.home = self.folder / "tmp", self.folder / "bin", self.folder / "home"
        for path in (self.temporary, self.programs, self.home):
            path.mkdir(parents=True)
        self.port = _free_port()
        self.alias = f"ssh://{name}"
        self.target = f"ssh://{_ADDRESS}:{self.port}"
        self.ssh_config, self.known_hosts = folder / "ssh_config", folder / "known_hosts"
        self._process: subprocess.Popen[bytes] | None = None
        self._log = self.folder / "sshd.log"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, sshd: str, authorized_keys: Path, forced_command: str | None = None) -> None:
        """The server listens; it takes the keys in `authorized_keys`."""
        key = self.folder / "host_key"
        make_key(key)
        environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
        }
        lines = [
            f"ListenAddress {_ADDRESS}",
            f"Port {self.port}",
            f"HostKey {key}",
            f"AuthorizedKeysFile {authorized_keys}",
            "PidFile none",
            "UsePAM no",
            "StrictModes no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "MaxStartups 100",
            "SetEnv " + " ".join(f'"{name}={value}"' for name, value in environment.items()),
        ]
        if forced_command is not None:
            lines.append(f"ForceCommand {forced_command}")
        config = self.folder / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        if os.geteuid() == 0:
            _PRIVILEGE_SEPARATION.mkdir(mode=0o755, parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([sshd, "-D", "-e", "-f", str(config)], stderr=log)
        _wait_for_port(self.port, self._process, self._log)

    def trust(self, key: Path | None = None) -> None:
        """The client knows this board by its own host key, or by another one."""
        public = (key or self.folder / "host_key").with_suffix(".pub").read_text().split()
        with self.known_hosts.open("a") as file:
            file.write(f"[{_ADDRESS}]:{self.port} {public[0]} {public[1]}\n")

    def require_login(self) -> None:
        """Skips the test where this machine's user can't log in at all, e.g. because the account is locked."""
        done = subprocess.run(
            ["ssh", "-F", self.ssh_config, "-o", "BatchMode=yes", self.host, "true"], capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"sshd lets nobody in here: {done.stderr.decode()} {self._log.read_text()}")

    def put_program(self, name: str, text: str) -> None:
        """The board has an executable of that name in its PATH."""
        path = self.programs / name
        path.write_text(text)
        path.chmod(0o755)

    def put_eamdeploy(
        self, profile: str, version: str = eamdeploy.__version__, memory_free_bytes: int = 1 << 40
    ) -> None:
        """The board has a fake eamdeploy: a shell script whose `profile` is the commands given."""
        report = json.dumps({"machine": {"versions": {"eamdeploy": version}}, "memory_free_bytes": memory_free_bytes})
        doctor = f"printf '%s\\n' {shlex.quote(report)}"
        self.put_program("eamdeploy", f'#!/bin/sh\ncase "$1" in doctor) {doctor};; profile) {profile};; esac\n')

    def sessions(self) -> list[psutil.Process]:
        """The server's processes that serve a connection."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [child for child in children if child.name().startswith("sshd")]

    def stop(self) -> None:
        """The server and everything that it started has ended."""
        if self._process is None:
            return
        for child in psutil.Process(self.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self._process.kill()
        self._process.wait()
        self._process = None


class Boards:
    """Makes boards that one client knows, with the client's own key."""

    def __init__(self, folder: Path, sshd: str) -> None:
        self._folder, self._sshd = folder, sshd
        self.user_key = folder / "user_key"
        make_key(self.user_key)
        self.ssh_config = folder / "ssh_config"
        self._boards: list[Board] = []

    def start(
        self,
        name: str = "board",
        *,
        trusted: bool = True,
        authorized: Path | None = None,
        forced_command: str | None = None,
    ) -> Board:
        """A board that listens.

        Args:
            trusted: the client knows its host key.
            authorized: the public key that it lets in; None for the client's.
            forced_command: what it runs in place of whatever it is asked to.
        """
        board = Board(self._folder, name)
        self._boards.append(board)
        self._write_config()
        board.start(self._sshd, authorized or self.user_key.with_suffix(".pub"), forced_command)
        if trusted:
            board.trust()
            if authorized is None and forced_command is None:
                board.require_login()
        return board

    def _write_config(self) -> None:
        lines = [f"Host {board.host}\n  HostName {_ADDRESS}\n  Port {board.port}" for board in self._boards]
        everywhere = [f"IdentityFile {self.user_key}", "IdentitiesOnly yes", "IdentityAgent none"]
        known = [f"UserKnownHostsFile {self._folder / 'known_hosts'}", "GlobalKnownHostsFile /dev/null"]
        self.ssh_config.write_text(
            "\n".join([*lines, "Host *", *(f"  {line}" for line in [*everywhere, *known])]) + "\n"
        )

    def stop(self) -> None:
        for board in self._boards:
            board.stop()


@contextmanager
def running_boards(folder: Path) -> Iterator[Boards]:
    """Boards until the block ends; skips the test where there is no OpenSSH."""
    boards = Boards(folder, require_sshd())
    try:
        yield boards
    finally:
        boards.stop()


def make_key(path: Path) -> None:
    """A new key pair at `path` and `path.pub`, without a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def python_eamdeploy() -> str:
    """The remote command that runs this very eamdeploy, on a board whose PYTHONPATH has it."""
    return shlex.join([sys.executable, "-m", "eamdeploy.cli"])


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((_ADDRESS, 0))
        return int(sock.getsockname()[1])


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            pytest.skip(f"sshd can't be started here: {log.read_text()}")
        with socket.socket() as sock:
            if sock.connect_ex((_ADDRESS, port)) == 0:
                return
        time.sleep(0.05)
    pytest.fail(f"sshd does not listen: {log.read_text()}")
