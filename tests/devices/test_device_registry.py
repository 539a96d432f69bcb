from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fake_jetson import make_board
from fake_nvml import FakeGpu

from eamdeploy.devices.registry import DEVICES, ROOT_VARIABLE, find_device, open_device
from eamdeploy.errors import ConfigError, DeviceError, MissingDependency


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without any board or GPU."""
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_every_kind_opens_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_board(tmp_path, tmp_path / "bin", "jetpack6")
    monkeypatch.setitem(sys.modules, "pynvml", FakeGpu().module())
    for kind in DEVICES:
        assert open_device(kind).kind == kind


def test_what_is_not_here_does_not_open() -> None:
    with pytest.raises(DeviceError, match="no Jetson"):
        open_device("jetson")
    with pytest.raises(MissingDependency, match="nvidia-ml-py"):
        open_device("cuda")
    with pytest.raises(ConfigError, match="expected one of cpu, cuda, jetson; got tpu"):
        open_device("tpu")


def test_a_jetson_comes_before_a_gpu_and_a_gpu_before_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_device().kind == "cpu"
    gpu = FakeGpu(init_error="NVMLError_DriverNotLoaded")
    monkeypatch.setitem(sys.modules, "pynvml", gpu.module())
    assert find_device().kind == "cpu"
    gpu.init_error = None
    assert find_device().kind == "cuda"
    make_board(tmp_path, tmp_path / "bin", "jetpack5")
    assert find_device().kind == "jetson"


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variable_it_is_this_machine(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv(ROOT_VARIABLE)
    else:
        monkeypatch.setenv(ROOT_VARIABLE, value)
    assert open_device("cpu").state().name
