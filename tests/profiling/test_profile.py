from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from engine_models import CARD, make_frozen_model

from eamdeploy.artifact import digest_file
from eamdeploy.engines.ort import build
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import ConfigError, EngineError
from eamdeploy.profiling import memory as memory_module
from eamdeploy.profiling.inputs import random_images
from eamdeploy.profiling.machine import Machine, describe_machine
from eamdeploy.profiling.memory import measure_memory
from eamdeploy.profiling.profile import Profile, profile, summarize_card

FROZEN = make_frozen_model()
QUICK = {"warmup_ms": 0.0, "min_seconds": 0.0}


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    onnx.save(FROZEN.to_onnx(), tmp_path / "eam.onnx")
    output = tmp_path / "eam.ort.onnx"
    build(tmp_path / "eam.onnx", output, threads=1, reference=FROZEN.reference())
    return output


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    path = tmp_path / "stock.onnx"
    onnx.save(FROZEN.to_onnx(card=None), path)
    return path


class StepClock:
    """Each call that is timed seems to take the next of `times_ms`, over and over."""

    def __init__(self, *times_ms: int) -> None:
        self.times_ms, self.reads, self.now_ns = times_ms, 0, 0

    def __call__(self) -> int:
        if self.reads % 2:
            self.now_ns += self.times_ms[self.reads // 2 % len(self.times_ms)] * 1_000_000
        self.reads += 1
        return self.now_ns


def test_profile_against_a_baseline(engine: Path, foreign: Path) -> None:
    result = profile(
        [engine, foreign],
        foreign,
        threads=1,
        batch=2,
        warmup_ms=0,
        min_seconds=0,
        min_runs=10,
        with_memory=False,
        clock=StepClock(30, 10, 60),
    )
    assert result.baseline is not None and result.baseline.speed_up is None
    fast, slow = result.engines
    assert [p.latency.mean_ms for p in (result.baseline, fast, slow)] == [30, 10, 60]
    assert fast.speed_up is not None and fast.speed_up.median == 3
    assert slow.speed_up is not None and slow.speed_up.median == 0.5
    assert fast.latency.throughput_images_per_s == pytest.approx(200)
    assert (fast.engine, fast.backend, fast.digest) == (str(engine), "ort", digest_file(engine))
    assert fast.model is not None and fast.model.frozen_heads == 2 and fast.model.sparsity == 1.0
    assert fast.parity is not None and fast.parity.passed
    assert fast.settings["session.disable_quant_qdq"] == "1"
    assert slow.model is None and slow.parity is None and "session.disable_quant_qdq" not in slow.settings
    assert (result.threads, result.batch, result.min_runs) == (1, 2, 10)
    assert Profile.parse(result.model_dump_json(), "profile") == result


def test_profile_of_one_engine_with_its_memory(engine: Path) -> None:
    result = profile([engine], threads=1, min_runs=3, **QUICK)
    assert result.baseline is None
    (only,) = result.engines
    assert only.speed_up is None and only.latency.runs == 3 and only.latency.min_ms > 0
    memory = only.memory
    assert memory is not None
    assert memory.engine_bytes == engine.stat().st_size
    assert memory.peak_rss_bytes >= memory.rss_bytes > 1 << 20
    assert memory.engine_peak_rss_bytes == memory.peak_rss_bytes - memory.baseline_rss_bytes
    if Path("/proc/self/smaps_rollup").exists():
        assert memory.pss_bytes is not None and 0 < memory.pss_bytes <= memory.rss_bytes


def test_memory_grows_with_the_engine(tmp_path: Path, engine: Path) -> None:
    grown = onnx.load(engine)
    ballast = np.ones((16 << 20,), np.float32)  # 64 MiB
    grown.graph.initializer.append(onnx.numpy_helper.from_array(ballast, "ballast"))
    grown.graph.node.append(onnx.helper.make_node("ReduceSum", ["ballast"], ["sum"], keepdims=0))
    grown.graph.node.append(onnx.helper.make_node("Mul", ["image", "sum"], ["scaled"]))
    next(node for node in grown.graph.node if node.op_type == "Conv").input[0] = "scaled"
    grown.graph.node.insert(0, grown.graph.node.pop())
    grown.graph.node.insert(0, grown.graph.node.pop())
    onnx.save(grown, tmp_path / "grown.onnx")
    small, large = (measure_memory(path, threads=1, batch=1) for path in (engine, tmp_path / "grown.onnx"))
    assert large.engine_peak_rss_bytes - small.engine_peak_rss_bytes > ballast.nbytes // 2


def test_memory_does_not_count_the_parent_process(engine: Path) -> None:
    ballast = np.ones((32 << 20,), np.float32)  # 128 MiB in this process
    memory = measure_memory(engine, threads=1, batch=1)
    assert memory.engine_peak_rss_bytes < ballast.nbytes // 2


def test_failed_child_is_an_engine_error_with_its_words(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(EngineError, match=r"memory of .*bad\.onnx failed.*exit code 2.*can't load"):
        measure_memory(path, threads=1, batch=1)


def test_hanging_child_is_stopped(engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hang = tmp_path / "hang.py"
    hang.write_text("import sys, time\nsys.stderr.write('loading'); sys.stderr.flush()\ntime.sleep(60)\n")
    monkeypatch.setattr(memory_module, "_MODULE", "hang")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineError, match="an end within"):
        measure_memory(engine, threads=1, batch=1, timeout_s=1.0)


def test_killed_child_is_told_apart(engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(memory_module, "_MODULE", "dies")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineError, match="killed, perhaps for want of memory"):
        measure_memory(engine, threads=1, batch=1)


def test_no_engine_and_wrong_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to profile"):
        profile([], threads=1)
    path = tmp_path / "fixed.onnx"
    onnx.save(FROZEN.to_onnx(batch=4), path)
    with pytest.raises(ConfigError, match=r"expected 4; got 1.*--batch 4"):
        profile([path], threads=1, with_memory=False, **QUICK)


def test_input_is_the_same_each_time_and_like_an_image(engine: Path) -> None:
    with open_runner(engine, threads=1) as runner:
        images = random_images(runner, 3)
        np.testing.assert_array_equal(images, random_images(runner, 3))
        assert images.shape == (3, 3, 8, 8) and images.dtype == np.float32
        assert 0.5 < images.std() < 2 and abs(images).max() <= 2
        with pytest.raises(ConfigError, match="at least 1"):
            random_images(runner, 0)


def test_summary_of_an_unfrozen_card() -> None:
    summary = summarize_card(CARD.model_copy(update={"freezing": None}))
    assert (summary.sparsity, summary.frozen_heads, summary.bits, summary.score) == (0.0, 0, None, None)


def test_machine_is_described(tmp_path: Path) -> None:
    machine = describe_machine()
    assert machine.cores >= machine.usable_cores >= 1
    assert machine.memory_bytes > 1 << 28
    assert machine.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert Machine.parse(machine.model_dump_json(), "machine") == machine


def test_clock_of_the_machine_where_the_kernel_tells_it(tmp_path: Path) -> None:
    (tmp_path / "scaling_cur_freq").write_text("1420800\n")
    (tmp_path / "scaling_max_freq").write_text("<unknown>\n")
    (tmp_path / "scaling_governor").write_text("schedutil\n")
    machine = describe_machine(cpufreq=tmp_path)
    assert (machine.frequency_mhz, machine.max_frequency_mhz, machine.governor) == (1420.8, None, "schedutil")
    assert describe_machine(cpufreq=tmp_path / "absent").governor is None
