"""Memory and cold start of one engine, measured in a process of its own.

Run as a module it is that process: it loads the engine, runs it, and writes one JSON document to stdout.
"""

from __future__ import annotations

import argparse
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from eamdeploy.artifacts.onnx_files import digest_model, model_bytes
from eamdeploy.artifacts.records import Record
from eamdeploy.engines.registry import backend_of, load_backend, open_runner
from eamdeploy.errors import EamDeployError, EngineError
from eamdeploy.profiling.inputs import random_images

_MODULE = "eamdeploy.profiling.fresh_process"
_RUNS = 3  # arenas have grown to their size after the first
_STDERR_LINES = 5

T = TypeVar("T")


class Memory(Record):
    """Memory of a process that holds one engine.

    Attributes:
        engine_bytes: size of the engine file.
        baseline_rss_bytes: resident memory with Python and the runtime's library loaded, before the engine.
        peak_rss_bytes: the largest resident memory up to the last inference.
        engine_peak_rss_bytes: the difference: what the engine itself needed at its worst, loading included.
        rss_bytes: resident memory after the last inference.
        pss_bytes: the same with shared pages divided among their users; None where the system does not tell.
        device_memory_bytes: what the engine needs on its GPU to run, besides its weights; None for one without a GPU.
        available_drop_bytes: by how much less memory the whole machine had available; where GPU and processor share
            memory this holds all of the engine, but also what other programs did. None where the system does not tell.
        nvmap_bytes: memory that the Tegra GPU's driver gave out, to all programs, after the last inference; None
            elsewhere, and where only root may read it.
    """

    engine_bytes: int
    baseline_rss_bytes: int
    peak_rss_bytes: int
    engine_peak_rss_bytes: int
    rss_bytes: int
    pss_bytes: int | None
    device_memory_bytes: int | None
    available_drop_bytes: int | None
    nvmap_bytes: int | None


class ColdStart(Record):
    """The first inference of a fresh process; the engine file was read before, so it comes from the system's cache.

    Attributes:
        import_ms: Python and the runtime's library, loaded and ready.
        load_ms: from the file to an engine that is ready to run.
        first_inference_ms: the first synchronous call.
    """

    import_ms: float
    load_ms: float
    first_inference_ms: float


class FreshProcess(Record):
    """What a process of its own tells about an engine."""

    memory: Memory
    cold_start: ColdStart


def measure_fresh(engine: Path, *, threads: int | None, batch: int, timeout_s: float = 600.0) -> FreshProcess:
    """Memory and cold start of a fresh process that loads the engine and runs it on `batch` images.

    Args:
        threads: as for `open_runner`.

    Raises:
        EngineError: the process failed or did not end in time; has the end of its stderr.
    """
    command = [sys.executable, "-m", _MODULE, str(engine), "--batch", str(batch)]
    if threads is not None:
        command += ["--threads", str(threads)]
    what = f"measuring {engine} in a process of its own failed"
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as err:
        raise EngineError(what, expected=f"an end within {timeout_s:g} s", got=_tail(err.stderr)) from err
    if done.returncode != 0:
        raise EngineError(what, got=f"{_exit(done.returncode)}: {_tail(done.stderr)}")
    return FreshProcess.parse(done.stdout, f"the output of the process that ran {engine}")


def measure_here(engine: Path, threads: int | None, batch: int) -> FreshProcess:
    """What this process needs to run the engine; means little unless the process is fresh."""
    load_backend(backend_of(engine))
    import_ms = 1e3 * (time.time() - psutil.Process().create_time())  # the kernel tells it to 10 ms
    digest_model(engine)  # now it is in the system's cache, for every engine that is compared
    baseline, _ = _resident_bytes()
    available = _available_bytes()
    runner, load_ms = _timed(lambda: open_runner(engine, threads, verify=False))  # a check is no part of it
    with runner:
        images = random_images(runner, batch)
        _, first_ms = _timed(lambda: runner.infer(images))
        for _ in range(_RUNS - 1):
            runner.infer(images)
        rss, peak = _resident_bytes()
        left = _available_bytes()
        memory = Memory(
            engine_bytes=model_bytes(engine),
            baseline_rss_bytes=baseline,
            peak_rss_bytes=peak,
            engine_peak_rss_bytes=max(peak - baseline, 0),
            rss_bytes=rss,
            pss_bytes=_kilobyte_fields(Path("/proc/self/smaps_rollup")).get("Pss"),
            device_memory_bytes=runner.device_memory_bytes,
            available_drop_bytes=None if available is None or left is None else available - left,
            nvmap_bytes=nvmap_bytes(),
        )
    return FreshProcess(
        memory=memory, cold_start=ColdStart(import_ms=import_ms, load_ms=load_ms, first_inference_ms=first_ms)
    )


def nvmap_bytes(clients: Path = Path("/sys/kernel/debug/nvmap/iovmm/clients")) -> int | None:
    """Memory that a Tegra GPU's driver has given out, or None where its table can't be read."""
    try:
        found = re.search(r"^total\s+(\d{1,15})([KMG]?)\b", clients.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    """What the call returns, and how many milliseconds it took."""
    start = time.perf_counter_ns()
    result = call()
    return result, (time.perf_counter_ns() - start) / 1e6


def _available_bytes() -> int | None:
    return _kilobyte_fields(Path("/proc/meminfo")).get("MemAvailable")


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
    """Measures in this process and writes the `FreshProcess` to stdout; returns the exit code."""
    parser = argparse.ArgumentParser(prog=_MODULE)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, required=True)
    options = parser.parse_args(arguments)
    try:
        measured = measure_here(options.engine, options.threads, options.batch)
    except EamDeployError as err:
        sys.stderr.write(f"{err}\n")
        return int(err.exit_code)
    sys.stdout.write(measured.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
