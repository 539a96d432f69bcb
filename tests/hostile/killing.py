"""Command lines that are killed (`kill -9`) at any moment: every file is the old or the new one, and the next run ends
right.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

STEP_S = 0.0005  # between two looks at the folder


@dataclass(frozen=True)
class Target:
    """A command that writes files over older ones.

    Attributes:
        words: what is run, in the trial's folder.
        outputs: the folder that it writes into, below the trial's.
        read: what the files in that folder say, by name, as far as two good runs agree on it; an error of ours for
            files that contradict each other, which a reader thereby notices.
    """

    name: str
    words: Sequence[str]
    outputs: str
    read: Callable[[Path], Mapping[str, str]]


@dataclass(frozen=True)
class Known:
    """What undisturbed runs gave: contents of the outputs by name, old and new, and how the new run goes.

    Attributes:
        seconds: from start to end.
        changes: how often the outputs' folder was seen to change.
    """

    old: Mapping[str, str]
    new: Mapping[str, str]
    seconds: float
    changes: int


@dataclass
class Killed:
    """What came of the kills of one command."""

    name: str
    states: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    leftovers: int = 0


def measure(target: Target, start: Path, scratch: Path) -> Known:
    """Runs the command once to its end, from a copy of `start`, in which the older outputs lie.

    Raises:
        RuntimeError: it failed.
    """
    _copy(start, scratch)
    old = target.read(scratch / target.outputs)
    began, changes = time.monotonic(), 0
    process = _run(target, scratch)
    for _ in _changes(scratch / target.outputs, process):
        changes += 1
    seconds = time.monotonic() - began
    if process.returncode != 0:
        raise RuntimeError(f"{target.name} failed by itself: {_last_words(scratch)}")
    return Known(old, target.read(scratch / target.outputs), seconds, changes)


def kill_once(target: Target, known: Known, start: Path, scratch: Path, rng: Random, told: Killed) -> None:
    """One kill, what it left, and one more run to the end; what is wrong goes to `told`."""
    _copy(start, scratch)
    outputs = scratch / target.outputs
    process = _run(target, scratch)
    moment = _let_live(process, outputs, known, rng)
    if process.poll() is None:  # or its number may be another process's by now
        os.killpg(process.pid, signal.SIGKILL)
    ended = process.wait() == 0
    leftovers = [file.name for file in outputs.glob(".*.partial")]
    told.leftovers += len(leftovers)
    state = "finished before" if ended else _state(target, known, outputs, told, moment)
    told.states[state] = told.states.get(state, 0) + 1
    again = _run(target, scratch)
    if again.wait() != 0:
        told.findings.append(f"{moment}: the next run failed: {_last_words(scratch)}")
        return
    try:
        found = target.read(outputs)
    except Exception as err:  # noqa: BLE001 (a finding, whatever it is)
        told.findings.append(f"{moment}: after the next run: {err!r}")
        return
    if found != known.new:
        other = sorted(name for name in found.keys() | known.new.keys() if found.get(name) != known.new.get(name))
        told.findings.append(f"{moment}: after the next run other than undisturbed: {', '.join(other)}")
    if stray := [file.name for file in outputs.glob(".*")]:
        told.findings.append(f"{moment}: left for good: {', '.join(stray)}")


def _let_live(process: subprocess.Popen[bytes], outputs: Path, known: Known, rng: Random) -> str:
    """Waits until the moment to kill: any, or just after some change of the outputs; says which."""
    if rng.random() < 0.4 or known.changes == 0:
        seconds = rng.uniform(0, known.seconds)
        _sleep(process, seconds)
        return f"{seconds:.3f} s after the start"
    wanted, delay = rng.randint(1, known.changes), rng.choice((0.0, rng.expovariate(500), rng.expovariate(50)))
    for number, _ in enumerate(_changes(outputs, process), start=1):
        if number == wanted:
            break
    _sleep(process, delay)
    return f"{1000 * delay:.1f} ms after change {wanted} of the outputs"


def _sleep(process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and (rest := deadline - time.monotonic()) > 0:
        time.sleep(min(rest, 0.05))


def _changes(folder: Path, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Something for every time that a file in the folder is new, gone or other, until the process ends."""
    before = _look(folder)
    while process.poll() is None:
        time.sleep(STEP_S)
        now = _look(folder)
        if now != before:
            before = now
            yield


def _look(folder: Path) -> frozenset[tuple[str, int, int]]:
    found = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                about = entry.stat()
            except FileNotFoundError:
                continue
            found.add((entry.name, about.st_mtime_ns, about.st_size))
    return frozenset(found)


def _state(target: Target, known: Known, outputs: Path, told: Killed, moment: str) -> str:
    """Whether the outputs are all old, all new, or of both kinds; a file that is neither is a finding."""
    from eamdeploy.errors import EamDeployError

    try:
        found = target.read(outputs)
    except EamDeployError as err:
        told.findings += [f"{moment}: {problem}" for problem in _torn(known, outputs)]
        return f"old and new, noticed: {type(err).__name__}"
    except Exception as err:  # noqa: BLE001 (a finding, whatever it is)
        told.findings.append(f"{moment}: {err!r}")
        return "can't be read"
    if found == known.old:
        return "old"
    if found == known.new:
        return "new"
    strange = [name for name, value in found.items() if value not in (known.old.get(name), known.new.get(name))]
    missing = [name for name in known.old if name not in found]
    if strange or missing:
        told.findings.append(f"{moment}: neither old nor new: {', '.join(strange)}; missing: {', '.join(missing)}")
        return "wrong"
    return "old and new"


def _torn(known: Known, outputs: Path) -> list[str]:
    """Files that are wrong by themselves, and not only beside others."""
    from hostile.kill_targets import read_alone

    found = {name: read_alone(outputs / name) for name in known.old}
    return [
        f"neither old nor new: {name}"
        for name, value in found.items()
        if value not in (known.old[name], known.new.get(name))
    ]


def _copy(start: Path, scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(start, scratch)


def _run(target: Target, folder: Path) -> subprocess.Popen[bytes]:
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            target.words,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _last_words(folder: Path) -> str:
    return (folder / "log").read_bytes().decode(errors="replace").strip()[-500:]


def eamdeploy(*words: object) -> list[str]:
    """The words of one of our commands in a process of its own."""
    return [sys.executable, "-m", "eamdeploy.cli", *map(str, words)]
