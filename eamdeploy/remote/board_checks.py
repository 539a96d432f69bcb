"""What must hold on a board before engines are measured there, read off what `board_script` prints."""

from __future__ import annotations

import re

from pydantic import ConfigDict

from eamdeploy.artifacts.records import Record
from eamdeploy.devices.provenance import package_versions
from eamdeploy.errors import CheckpointError, DeviceError
from eamdeploy.remote.cargo import Cargo
from eamdeploy.remote.failures import last_line
from eamdeploy.remote.session import Part
from eamdeploy.remote.target import SshTarget

_NOT_FOUND = ("126", "127")
_NO_PACKAGE = re.compile("No module named '?eamdeploy")
_SPARE_BYTES = 1 << 20  # folders, the last messages, what a measurement keeps for a moment
# The C library's words, and those of GNU's, busybox's and BSD's tar for a write that the disk took only a part of.
_FULL = ("No space left on device", "quota exceeded", "Wrote only", "short write", "write error", "Write failed")
_AVAILABLE = re.compile(r"\s\d+\s+\d+\s+(\d+)\s+\d+%\s", re.ASCII)  # df -Pk: size, used, available, use


class _BoardMachine(Record):
    model_config = ConfigDict(frozen=True, extra="ignore")

    versions: dict[str, str]


class _Board(Record):
    """The part of `doctor --json` that matters here; another version of eamdeploy may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    machine: _BoardMachine
    memory_free_bytes: int


def require_space(target: SshTarget, disk: Part, cargo: Cargo) -> int | None:
    """Free bytes where the engines will lie, which are enough; None where the board does not tell.

    Raises:
        DeviceError: there is too little space.
    """
    found = _AVAILABLE.search(disk.body.decode(errors="replace"))
    if found is None:
        return None
    free_bytes = int(found[1]) * 1024
    needed_bytes = cargo.archive_bytes + _SPARE_BYTES
    if free_bytes < needed_bytes:
        raise _disk_full(target, needed_bytes, f"{free_bytes:,} bytes free")
    return free_bytes


def require_eamdeploy(target: SshTarget, doctor: Part, errors: Part, command: str, cargo: Cargo) -> str:
    """The version of eamdeploy on the board, which goes together with ours; it has memory for the engines.

    Args:
        doctor, errors: what `doctor --json` wrote there to stdout, with its exit code, and to stderr.
        command: what ran it.

    Raises:
        DeviceError: there is none, it does not work, it is another version, or memory is short.
    """
    said = last_line(errors.text)
    if doctor.detail in _NOT_FOUND or _NO_PACKAGE.search(errors.text):
        raise DeviceError(
            f"there is no eamdeploy on {target}",
            expected=f"a program {command}",
            got=said,
            hint="Install it there with: pip install eamdeploy. A virtual environment is not found by itself: "
            "--remote-command '~/venv/bin/eamdeploy'.",
        )
    ours = package_versions()["eamdeploy"]
    update = (
        f"Install eamdeploy {_release(ours)} there, or the board's version here; profiles of two can't be compared."
    )
    if "No such command" in errors.text:
        raise DeviceError(f"eamdeploy on {target} is too old", expected=ours, got="one without `doctor`", hint=update)
    if doctor.detail != "0":
        got = f"exit code {doctor.detail}: {said or 'nothing on stderr'}"
        raise DeviceError(f"eamdeploy does not work on {target}", got=got, hint=f"Try there: {command} doctor")
    try:
        board = _Board.parse(doctor.body, f"what `{command} doctor --json` wrote on {target}")
    except CheckpointError as err:
        raise DeviceError(str(err), hint=update) from err
    theirs = board.machine.versions.get("eamdeploy", "none")
    if _release(theirs) != _release(ours):
        raise DeviceError(f"{target} has another version of eamdeploy", expected=ours, got=theirs, hint=update)
    if board.memory_free_bytes < cargo.engine_bytes:
        raise DeviceError(
            f"{target} has too little free memory: engines that are compared are loaded together",
            expected=f"{cargo.engine_bytes:,} bytes at least",
            got=f"{board.memory_free_bytes:,} bytes",
            hint="End other programs there, or measure fewer engines at a time.",
        )
    return theirs


def require_unpacked(target: SshTarget, copied: Part, cargo: Cargo, free_bytes: int | None) -> None:
    """The board's tar has unpacked the archive.

    Args:
        copied: what tar wrote to stderr there, with its exit code.
        free_bytes: what was free before.

    Raises:
        DeviceError: it has not; the folder there is gone.
    """
    if copied.detail == "0":
        return
    full = [line.strip() for line in copied.text.splitlines() if any(words in line for words in _FULL)]
    if full:
        free = "" if free_bytes is None else f" after {free_bytes:,} bytes were free"
        raise _disk_full(target, cargo.archive_bytes + _SPARE_BYTES, f"{full[0]}{free}")
    said = last_line(copied.text) or f"tar's exit code {copied.detail}"
    raise DeviceError(f"the engines can't be unpacked on {target}", got=said)


def require_sizes(target: SshTarget, sizes: Part, cargo: Cargo) -> None:
    """Every file has arrived whole.

    Raises:
        DeviceError: one has not.
    """
    arrived = sizes.text.split()
    sent = [str(file.size_bytes) for file in cargo.files]
    if arrived != sent:
        raise DeviceError(
            f"the engines have not arrived whole on {target}",
            expected=f"files of {', '.join(sent)} bytes",
            got=", ".join(arrived) or "none",
            hint="Try again; if it stays so, look at the board's disk.",
        )


def _release(version: str) -> str:
    """Major and minor number, which decide the format of what is exchanged."""
    return ".".join(version.split(".")[:2])


def _disk_full(target: SshTarget, needed_bytes: int, got: str) -> DeviceError:
    return DeviceError(
        f"there is too little space on {target} for the engines",
        expected=f"{needed_bytes:,} bytes free",
        got=got,
        hint="Nothing was left there. Free some space, or set TMPDIR there to a folder on a larger disk.",
    )
