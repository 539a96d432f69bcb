"""Is there an NVIDIA GPU, which one, and how does TensorRT get onto this machine?

Asks the driver through ctypes: `trt.Builder` fails and `trt.Runtime` ends the whole process where there is no GPU, so
neither may be touched before.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eamdeploy.devices.jetpack import find_jetpack
from eamdeploy.errors import DeviceError

_DRIVER = "libcuda.so.1"
_DEVICE_FILES = ("dev/nvidia0", "dev/nvhost-gpu", "dev/nvgpu", "dev/dxg", "proc/driver/nvidia")
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver describes it.

    Attributes:
        compute_capability: e.g. "8.7" for Orin.
        cuda: newest CUDA that the driver runs, e.g. "12.6".
    """

    name: str
    compute_capability: str
    cuda: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


def require_gpu(root: Path = Path("/"), load: Callable[[str], Any] = ctypes.CDLL) -> Gpu:
    """The first GPU that CUDA lets this process use.

    Args:
        root: where `/dev` and `/proc` are looked for.
        load: opens the driver's library.

    Raises:
        DeviceError: there is no driver, it does not start, or it shows no GPU.
    """
    try:
        driver = load(_DRIVER)
    except OSError as err:
        raise _no_gpu(root, f"the driver's library {_DRIVER} can't be loaded") from err
    started = driver.cuInit(0)
    count = ctypes.c_int()
    if started or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        raise _no_gpu(root, f"CUDA's cuInit returned {started}" if started else "the driver shows none")
    device, major, minor, version = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    driver.cuDriverGetVersion(ctypes.byref(version))
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=f"{major.value}.{minor.value}",
        cuda=f"{version.value // 1000}.{version.value % 1000 // 10}",
    )


def _no_gpu(root: Path, why: str) -> DeviceError:
    if any((root / file).exists() for file in _DEVICE_FILES):
        hint = "There is one in this machine: check its driver, or pass it into the container (--gpus all)"
    else:
        hint = "Build on the board or PC with the GPU that the engine is for"
    return DeviceError(f"no NVIDIA GPU can be used here: {why}", hint=f"{hint}; --dry-run and lint work without one.")


def how_to_get_tensorrt(root: Path = Path("/"), load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """One sentence: where TensorRT comes from on this machine."""
    jetpack = find_jetpack(root)
    if jetpack is not None:
        return (
            f"{jetpack.name} has TensorRT {jetpack.tensorrt}: sudo apt install python3-libnvinfer, and use the "
            f"system's Python {jetpack.python}, or a virtual environment made with --system-site-packages."
        )
    major = _driver_cuda_major(load)
    if major is None:
        return (
            "On a Jetson: sudo apt install python3-libnvinfer; elsewhere: pip install tensorrt-cu13 (or tensorrt-cu12: "
            "the CUDA of your driver)."
        )
    return f"Get it with: pip install tensorrt-cu{major}"


def _driver_cuda_major(load: Callable[[str], Any]) -> int | None:
    version = ctypes.c_int()
    try:
        failed = load(_DRIVER).cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed or version.value < 1000 else version.value // 1000


def free_memory(load: Callable[[str], Any] = ctypes.CDLL, meminfo: Path = Path("/proc/meminfo")) -> str:
    """Free memory of the GPU and of the machine in words; what can't be told is left out.

    On a Jetson both are the same memory, and CUDA does not count caches that the kernel would give back.
    """
    parts = []
    free = _gpu_free_bytes(load)
    if free is not None:
        parts.append(f"{free[0] / 1e9:.2f} of {free[1] / 1e9:.2f} GB GPU memory")
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        parts.append(f"{int(found[1]) * 1024 / 1e9:.2f} GB main memory")
    return " and ".join(parts) or "unknown"


def _gpu_free_bytes(load: Callable[[str], Any]) -> tuple[int, int] | None:
    """Free and total bytes of the first GPU, in its primary context, which TensorRT uses too."""
    try:
        driver = load(_DRIVER)
    except OSError:
        return None
    device, context, previous = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        driver.cuCtxPushCurrent_v2(context)
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(previous))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)
    return None if failed else (free.value, total.value)
