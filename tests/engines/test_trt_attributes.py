"""Our table of attributes is what we use, and what the real modules of TensorRT have.

The fakes are held against the real modules too, where those can be looked at: `make trt-attributes` fetches them.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import pytest
from fake_tensorrt import GENERATIONS
from real_tensorrt import RELEASES, Release, attributes, find_python310, folder_of
from trt_workshop import FROZEN, Workshop, make_workshop, named, with_int8_activations, with_softmax

from eamdeploy.artifacts import onnx_files
from eamdeploy.engines.registry import open_runner
from eamdeploy.engines.trt.api import API, missing_attributes, require_api
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.engines.trt.run import TrtRunner
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import EamDeployError, EngineError

REAL = Path(os.environ.get("EAMDEPLOY_TRT_REAL") or Path(__file__).parents[2] / "build" / "trt-attributes")


def version_of(generation: str) -> TrtVersion:
    return TrtVersion.parse(fake_tensorrt.make_machine(generation).trt.__version__)


def use_everything(workshop: Workshop) -> None:
    """Everything that we do with TensorRT is done once."""
    workshop.save(named(with_softmax(FROZEN.to_onnx())))
    every = {"workspace_bytes": 1 << 30, "builder_level": 1, "timing_cache": workshop.engine.with_name("t.cache")}
    compatible = {"version_compatible": True, "hardware_compatible": True}
    asked: list[dict[str, Any]] = [
        {"precision": "fp16", "layer_profile": True, **every, **compatible},
        {"precision": "fp16", **every},  # a second time with the same timing cache
        {"precision": "bf16"},
        {},
    ]
    for options in asked:
        try:
            workshop.build(TrtOptions(**options), check=False)
        except EamDeployError as err:
            assert "BF16" in str(err)
    workshop.save(named(with_int8_activations(FROZEN.to_onnx())))
    workshop.build(TrtOptions(int8=True), check=False)
    with open_runner(workshop.engine) as runner:
        assert isinstance(runner, TrtRunner)
        runner.split(np.zeros((1, 3, 8, 8), np.float32), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_files, "ONE_FILE_BYTES", 1000)  # a model of two files
        workshop.build(TrtOptions(int8=True), check=False)
    workshop.save(FROZEN.to_onnx(card=None))
    with pytest.raises(EngineError, match="UINT8"):
        workshop.build(check=False)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_table_lists_what_is_used_and_nothing_else(
    generation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = make_workshop(tmp_path, monkeypatch, generation)
    monkeypatch.setattr("eamdeploy.engines.trt.backend.require_api", lambda *_: None)  # it touches all of the table
    use_everything(workshop)
    used = {path for path in workshop.machine.trt.fake.touched if "." in path and not path.startswith("Logger.")}
    wanted = {path for path, span in API.items() if span.holds(version_of(generation))}
    called_by_tensorrt = {"IProfiler.report_layer_time"}  # we define it, the library calls it
    assert used - called_by_tensorrt == wanted - called_by_tensorrt
    assert called_by_tensorrt <= wanted


@pytest.mark.parametrize("generation", GENERATIONS)
def test_fakes_have_what_the_table_says_and_lack_what_was_removed(generation: str) -> None:
    machine, version = fake_tensorrt.make_machine(generation), version_of(generation)
    assert list(missing_attributes(machine.trt, version)) == []
    removed = {
        "8.6": {"BuilderFlag.BF16", "ICudaEngine.device_memory_size_v2"},
        "10.3": set(),
        "11.4": {
            "NetworkDefinitionCreationFlag.EXPLICIT_BATCH",
            *(f"BuilderFlag.{name}" for name in ("FP16", "INT8", "BF16", "OBEY_PRECISION_CONSTRAINTS")),
            *("ILayer.precision", "ILayer.set_output_type", "ICudaEngine.device_memory_size"),
        },
    }[generation]
    for path in removed:
        owner, _, name = path.partition(".")
        with pytest.raises(AttributeError):
            getattr(getattr(machine.trt, owner), name)


def test_module_that_lacks_something_is_an_error_with_its_name() -> None:
    machine = fake_tensorrt.make_machine("11.4")
    with pytest.raises(EngineError, match=r"TensorRT 10\.3\.0 here is not complete.*BuilderFlag\.FP16.*from 8\.5 to"):
        require_api(machine.trt, TrtVersion.parse("10.3.0"))


@pytest.mark.parametrize("name", ["cuda.bindings.runtime", "cuda.cudart"])
def test_cuda_python_has_what_we_call(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        real = importlib.import_module(name)
    except ImportError as err:
        pytest.skip(f"{name} can't be imported here: {err}")
    workshop = make_workshop(tmp_path, monkeypatch)
    workshop.build(TrtOptions(cuda_graph=True, layer_profile=True))
    with open_runner(workshop.engine) as runner:
        assert isinstance(runner, TrtRunner)
        runner.split(np.zeros((1, 3, 8, 8), np.float32), 1)
    called = set(workshop.machine.cuda.calls)
    assert len(called) > 15
    assert [each for each in called if not hasattr(real, each)] == []
    for enum in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
        assert [
            each for each in vars(getattr(workshop.machine.cuda, enum)) if not hasattr(getattr(real, enum), each)
        ] == []


# --- the real modules ------------------------------------------------------------------------------------------------


@pytest.fixture(params=RELEASES, ids=lambda release: release.generation)
def real(request: pytest.FixtureRequest) -> tuple[Release, set[str]]:
    """A release and all attributes of its real module."""
    release: Release = request.param
    python = find_python310()
    if python is None or not (folder_of(REAL, release) / "done").exists():
        pytest.skip(
            f"{release.requirement} is not prepared in {REAL}: run `make trt-attributes` (network, CPython 3.10)"
        )
    found = attributes(REAL, release, python)
    return release, {f"{name}.{each}" for name, names in found.items() for each in names}


def test_real_module_has_every_attribute_that_we_use(real: tuple[Release, set[str]]) -> None:
    release, have = real
    version = TrtVersion.parse(release.requirement.partition("==")[2])
    assert [path for path, span in API.items() if span.holds(version) and path not in have] == []


def attributes_of_fake(generation: str) -> set[str]:
    module = fake_tensorrt.make_machine(generation).trt
    return {
        f"{name}.{each}"
        for name, value in vars(module).items()
        if isinstance(value, type)
        for klass in value.__mro__
        for each in vars(klass)
        if not each.startswith("_")
    }


def test_fake_has_nothing_that_the_real_module_lacks_nor_lacks_what_another_generation_has(
    real: tuple[Release, set[str]],
) -> None:
    release, have = real
    fake = attributes_of_fake(release.generation)
    assert fake - have == set()
    elsewhere = set().union(*(attributes_of_fake(generation) for generation in GENERATIONS))
    assert (elsewhere - fake) & have == set()
