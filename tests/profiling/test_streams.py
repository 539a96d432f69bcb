from __future__ import annotations

import threading
import time

import pytest

from eamdeploy.profiling.streams import measure_throughput


@pytest.mark.parametrize("streams", [1, 3])
def test_streams_run_side_by_side(streams: int) -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def call() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.005)
        with lock:
            running[0] -= 1

    measured = measure_throughput([call] * streams, batch=3, seconds=0.1)
    assert measured.streams == most[0] == streams
    assert measured.images % 3 == 0 and measured.images_per_s == pytest.approx(measured.images / measured.seconds)
    assert 5 <= measured.latency_p50_ms <= measured.latency_p99_ms and measured.seconds >= 0.1


def test_warm_up_is_not_counted_and_short_times_count_one_run() -> None:
    runs: list[int] = []
    measured = measure_throughput([lambda: runs.append(threading.get_ident())], batch=1, seconds=0)
    assert len(runs) == 2 and measured.images == 1


def test_a_stream_that_fails_ends_all() -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises((RuntimeError, threading.BrokenBarrierError)):
        measure_throughput([broken, lambda: time.sleep(0.001)], batch=1, seconds=5)
