"""Memory of one engine, measured in a process of its own.

Run as a module it is that process: it loads the engine, runs it, and writes one JSON document to stdout.
"""

from __future__ import annotations

import argparse
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from eamdeploy.artifact import Record
from eamdeploy.engines.registry import backend_of, load_backend, open_runner
from eamdeploy.errors import EamDeployError, EngineError
from eamdeploy.profiling.inputs import random_images

_MODULE = "eamdeploy.profiling.memory"
_RUNS = 3  # arenas have grown to their size after the first
_STDERR_LINES = 5


class Memory(Record):
    """Memory of a process that holds one engine.

    Attributes:
        engine_bytes: size of the engine file.
        baseline_rss_bytes: resident memory with Python and the runtime's library loaded, before the engine.
        peak_rss_bytes: the largest resident memory up to the last inference.
        engine_peak_rss_bytes: the difference: what the engine itself needed at its worst, loading included.
        rss_bytes: resident memory after the last inference.
        pss_bytes: the same with shared pages divided among their users; None where the system does not tell.
    """

    engine_bytes: int
    baseline_rss_bytes: int
    peak_rss_bytes: int
    engine_peak_rss_bytes: int
    rss_bytes: int
    pss_bytes: int | None


def measure_memory(engine: Path, *, threads: int | None, batch: int, timeout_s: float = 600.0) -> Memory:
    """Memory of a fresh process that loads the engine and runs it on `batch` images.

    Args:
        threads: as for `open_runner`.

    Raises:
        EngineError: the process failed or did not end in time; has the end of its stderr.
    """
    command = [sys.executable, "-m", _MODULE, str(engine), "--batch", str(batch)]
    if threads is not None:
        command += ["--threads", str(threads)]
    what = f"measuring the memory of {engine} failed"
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as err:
        raise EngineError(what, expected=f"an end within {timeout_s:g} s", got=_tail(err.stderr)) from err
    if done.returncode != 0:
        raise EngineError(what, got=f"{_exit(done.returncode)}: {_tail(done.stderr)}")
    return Memory.parse(done.stdout, f"the output of the process that ran {engine}")


def measure_here(engine: Path, threads: int | None, batch: int) -> Memory:
    """Memory of this process before and after it runs the engine; means little unless the process is fresh."""
    load_backend(backend_of(engine))
    baseline, _ = _resident_bytes()
    with open_runner(engine, threads) as runner:
        images = random_images(runner, batch)
        for _ in range(_RUNS):
            runner.infer(images)
        rss, peak = _resident_bytes()
        return Memory(
            engine_bytes=engine.stat().st_size,
            baseline_rss_bytes=baseline,
            peak_rss_bytes=peak,
            engine_peak_rss_bytes=max(peak - baseline, 0),
            rss_bytes=rss,
            pss_bytes=_kilobyte_fields(Path("/proc/self/smaps_rollup")).get("Pss"),
        )


def _resident_bytes() -> tuple[int, int]:
    """Resident memory of this process now and at its peak.

    `VmHWM` starts anew in each program; `ru_maxrss` on Linux also counts the parent's memory at the fork.
    """
    fields = _kilobyte_fields(Path("/proc/self/status"))
    if {"VmRSS", "VmHWM"} <= fields.keys():
        return fields["VmRSS"], max(fields["VmRSS"], fields["VmHWM"])  # the kernel counts the two a little apart
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def _kilobyte_fields(path: Path) -> dict[str, int]:
    """Bytes by name of the `Name:  123 kB` lines; empty where the system has no such file."""
    try:
        text = path.read_text()
    except OSError:
        return {}
    return {name: 1024 * int(count) for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def _exit(code: int) -> str:
    """How the process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    if -code == signal.SIGKILL:
        return "killed, perhaps for want of memory"
    return f"killed by signal {-code}"


def _tail(stderr: bytes | None) -> str:
    lines = (stderr or b"").decode(errors="replace").strip().splitlines()
    return " | ".join(lines[-_STDERR_LINES:]) or "nothing on stderr"


def main(arguments: list[str]) -> int:
    """Measures in this process and writes the `Memory` to stdout; returns the exit code."""
    parser = argparse.ArgumentParser(prog=_MODULE)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, required=True)
    options = parser.parse_args(arguments)
    try:
        memory = measure_here(options.engine, options.threads, options.batch)
    except EamDeployError as err:
        sys.stderr.write(f"{err}\n")
        return int(err.exit_code)
    sys.stdout.write(memory.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
