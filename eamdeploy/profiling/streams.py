"""Throughput with several inferences at once, each stream with an engine of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

from eamdeploy.artifacts.records import Record
from eamdeploy.profiling.timing import Call, Clock


class Throughput(Record):
    """Images per second while `streams` inferences run side by side.

    Attributes:
        images: all that were finished in `seconds`.
        latency_p50_ms, latency_p99_ms: of one inference meanwhile.
    """

    streams: int
    images: int
    seconds: float
    images_per_s: float
    latency_p50_ms: float
    latency_p99_ms: float


def measure_throughput(
    calls: Sequence[Call], *, batch: int, seconds: float, clock: Clock = time.perf_counter_ns
) -> Throughput:
    """Every call is repeated in a thread of its own for so long, at least once; all begin together.

    Args:
        calls: one for each stream, each of `batch` images; they must not share what can't be shared.
    """
    together = Barrier(len(calls))
    with ThreadPoolExecutor(len(calls)) as pool:
        runs = list(pool.map(lambda call: _repeat(call, together, seconds, clock), calls))
    start, end = min(run[0] for run in runs), max(run[1] for run in runs)
    times_ms = np.concatenate([run[2] for run in runs]) / 1e6
    elapsed = (end - start) / 1e9
    p50, p99 = (float(p) for p in np.percentile(times_ms, [50, 99]))
    images = batch * len(times_ms)
    return Throughput(
        streams=len(calls),
        images=images,
        seconds=elapsed,
        images_per_s=images / elapsed,
        latency_p50_ms=p50,
        latency_p99_ms=p99,
    )


def _repeat(call: Callable[[], object], together: Barrier, seconds: float, clock: Clock) -> tuple[int, int, list[int]]:
    """Start, end and the times of the runs, in nanoseconds; the first run is not counted."""
    try:
        call()
    except BaseException:
        together.abort()  # the others would wait for ever
        raise
    together.wait()
    times: list[int] = []
    start = now = clock()
    while not times or now - start < seconds * 1e9:
        call()
        before, now = now, clock()
        times.append(now - before)
    return start, now, times
