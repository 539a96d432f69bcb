from __future__ import annotations

import io
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_models import CARD, build, make_frozen_model
from rich.console import Console

from eamdeploy.artifacts.files import digest_file
from eamdeploy.cli import show_profile
from eamdeploy.devices.base import DeviceState, Reading, SensorNotes
from eamdeploy.devices.machine import Machine, describe_machine
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import ConfigError, DeviceError, EngineError
from eamdeploy.profiling import fresh_process
from eamdeploy.profiling.fresh_process import Memory, measure_fresh, nvmap_bytes
from eamdeploy.profiling.inputs import random_images
from eamdeploy.profiling.power import measure_power
from eamdeploy.profiling.timing import Schedule
from eamdeploy.records.profile import Profile, summarize_card
from eamdeploy.stages import profile as profile_module
from eamdeploy.stages.profile import Extras, profile

FROZEN = make_frozen_model()
QUICK = Schedule(warmup_ms=0, min_seconds=0, min_runs=3, sittings=1)
LATENCY_ALONE = Extras(fresh=False, power=False)


def measure_memory(engine: Path) -> Memory:
    return measure_fresh(engine, threads=1, batch=1).memory


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


class Stopwatch:
    """A clock that only moves when an engine runs, by its own milliseconds."""

    def __init__(self, times_ms: dict[str, int]) -> None:
        self.times_ms, self.now_ns = times_ms, 0

    def __call__(self) -> int:
        return self.now_ns

    def open(self, path: Path, threads: int) -> Any:
        runner, step = open_runner(path, threads), self.times_ms[path.name] * 1_000_000
        infer = runner.infer

        def timed(images: Any) -> Any:
            self.now_ns += step
            return infer(images)

        runner.infer = timed  # type: ignore[method-assign]
        return runner


def test_profile_against_a_baseline(engine: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = foreign.with_name("twin.onnx")
    shutil.copy(foreign, twin)
    watch = Stopwatch({"twin.onnx": 30, engine.name: 10, foreign.name: 60})
    monkeypatch.setattr(profile_module, "open_runner", watch.open)
    schedule = Schedule(warmup_ms=0, min_seconds=0, min_runs=10, sittings=3)
    result = profile([engine, foreign], twin, threads=1, batch=2, schedule=schedule, extras=LATENCY_ALONE, clock=watch)
    assert result.baseline is not None and result.baseline.speed_up is None
    fast, slow = result.engines
    assert [p.latency.mean_ms for p in (result.baseline, fast, slow)] == [30, 10, 60]
    assert fast.speed_up is not None and slow.speed_up is not None
    assert (fast.speed_up.verdict, slow.speed_up.verdict) == ("faster", "slower")
    assert (fast.speed_up.median, slow.speed_up.median) == pytest.approx((3, 0.5))
    assert fast.latency.throughput_images_per_s == pytest.approx(200)
    assert (fast.engine, fast.backend, fast.digest) == (str(engine), "ort", digest_file(engine))
    assert fast.model is not None and fast.model.frozen_heads == 2 and fast.model.sparsity == 1.0
    assert fast.parity is not None and fast.parity.passed
    assert fast.settings["session.disable_quant_qdq"] == "1" and fast.provider == slow.provider == "cpu"
    assert slow.model is None and slow.parity is None and "session.disable_quant_qdq" not in slow.settings
    assert (result.threads, result.batch, result.min_runs, result.sittings) == (1, 2, 10, 3)
    assert fast.latency.runs == 12  # two rounds of two in each sitting, so that there are ten
    assert (fast.memory, fast.cold_start, fast.power, fast.split, fast.layer_ms, fast.throughput) == (None,) * 6
    assert (result.device_before.kind, result.device_after.kind) == ("cpu", "cpu")
    assert Profile.parse(result.model_dump_json(), "profile") == result


class Steady:
    """A sensor that always reads the same; readings are as many as there is time for."""

    source, total_rails, skipped = "steady", ("VDD_IN",), 0
    notes = SensorNotes(source="steady", left_out=3, left_out_example="FOO 12")

    def __enter__(self) -> Steady:
        self._start = time.monotonic_ns()
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def readings(self) -> list[Reading]:
        step = 1_000_000
        return [Reading(at, {"VDD_IN": 4000.0}, {"ram": 7}) for at in range(self._start, time.monotonic_ns(), step)]


class Board:
    """A device that is one degree warmer each time it is asked."""

    kind = "jetson"

    def __init__(self) -> None:
        self.degrees = 40.0

    def state(self) -> DeviceState:
        self.degrees += 1
        return DeviceState(kind="jetson", name="a board", temperatures_c={"gpu": self.degrees}, clocks_locked=True)

    def sensor(self, interval_s: float) -> Steady:
        return Steady()


def test_profile_on_a_device_with_sensors(engine: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "measure_power", partial(measure_power, idle_seconds=0.05))
    extras = Extras(fresh=False, streams=2, layers=True, power_seconds=0.1)
    result = profile([engine], foreign, threads=1, batch=2, device=Board(), schedule=QUICK, extras=extras)  # type: ignore[arg-type]
    assert (result.device_before.temperatures_c, result.device_after.temperatures_c) == ({"gpu": 41}, {"gpu": 42})
    for item in (result.baseline, *result.engines):
        assert item is not None and item.power is not None and item.power.mean_mw == pytest.approx(4000)
        assert item.power.energy_mj_per_image == pytest.approx(4000 / item.power.images_per_s)
        assert item.throughput is not None and item.throughput.streams == 2 and item.throughput.images % 2 == 0
        assert item.layer_ms is not None and len(item.layer_ms) > 3 and min(item.layer_ms.values()) >= 0
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(show_profile.profile(result))
    text = shown.export_text()
    assert result.sensor == Steady.notes
    assert "steady: 3 fields could not be read or are not known here and were left out, e.g. 'FOO 12'" in text
    for words in ("a board, clocks locked", "Power", "4000.0", "VDD_IN (steady)", "Throughput", "Slowest layers"):
        assert words in text
    assert Profile.parse(result.model_dump_json(), "profile") == result


class DyingBoard(Board):
    """A device that answers nothing any more after its first state, or not even that."""

    def __init__(self, answers: int, error: Exception) -> None:
        super().__init__()
        self.answers, self.error = answers, error

    def state(self) -> DeviceState:
        self.answers -= 1
        if self.answers < 0:
            raise self.error
        return super().state()

    def sensor(self, interval_s: float) -> Steady:
        raise self.error


@pytest.mark.parametrize("answers", [0, 1])
@pytest.mark.parametrize("error", [DeviceError("the driver does not answer any more"), OSError("a cable fell out")])
def test_device_that_stops_to_answer_takes_no_other_figure_away(
    engine: Path, foreign: Path, answers: int, error: Exception
) -> None:
    extras = Extras(fresh=False, layers=True)
    dying = DyingBoard(answers, error)
    result = profile([engine], foreign, threads=1, device=dying, schedule=QUICK, extras=extras)  # type: ignore[arg-type]
    for item in (result.baseline, *result.engines):
        assert item is not None and item.power is None
        assert item.latency.runs == 4 and item.layer_ms
    assert result.sensor == SensorNotes(source="jetson", failure=str(error))
    assert result.device_after.warnings == [f"its state could not be read: {error}"]
    assert (result.device_before.warnings == []) is (answers == 1)
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(show_profile.profile(result))
    text = " ".join(shown.export_text().split())
    assert f"power is missing or incomplete: {error}" in text and f"its state could not be read: {error}" in text


def test_profile_of_before_there_were_notes_of_sensors_can_be_read(engine: Path) -> None:
    result = profile([engine], threads=1, schedule=QUICK, extras=LATENCY_ALONE)
    assert result.sensor is None, "power was not asked for"
    older = result.model_dump(mode="json")
    del older["sensor"]
    assert Profile.parse(json.dumps(older), "profile") == result


def test_profile_of_one_engine_with_its_memory(engine: Path) -> None:
    result = profile([engine], threads=1, schedule=QUICK)
    assert result.baseline is None
    (only,) = result.engines
    assert only.speed_up is None and only.latency.runs == 4 and only.latency.min_ms > 0
    memory = only.memory
    assert memory is not None
    assert memory.engine_bytes == engine.stat().st_size
    assert memory.peak_rss_bytes >= memory.rss_bytes > 1 << 20
    assert memory.engine_peak_rss_bytes == memory.peak_rss_bytes - memory.baseline_rss_bytes
    assert memory.device_memory_bytes is None and memory.nvmap_bytes is None
    cold = only.cold_start
    assert (
        cold is not None and cold.import_ms > 50 and 0 < cold.first_inference_ms < cold.import_ms and cold.load_ms > 0
    )
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
    small, large = (measure_memory(path) for path in (engine, tmp_path / "grown.onnx"))
    assert large.engine_peak_rss_bytes - small.engine_peak_rss_bytes > ballast.nbytes // 2


def test_memory_does_not_count_the_parent_process(engine: Path) -> None:
    ballast = np.ones((32 << 20,), np.float32)  # 128 MiB in this process
    memory = measure_memory(engine)
    assert memory.engine_peak_rss_bytes < ballast.nbytes // 2


def test_failed_child_is_an_engine_error_with_its_words(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(
        EngineError, match=r"measuring .*bad\.onnx in a process of its own failed.*exit code 2.*can't load"
    ):
        measure_memory(path)


def test_hanging_child_is_stopped(engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hang = tmp_path / "hang.py"
    hang.write_text("import sys, time\nsys.stderr.write('loading'); sys.stderr.flush()\ntime.sleep(60)\n")
    monkeypatch.setattr(fresh_process, "_MODULE", "hang")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineError, match="an end within"):
        measure_fresh(engine, threads=1, batch=1, timeout_s=1.0)


def test_killed_child_is_told_apart(engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "dies.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(fresh_process, "_MODULE", "dies")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EngineError, match="killed, perhaps for want of memory"):
        measure_memory(engine)


def test_no_engine_and_wrong_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to profile"):
        profile([], threads=1)
    path = tmp_path / "fixed.onnx"
    onnx.save(FROZEN.to_onnx(batch=4), path)
    with pytest.raises(ConfigError, match=r"expected 4; got 1.*--batch 4"):
        profile([path], threads=1, schedule=QUICK)


def test_input_is_the_same_each_time_and_like_an_image(engine: Path) -> None:
    with open_runner(engine, threads=1) as runner:
        images = random_images(runner, 3)
        np.testing.assert_array_equal(images, random_images(runner, 3))
        assert images.shape == (3, 3, 8, 8) and images.dtype == np.float32
        assert 0.5 < images.std() < 2 and abs(images).max() <= 2
        with pytest.raises(ConfigError, match="at least 1"):
            random_images(runner, 0)


def test_memory_that_a_tegra_gpu_gave_out(tmp_path: Path) -> None:
    table = tmp_path / "clients"
    table.write_text(
        "CLIENT                        PROCESS      PID        SIZE\n"
        "user                           python3     2211     318652K\n"
        "user                              Xorg     1432       4220K\n"
        "total                                               322872K\n"
    )
    assert nvmap_bytes(table) == 322872 * 1024
    table.write_text("something else\n")
    assert nvmap_bytes(table) is None and nvmap_bytes(tmp_path / "absent") is None


def test_streams_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="number of streams"):
        Extras(streams=0)


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
