"""Engines run, and are refused where they don't belong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fake_tensorrt
import numpy as np
import onnx
import pytest
from engine_models import SIZE
from fake_tensorrt.cuda import Code
from numpy.typing import NDArray
from trt_workshop import FROZEN, Workshop, make_workshop, named

from eamdeploy.engines.manifest import manifest_path
from eamdeploy.engines.registry import open_runner
from eamdeploy.engines.trt.device import Gpu
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.engines.trt.run import TrtRunner
from eamdeploy.errors import ConfigError, DeviceError, EngineError

THOR = Gpu("Thor", "11.0", "13.0")


def images(n: int) -> NDArray[np.float32]:
    return np.random.default_rng(n).uniform(-2, 2, (n, 3, SIZE, SIZE)).astype(np.float32)


def open_trt(engine: Path) -> TrtRunner:
    runner = open_runner(engine)
    assert isinstance(runner, TrtRunner)
    return runner


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return make_workshop(tmp_path, monkeypatch)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("graph", [False, True], ids=["plain", "cuda graph"])
def test_any_number_of_images_runs_filled_up_and_in_parts(workshop: Workshop, n: int, graph: bool) -> None:
    workshop.build(TrtOptions(min_batch=2, max_batch=4, cuda_graph=graph))
    with open_trt(workshop.engine) as runner:
        for _ in range(2):
            np.testing.assert_allclose(runner.infer(images(n)), FROZEN.forward(images(n)), atol=1e-4)
        assert runner.opt_batch == 2


def test_buffers_are_allocated_once_and_everything_is_released(workshop: Workshop) -> None:
    workshop.build(TrtOptions(cuda_graph=True))
    cuda = workshop.machine.cuda
    with open_trt(workshop.engine) as runner:
        held = set(cuda.memory)
        assert len(held) == 4
        cuda.calls.clear()
        for n in (1, 3, 1, 3):
            runner.infer(images(n))
        assert set(cuda.memory) == held
        assert cuda.calls.count("cudaGraphInstantiateWithFlags") == 2 and cuda.calls.count("cudaGraphLaunch") == 4
        runner.split(images(1), runs=2, warmup=0)
        runner.layer_times(images(1))
    assert cuda.memory == {} and cuda.alive == set()
    runner.close()


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "cuda graph"])
def test_split_tells_where_the_time_goes(workshop: Workshop, graph: bool) -> None:
    workshop.build(TrtOptions(cuda_graph=graph))
    with open_trt(workshop.engine) as runner:
        split = runner.split(images(3), runs=5)
        assert (split.runs, split.batch, split.cuda_graph) == (5, 3, graph)
        assert min(split.copy_in_ms, split.copy_out_ms) >= 0 and split.compute_ms > 0
        assert split.enqueue_ms >= split.compute_ms  # the fake computes while it is asked
        with pytest.raises(ConfigError, match="at most 8 images"):
            runner.split(images(9), runs=5)


def test_layer_times_are_means_over_the_runs_alone(workshop: Workshop) -> None:
    workshop.build()
    with open_trt(workshop.engine) as runner:
        assert runner.layer_times(images(2), runs=3, warmup=4) == {"first": 0.25, "second": 0.5}
        np.testing.assert_allclose(runner.infer(images(2)), FROZEN.forward(images(2)), atol=1e-4)


def test_closed_runner_measures_nothing(workshop: Workshop) -> None:
    workshop.build()
    with open_trt(workshop.engine) as runner:
        pass
    for call in (lambda: runner.split(images(1), 1), lambda: runner.layer_times(images(1))):
        with pytest.raises(EngineError, match="is closed"):
            call()


def test_failure_while_running_is_told_with_its_shape(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from fake_tensorrt.common import IExecutionContext

    workshop.build()
    with open_trt(workshop.engine) as runner:
        context = type(runner._context)
        assert context.__name__ == IExecutionContext.__name__
        monkeypatch.setattr(context, "execute_async_v3", lambda self, stream: False)
        with pytest.raises(EngineError, match=r"failed to run \S*eam\.plan on \[1, 3, 8, 8\]"):
            runner.infer(images(1))


def test_cuda_failure_is_told_by_its_name(workshop: Workshop) -> None:
    workshop.build()
    with open_trt(workshop.engine) as runner:
        workshop.machine.cuda.failing["cudaMemcpyAsync"] = Code(700, "cudaErrorIllegalAddress")
        with pytest.raises(EngineError, match="cudaMemcpyAsync failed: cudaErrorIllegalAddress"):
            runner.infer(images(1))
        workshop.machine.cuda.failing.clear()


def test_too_little_memory_to_run_is_told_and_nothing_leaks(workshop: Workshop) -> None:
    workshop.build()
    workshop.machine.trt.fake.memory_short = True
    with pytest.raises(EngineError, match=r"can't run \S*eam\.plan: out of memory"):
        open_runner(workshop.engine)
    workshop.machine.trt.fake.memory_short = False
    for name in ("cudaStreamCreateWithFlags", "cudaMallocHost", "cudaMalloc"):
        workshop.machine.cuda.failing[name] = Code(2, "cudaErrorMemoryAllocation")
        with pytest.raises(DeviceError, match=rf"{name} failed"):
            open_runner(workshop.engine)
        workshop.machine.cuda.failing.clear()
        assert workshop.machine.cuda.memory == {} and workshop.machine.cuda.alive == set()


# --- engines that belong elsewhere -----------------------------------------------------------------------------------


def move(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, generation: str = "10.3", gpu: Gpu | None = None) -> None:
    """The workshop's files are now on another machine."""
    fake_tensorrt.install(fake_tensorrt.make_machine(generation, gpu=gpu or fake_tensorrt.GPU), monkeypatch)


@pytest.mark.parametrize(("generation", "version"), [("8.6", r"8\.6\.2\.3"), ("11.4", r"11\.4\.0\.106")])
def test_engine_of_another_version_is_refused_with_both_named(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, generation: str, version: str
) -> None:
    workshop.build()
    move(workshop, monkeypatch, generation)
    with pytest.raises(
        EngineError, match=rf"eam\.plan was built for another TensorRT; expected .*10\.3\.0; got {version}"
    ):
        open_runner(workshop.engine)
    manifest_path(workshop.engine).unlink()  # then TensorRT says it
    with pytest.raises(
        EngineError, match=rf"can't load \S*eam\.plan: .*expecting library version {version} got 10\.3\.0"
    ):
        open_runner(workshop.engine)


def test_engine_of_another_gpu_is_refused_with_both_named(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.build()
    move(workshop, monkeypatch, gpu=THOR)
    with pytest.raises(EngineError, match=r"another GPU; expected Orin \(compute capability 8\.7\); got Thor.*11\.0"):
        open_runner(workshop.engine)


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [("8.6", "10.3", True), ("10.3", "11.4", True), ("8.6", "11.4", False), ("10.3", "8.6", False)],
)
def test_version_compatible_engine_runs_on_the_next_major_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: str, here: str, runs: bool
) -> None:
    workshop = make_workshop(tmp_path, monkeypatch, built)
    workshop.build(TrtOptions(version_compatible=True))
    move(workshop, monkeypatch, here)
    if runs:
        with open_runner(workshop.engine) as runner:
            assert runner.infer(images(1)).shape == (1, 5)
    else:
        with pytest.raises(EngineError, match="another TensorRT"):
            open_runner(workshop.engine)


def test_hardware_compatible_engine_runs_from_ampere(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.build(TrtOptions(hardware_compatible=True))
    move(workshop, monkeypatch, gpu=THOR)
    with open_runner(workshop.engine) as runner:
        assert runner.infer(images(1)).shape == (1, 5)
    move(workshop, monkeypatch, gpu=replace(THOR, name="Xavier", compute_capability="7.2"))
    with pytest.raises(EngineError, match=r"another GPU.*Xavier"):
        open_runner(workshop.engine)


def test_foreign_engine_of_this_machine_runs_without_a_manifest(workshop: Workshop) -> None:
    workshop.build()
    manifest_path(workshop.engine).unlink()
    foreign = workshop.engine.rename(workshop.engine.with_suffix(".engine"))
    with open_runner(foreign) as runner:
        assert runner.card is None and dict(runner.settings) == {}
        np.testing.assert_allclose(runner.infer(images(2)), FROZEN.forward(images(2)), atol=1e-4)


@pytest.mark.parametrize("data", [b"", b"no engine at all"], ids=["empty", "foreign"])
def test_file_that_is_no_engine_is_refused_in_one_line(workshop: Workshop, data: bytes) -> None:
    workshop.engine.write_bytes(data)
    with pytest.raises(EngineError, match=r"can't load \S*eam\.plan: Magic tag does not match.*build-trt") as caught:
        open_runner(workshop.engine)
    assert "\n" not in str(caught.value)


def test_engine_with_an_input_that_is_no_image_is_refused(workshop: Workshop) -> None:
    workshop.build()
    manifest_path(workshop.engine).unlink()
    header, _, data = workshop.engine.read_bytes().partition(b"\n")
    model = onnx.load_model_from_string(data)
    del model.graph.input[0].type.tensor_type.shape.dim[0]
    workshop.engine.write_bytes(header + b"\n" + model.SerializeToString())
    with pytest.raises(EngineError, match=r"input or output that can't be used.*\[3, 8, 8\]"):
        open_runner(workshop.engine)


def test_engine_with_two_outputs_is_no_classifier(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.save(named(FROZEN.to_onnx()))
    workshop.build()
    engine = workshop.machine.trt.ICudaEngine
    monkeypatch.setattr(engine, "get_tensor_mode", lambda self, name: None)
    with pytest.raises(EngineError, match="0 inputs and 2 outputs"):
        open_runner(workshop.engine)
