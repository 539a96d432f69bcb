"""A fake of nvidia-ml-py's module `pynvml` with one GPU: the part that is used, as it has it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

_ERRORS = {
    "NVMLError_Uninitialized": (1, "Uninitialized"),
    "NVMLError_InvalidArgument": (2, "Invalid Argument"),
    "NVMLError_NotSupported": (3, "Not Supported"),
    "NVMLError_NoPermission": (4, "Insufficient Permissions"),
    "NVMLError_NotFound": (6, "Not Found"),
    "NVMLError_DriverNotLoaded": (9, "Driver Not Loaded"),
    "NVMLError_LibraryNotFound": (12, "NVML Shared Library Not Found"),
    "NVMLError_FunctionNotFound": (13, "Function Not Found"),
    "NVMLError_GpuIsLost": (15, "GPU is lost"),
}
_HANDLE = object()


class NVMLError(Exception):
    """Base of all; like the real one it has a number and that number's text."""

    value = 0
    text = ""

    def __str__(self) -> str:
        return self.text


@dataclass
class FakeGpu:
    """What the GPU answers, and what happens to the module.

    Attributes:
        answers: by function; an error's name makes it raise that.
        opened: how many `nvmlInit` have no `nvmlShutdown` yet.
    """

    answers: dict[str, Any] = field(
        default_factory=lambda: {
            "nvmlSystemGetDriverVersion": "550.54.15",
            "nvmlSystemGetCudaDriverVersion": 12040,
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetName": "NVIDIA L4",
            "nvmlDeviceGetEnforcedPowerLimit": 72000,
            "nvmlDeviceGetTemperature": 43,
            "nvmlDeviceGetClockInfo": {1: 2040, 2: 6251},
            "nvmlDeviceGetCurrentClocksEventReasons": 0,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0,
            "nvmlDeviceGetPowerUsage": 31000,
            "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24 << 30, free=22 << 30, used=2 << 30),
        }
    )
    init_error: str | None = None
    opened: int = 0
    uuids: dict[str, int] = field(default_factory=dict)

    def module(self) -> ModuleType:
        """`pynvml` with this GPU."""
        module = ModuleType("pynvml")
        errors = {
            name: type(name, (NVMLError,), {"value": value, "text": text}) for name, (value, text) in _ERRORS.items()
        }
        constants = {"NVML_TEMPERATURE_GPU": 0, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2}
        for name, value in {"NVMLError": NVMLError, **errors, **constants}.items():
            setattr(module, name, value)

        def init() -> None:
            if self.init_error is not None:
                raise errors[self.init_error]
            self.opened += 1

        def shutdown() -> None:
            if not self.opened:
                raise errors["NVMLError_Uninitialized"]
            self.opened -= 1

        def handle(index: int) -> object:
            if not 0 <= index < self.answers["nvmlDeviceGetCount"]:
                raise errors["NVMLError_InvalidArgument"]
            return _HANDLE

        def handle_by_uuid(uuid: str) -> object:
            if uuid not in self.uuids:
                raise errors["NVMLError_NotFound"]
            return _HANDLE

        def answering(name: str) -> Any:
            def call(*arguments: Any) -> Any:
                if not self.opened:
                    raise errors["NVMLError_Uninitialized"]
                if name.startswith("nvmlDevice") and name != "nvmlDeviceGetCount":
                    assert arguments[0] is _HANDLE
                answer = self.answers[name]
                if isinstance(answer, str) and answer in errors:
                    raise errors[answer]
                if isinstance(answer, dict):
                    return answer[arguments[1]]
                return answer() if callable(answer) else answer

            return call

        functions = {
            "nvmlInit": init,
            "nvmlShutdown": shutdown,
            "nvmlDeviceGetHandleByIndex": handle,
            "nvmlDeviceGetHandleByUUID": handle_by_uuid,
            **{name: answering(name) for name in self.answers},
        }
        for name, function in functions.items():
            setattr(module, name, function)
        return module
