"""NVIDIA GPUs of PCs and servers, through NVML (the package nvidia-ml-py). Jetsons have no NVML, or little of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from eamdeploy.devices.background import EnergyCounter, PolledSensor
from eamdeploy.devices.base import DeviceKind, DeviceState, Reading, Sensor
from eamdeploy.errors import DeviceError, MissingDependency

RAIL = "GPU"

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_IDLE = 0x1  # slow for want of work, which is no throttling
# nvmlClocksEventReason…; the same bits were named throttle reasons before driver 535
_REASONS = {
    0x2: "application clocks are set",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature, slowed down by the driver",
    0x40: "temperature, slowed down by the hardware",
    0x80: "power brake of the machine",
    0x100: "display clock",
}


class CudaDevice:
    """The first GPU that CUDA shows to this process.

    Raises:
        MissingDependency: nvidia-ml-py is not installed here.
        DeviceError: there is no GPU, or its driver does not answer.
    """

    def __init__(self) -> None:
        self._nvml = _import_nvml()
        with _open_gpu(self._nvml):
            pass

    @property
    def kind(self) -> DeviceKind:
        return "cuda"

    def state(self) -> DeviceState:
        """The GPU now; its power limit is the power mode.

        Raises:
            DeviceError: the driver does not answer at all any more.
        """
        nvml = self._nvml
        with _open_gpu(nvml) as gpu:
            limit_mw = gpu.tell("nvmlDeviceGetEnforcedPowerLimit")
            celsius = gpu.tell("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)
            clocks = {
                unit: gpu.tell("nvmlDeviceGetClockInfo", clock)
                for unit, clock in {"GPU": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}.items()
            }
            cuda = gpu.tell_system("nvmlSystemGetCudaDriverVersion")
            software = {
                "driver": gpu.tell_system("nvmlSystemGetDriverVersion"),
                "CUDA": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            }
            name, throttling = gpu.tell("nvmlDeviceGetName"), gpu.throttling()
            which = _which_gpu(gpu.tell_system("nvmlDeviceGetCount") or 1)
            return DeviceState(
                kind=self.kind,
                name=name or "NVIDIA GPU",
                software={name: version for name, version in software.items() if version is not None},
                power_mode=None if limit_mw is None else f"{limit_mw / 1e3:g} W",
                clocks_mhz={unit: mhz for unit, mhz in clocks.items() if mhz is not None},
                temperatures_c={} if celsius is None else {RAIL: celsius},
                throttling=throttling,
                warnings=[*which, *_did_not_answer(gpu.take_troubles())],
            )

    def sensor(self, interval_s: float) -> Sensor | None:
        """Power of the whole card and memory in use on it; None if this GPU tells neither.

        Raises:
            DeviceError: the driver does not answer any more.
        """
        with _open_gpu(self._nvml) as gpu:
            _, second = gpu.reading(1), gpu.reading(2)  # a counter gives power from the second look on
            troubles = gpu.take_troubles()
        if second.power_mw or second.memory_bytes:
            # a question that failed may be answered later; only a GPU that never tells its power has no total
            return _NvmlSensor(self._nvml, (RAIL,) if second.power_mw or troubles else (), interval_s)
        if troubles:
            raise DeviceError(f"the NVIDIA driver does not answer any more: {troubles[0]}")
        return None


class _Gpu:
    """A GPU while NVML is open.

    Answers that NVML refuses with an error are None, like those that a GPU does not have, and are noted beside: one
    question that fails must not take the answers to the others away.
    """

    def __init__(self, nvml: ModuleType, handle: object) -> None:
        self._nvml = nvml
        self._handle = handle
        self._meter = EnergyCounter()
        self._troubles: list[str] = []

    def tell(self, function: str, *arguments: object) -> Any:
        """NVML's answer about this GPU; None where there is none."""
        return self.tell_system(function, self._handle, *arguments)

    def tell_system(self, function: str, *arguments: object) -> Any:
        """NVML's answer; None where this GPU, its driver or its owner does not give one."""
        nvml = self._nvml
        try:
            return getattr(nvml, function)(*arguments)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission):
            return None
        except nvml.NVMLError as err:
            self._troubles.append(f"{function}: {err}")
            return None

    def take_troubles(self) -> list[str]:
        """The errors since the last call of this, each with the function that was asked."""
        troubles, self._troubles = self._troubles, []
        return troubles

    def reading(self, at_ns: int) -> Reading:
        """Power and memory now.

        Power is that since the last reading, from the card's energy counter (Volta and later). The power that NVML
        tells directly, a mean over the last second from Ampere on, is taken only where there is no such counter.
        """
        before = len(self._troubles)
        energy_mj = self.tell("nvmlDeviceGetTotalEnergyConsumption")
        power_mw = self._meter.power_mw(at_ns, None if energy_mj is None else energy_mj * 1000)
        if energy_mj is None and len(self._troubles) == before:  # there is no counter; else it failed this once
            power_mw = self.tell("nvmlDeviceGetPowerUsage")
        memory = self.tell("nvmlDeviceGetMemoryInfo")
        return Reading(
            at_ns, {} if power_mw is None else {RAIL: power_mw}, {} if memory is None else {"gpu": int(memory.used)}
        )

    def throttling(self) -> list[str]:
        """Why it is slower than its clocks allow."""
        bits = self.tell("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # a driver before 535
            bits = self.tell("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        ones = [1 << index for index in range(64) if bits >> index & 1]
        return [_REASONS.get(bit, f"reason {bit:#x}") for bit in ones if bit != _IDLE]


class _NvmlSensor(PolledSensor):
    """Holds NVML open while it reads."""

    def __init__(self, nvml: ModuleType, rails: tuple[str, ...], interval_s: float) -> None:
        super().__init__("NVML", rails, self._look, interval_s)
        self._nvml = nvml
        self._gpu: _Gpu | None = None

    def watch(self, stopped: threading.Event) -> None:
        with _open_gpu(self._nvml) as self._gpu:
            super().watch(stopped)

    def _look(self, at_ns: int) -> tuple[Reading, list[str]]:
        assert self._gpu is not None
        return self._gpu.reading(at_ns), self._gpu.take_troubles()


@contextmanager
def _open_gpu(nvml: ModuleType) -> Iterator[_Gpu]:
    """The GPU, to be asked inside the block."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as err:
        raise _no_gpu(str(err)) from err
    try:
        yield _Gpu(nvml, _find_handle(nvml))
    finally:
        with suppress(nvml.NVMLError):  # of a driver that went away: what was read is good
            nvml.nvmlShutdown()


def _find_handle(nvml: ModuleType) -> object:
    """The GPU that comes first in CUDA_VISIBLE_DEVICES, or without that the first one."""
    first = os.environ.get(_VISIBLE, "0").split(",")[0].strip()
    try:
        if first.startswith(("GPU-", "MIG-")):
            return nvml.nvmlDeviceGetHandleByUUID(first)
        if first.isdecimal():
            return nvml.nvmlDeviceGetHandleByIndex(int(first))
    except nvml.NVMLError as err:
        raise _no_gpu(str(err)) from err
    raise _no_gpu(f"{_VISIBLE} hides all")  # CUDA shows none for an empty list, −1 or a word


def _did_not_answer(troubles: list[str]) -> list[str]:
    """A warning that names what was asked in vain; nothing where all was answered."""
    return [f"the NVIDIA driver did not answer: {'; '.join(troubles)}"] if troubles else []


def _which_gpu(count: int) -> list[str]:
    """A warning where CUDA, which sorts GPUs by speed, may run another one than NVML, which sorts by PCI bus, asks."""
    order_is_known = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if count == 1 or order_is_known or os.environ.get(_VISIBLE, "").startswith(("GPU-", "MIG-")):
        return []
    return [
        f"there are {count} GPUs, and CUDA may number them in another order than NVML, which was asked here. "
        "Set CUDA_DEVICE_ORDER=PCI_BUS_ID"
    ]


def _import_nvml() -> ModuleType:
    try:
        import pynvml
    except ImportError as err:
        raise MissingDependency(
            "--device cuda needs the package nvidia-ml-py, which is not installed here",
            hint="Install it with: pip install 'eamdeploy[cuda]'.",
        ) from err
    module: ModuleType = pynvml
    return module


def _no_gpu(why: str) -> DeviceError:
    return DeviceError(
        f"no NVIDIA GPU can be asked here: {why}",
        hint="Look at nvidia-smi; in a container, pass the GPU into it (--gpus all). On a Jetson take --device jetson.",
    )
