from __future__ import annotations

import threading
import time

import pytest

from eamdeploy.profiling.streams import measure_throughput


def test_streams_run_side_by_side() -> None:
    """Each call sleeps, so that two streams finish twice as many."""
    one, two = (measure_throughput([lambda: time.sleep(0.005)] * n, batch=3, seconds=0.2) for n in (1, 2))
    assert (one.streams, two.streams) == (1, 2)
    assert one.images % 3 == 0 and one.images_per_s == pytest.approx(one.images / one.seconds)
    assert 1.5 < two.images_per_s / one.images_per_s < 2.5
    assert 5 <= one.latency_p50_ms <= one.latency_p99_ms and one.seconds >= 0.2


def test_warm_up_is_not_counted_and_short_times_count_one_run() -> None:
    runs: list[int] = []
    measured = measure_throughput([lambda: runs.append(threading.get_ident())], batch=1, seconds=0)
    assert len(runs) == 2 and measured.images == 1


def test_a_stream_that_fails_ends_all() -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises((RuntimeError, threading.BrokenBarrierError)):
        measure_throughput([broken, lambda: time.sleep(0.001)], batch=1, seconds=5)
