"""One hurt input: read in this process, and judged by what came out, what it took, and what is left on the disk."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random

from eamdeploy.artifacts.seal import SEAL
from eamdeploy.cli.app import main
from eamdeploy.errors import EamDeployError, ExitCode
from hostile.byte_mutations import STRANGE_NAMES, another_file
from hostile.jobs import Job, Verdict
from hostile.sources import OUT, SOURCES, Source

OLD = b"what was there before"
_OUTPUTS = (
    *("x.eam.safetensors", "x.onnx", "x.reference.npz", "x.ort.onnx", "x.ort.onnx.json", "x.json", "x.html", "x.md"),
)
_LONGEST_MESSAGE = 4000  # characters
MEMORY_LIMIT = 1 << 30  # bytes above what the good file takes
_BORROWED = ("weights.safetensors", "x.onnx", "maps.npz", "one_png/a.png", "evaluation.json", "run.toml", "weights.pth")


@dataclass(frozen=True)
class _Normal:
    """What the good file gives and takes."""

    fingerprint: str
    peak_bytes: int


class Judge:
    """Reads hurt files in a scratch folder.

    Args:
        good: the folder that `make_good_files` made.
        scratch: an empty folder for the hurt ones.
    """

    def __init__(self, good: Path, scratch: Path) -> None:
        self._good, self._scratch = good, scratch
        self._normal: dict[str, _Normal] = {}

    def hurt(self, job: Job) -> tuple[str, bytes]:
        """The input of that job and the name of the mutation that made it."""
        source, rng = SOURCES[job.source], Random(f"{job.seed}/{job.source}/{job.index}")
        mutation = rng.choice(source.mutations)
        others = [(self._good / name).read_bytes() for name in rng.sample(_BORROWED, 2)]
        good = (self._good / source.file).read_bytes()
        try:
            return mutation.__name__, mutation(good, rng, others)
        except Exception as err:  # noqa: BLE001 (what its library refuses to write, such as graphs that are nested too deep)
            return f"{mutation.__name__}, impossible: {type(err).__name__}", good

    def judge(self, job: Job) -> Verdict:
        """What comes of that input."""
        source = SOURCES[job.source]
        normal = self._normal.get(source.name) or self._measure(source)
        name, data = self.hurt(job)
        if source.strangely_named:
            name = STRANGE_NAMES[job.index % len(STRANGE_NAMES)]
        with _peak_memory() as peak:
            started = time.monotonic()
            verdict = self._read(source, name, data, normal)
            if source.command is not None and job.index % source.command_every == 0 and verdict.finding is None:
                verdict = self._run_command(source, verdict, data)
            seconds = time.monotonic() - started
        extra = max(0, peak[0] - normal.peak_bytes)
        if extra > MEMORY_LIMIT and verdict.finding is None:
            verdict = Verdict(name, verdict.outcome, "memory", f"{extra >> 20} MiB more than the good file")
        return Verdict(name, verdict.outcome, verdict.finding, verdict.details, seconds, extra)

    def _measure(self, source: Source) -> _Normal:
        """Reads the good file, which must work."""
        good = (self._good / source.file).read_bytes()
        target = self._lay_out(source, good)
        with _peak_memory() as peak:
            found = source.read(target)
            if source.command is not None:
                self._lay_out(source, good)
                code, _out, err = _command(source.command(target))
                assert code == ExitCode.DONE or source.name == "configuration", (source.name, err)
        self._normal[source.name] = _Normal(found, peak[0])
        return self._normal[source.name]

    def _lay_out(self, source: Source, data: bytes, stem: str | None = None) -> Path:
        """The scratch folder holds the hurt file, under another name if one is given, what belongs to it, and older
        outputs.
        """
        shutil.rmtree(self._scratch)
        for name in (*source.beside, source.file):
            target = self._scratch / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (self._good / name).is_dir():
                shutil.copytree(self._good / name, target, dirs_exist_ok=True)
            else:
                shutil.copy(self._good / name, target)
        target = self._scratch / source.file
        if stem is not None:
            target.unlink()
            target = target.with_name(stem + "".join(target.suffixes))
        target.write_bytes(data)
        for name in ("tmp", OUT):
            (self._scratch / name).mkdir()
        for name in _OUTPUTS:
            (self._scratch / OUT / name).write_bytes(OLD)
        tempfile.tempdir = str(self._scratch / "tmp")
        os.chdir(self._scratch)
        return target

    def _read(self, source: Source, mutation: str, data: bytes, normal: _Normal) -> Verdict:
        target = self._lay_out(source, data, mutation if source.strangely_named else None)
        before = _contents(self._scratch)
        try:
            found = source.read(target)
        except EamDeployError as err:
            outcome = f"refused: {type(err).__name__}"
            if len(str(err)) > _LONGEST_MESSAGE:
                return Verdict(mutation, outcome, "endless message", str(err)[:500])
            if changed := _changes(before, _contents(self._scratch), inputs_only=False):
                return Verdict(mutation, outcome, "files changed by a refusal", changed)
            return Verdict(mutation, outcome)
        except BaseException as err:
            if isinstance(err, KeyboardInterrupt):
                raise
            return Verdict(mutation, "", f"{type(err).__name__} at {_place(err)}", traceback.format_exc())
        if changed := _changes(before, _contents(self._scratch), inputs_only=True):
            return Verdict(mutation, "", "inputs changed", changed)
        if found == normal.fingerprint:
            return Verdict(mutation, "right")
        sealed = source.sealed == "inside" and SEAL.encode() in data and mutation != another_file.__name__
        if sealed or source.sealed == "beside":
            return Verdict(mutation, "wrong", "something else was read without a word")
        return Verdict(mutation, "other")

    def _run_command(self, source: Source, verdict: Verdict, data: bytes) -> Verdict:
        """The same through the command line: one line of error and an exit code, or a result on stdout."""
        assert source.command is not None
        target = self._lay_out(source, data, verdict.mutation if source.strangely_named else None)
        before = _contents(self._scratch)
        words = source.command(target)
        try:
            code, out, said = _command(words)
        except BaseException as err:
            if isinstance(err, KeyboardInterrupt):
                raise
            crash = f"{words[0]}: {type(err).__name__} at {_place(err)}"
            return Verdict(verdict.mutation, verdict.outcome, crash, traceback.format_exc())
        finding = _misbehaviour(code, out, said)
        if finding is None and code != ExitCode.DONE:
            if changed := _changes(before, _contents(self._scratch), inputs_only=source.name == "configuration"):
                finding, said = "files changed by a refusal", changed
        elif finding is None and verdict.outcome.startswith("refused") and source.sealed != "no":
            finding = "a command took what is refused elsewhere"
        if finding is not None:
            return Verdict(verdict.mutation, verdict.outcome, f"{words[0]}: {finding}", f"exit {code}\n{out}\n{said}")
        return verdict


def _misbehaviour(code: int, out: str, err: str) -> str | None:
    """What is wrong with how a command ended; None if nothing is."""
    if code == ExitCode.DONE:
        return None
    if code not in (ExitCode.BAD_INPUT, ExitCode.GATE_FAILED, ExitCode.UNAVAILABLE):
        return f"exit code {code}"
    last = err.rstrip("\n").rpartition("\n")[2]
    if "Traceback" in err or not last.startswith("error: "):
        return "no error in one line"
    return "a result besides an error" if out else None


def _command(words: list[object]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in this process; both streams are as strict as a terminal's."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=how) for how in ("strict", "backslashreplace")]
    before, sys.argv = sys.argv, ["eamdeploy", *map(str, words)]
    try:
        with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
            try:
                main()
                code = 0
            except SystemExit as stopped:
                code = int(stopped.code or 0)
    finally:
        sys.argv = before
    texts = []
    for stream in streams:
        stream.flush()
        raw = stream.detach()
        assert isinstance(raw, io.BytesIO)
        texts.append(raw.getvalue().decode(errors="replace"))
    return code, texts[0], texts[1]


def _contents(folder: Path) -> dict[str, str]:
    """A digest of every file below, by its place."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _changes(before: dict[str, str], after: dict[str, str], *, inputs_only: bool) -> str:
    """Which files are new, gone or other; empty for none. With `inputs_only`, outputs don't count."""
    places = [
        place
        for place in before.keys() | after.keys()
        if before.get(place) != after.get(place) and not (inputs_only and place.startswith(f"{OUT}/"))
    ]
    return ", ".join(sorted(places))


def _place(err: BaseException) -> str:
    """The last line of ours that the traceback goes through."""
    frames = traceback.extract_tb(err.__traceback__)
    ours = [frame for frame in frames if "eamdeploy" in Path(frame.filename).parts]
    last = (ours or frames)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """The list's one number is, after the block, the most memory that this process had resident inside it, in bytes."""
    peak = [0]
    Path("/proc/self/clear_refs").write_text("5")
    try:
        yield peak
    finally:
        status = Path("/proc/self/status").read_text()
        peak[0] = int(status.partition("VmHWM:")[2].split()[0]) << 10
