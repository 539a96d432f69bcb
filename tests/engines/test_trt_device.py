from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eamdeploy.engines.trt.device import Gpu, free_memory, how_to_get_tensorrt, require_gpu
from eamdeploy.errors import DeviceError, ExitCode


class Driver:
    """libcuda with one GPU, or what a test makes of it."""

    def __init__(self, *, init: int = 0, count: int = 1, cuda: int = 12060) -> None:
        self.init, self.count, self.cuda = init, count, cuda

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return self.init

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            values = {
                "cuDeviceGetCount": self.count,
                "cuDriverGetVersion": self.cuda,
                "cuDeviceGetAttribute": {75: 8, 76: 7}[arguments[1]] if name == "cuDeviceGetAttribute" else 0,
            }
            if name == "cuDeviceGetName":
                arguments[0].value = b"Orin"
            elif name == "cuMemGetInfo_v2":
                for argument, value in zip(arguments, (2 * 10**9, 8 * 10**9), strict=True):
                    ctypes.cast(argument, ctypes.POINTER(ctypes.c_size_t))[0] = value
            elif name in values:
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = values[name]
            else:
                assert name.startswith("cu"), name
            return 0

        return call


def no_driver(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file")


def test_gpu_is_described_by_its_driver(tmp_path: Path) -> None:
    assert require_gpu(tmp_path, lambda _: Driver()) == Gpu("Orin", "8.7", "12.6")


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (no_driver, r"libcuda\.so\.1 can't be loaded"),
        (lambda _: Driver(init=100), "cuInit returned 100"),
        (lambda _: Driver(count=0), "the driver shows none"),
    ],
    ids=["no driver", "does not start", "none visible"],
)
def test_no_gpu_is_an_error_with_its_reason(tmp_path: Path, load: Any, reason: str) -> None:
    with pytest.raises(DeviceError, match=rf"no NVIDIA GPU.*{reason}.*Build on the board.*--dry-run") as caught:
        require_gpu(tmp_path, load)
    assert caught.value.exit_code == ExitCode.UNAVAILABLE
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvhost-gpu").touch()
    with pytest.raises(DeviceError, match=rf"{reason}.*check its driver"):
        require_gpu(tmp_path, load)


def test_jetpack_has_its_tensorrt(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 3\n")
    text = how_to_get_tensorrt(tmp_path, no_driver)
    assert text.startswith("JetPack 6.2 has TensorRT 10.3: sudo apt install python3-libnvinfer")
    assert "Python 3.10" in text and "\n" not in text


@pytest.mark.parametrize(("cuda", "package"), [(12060, "tensorrt-cu12"), (13020, "tensorrt-cu13")])
def test_elsewhere_pip_has_it_for_the_drivers_cuda(tmp_path: Path, cuda: int, package: str) -> None:
    assert how_to_get_tensorrt(tmp_path, lambda _: Driver(cuda=cuda)) == f"Get it with: pip install {package}"


def test_without_a_driver_both_ways_are_told(tmp_path: Path) -> None:
    text = how_to_get_tensorrt(tmp_path, no_driver)
    assert "apt install python3-libnvinfer" in text and "tensorrt-cu13" in text and "tensorrt-cu12" in text


def test_free_memory_of_gpu_and_machine(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 1 kB\nMemAvailable:    1000000 kB\n")
    assert free_memory(lambda _: Driver(), meminfo) == "2.00 of 8.00 GB GPU memory and 1.02 GB main memory"
    assert free_memory(no_driver, meminfo) == "1.02 GB main memory"
    assert free_memory(lambda _: Driver(init=3), tmp_path / "absent") == "unknown"
