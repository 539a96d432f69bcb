"""What this machine has, and what is missing for what."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from threading import Thread
from typing import Generic, TypeVar

import psutil

from eamdeploy.devices.base import DeviceState
from eamdeploy.devices.instructions import products_saturate
from eamdeploy.devices.jetpack import find_jetpack
from eamdeploy.devices.machine import describe_machine
from eamdeploy.devices.registry import find_device
from eamdeploy.engines.registry import load_backend
from eamdeploy.engines.trt.backend import installed_version
from eamdeploy.engines.trt.cuda import import_cuda
from eamdeploy.engines.trt.device import require_gpu
from eamdeploy.engines.trt.versions import capabilities as require_supported
from eamdeploy.errors import GET_CONVERSION, EamDeployError
from eamdeploy.records.diagnosis import Capability, Diagnosis, Finding

_HOST_MODULES = ("torch", "timm", "onnx", "onnxscript", "onnx_graphsurgeon", "safetensors", "matplotlib", "jinja2")
_CONVERSION_MODULES = ("onnx", "onnx_graphsurgeon")
_REPORT_MODULES = ("matplotlib", "jinja2")
_GET_HOST = "pip install 'eamdeploy[host]'"

T = TypeVar("T")


class Question(Generic[T]):
    """Asked at once in a thread of its own, so that a driver or a package that hangs holds up nothing else."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._ask = ask
        self._answer: T | None = None
        self._reason: str | None = None
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._ask()
        except EamDeployError as err:
            self._reason = str(err)
        except BaseException as err:  # noqa: BLE001 (a broken package may raise anything, and that is the answer)
            self._reason = f"{type(err).__name__}: {err}"

    def wait(self, until_s: float) -> tuple[T | None, str | None]:
        """The answer, or None and the reason: it failed, or it has not come at `until_s` of the monotonic clock."""
        self._thread.join(max(until_s - time.monotonic(), 0))
        if self._thread.is_alive():
            return None, "it does not answer; look at the system's log (dmesg)"
        return self._answer, self._reason


def doctor(patience_s: float = 20.0) -> Diagnosis:
    """This machine now.

    Args:
        patience_s: how long to wait for drivers and packages that don't answer.

    Raises:
        Nothing because of what is missing or broken here: that is a part of the answer.
    """
    until_s = time.monotonic() + patience_s
    questions = Question(_onnxruntime), Question(_tensorrt), Question(_gpu), Question(_cuda_python)
    asked_device = Question(_device_state)
    runtime, tensorrt, gpu, cuda = (_finding(*question.wait(until_s)) for question in questions)
    device, device_missing = asked_device.wait(until_s)
    machine = describe_machine()
    return Diagnosis(
        machine=machine,
        memory_free_bytes=psutil.virtual_memory().available,
        int8_saturates=products_saturate(machine.instructions or ""),
        onnxruntime=runtime,
        providers=[] if runtime.found is None else import_module("onnxruntime").get_available_providers(),
        tensorrt=tensorrt,
        gpu=gpu,
        cuda_python=cuda,
        device=device,
        device_missing=device_missing,
        capabilities=[
            *_host_capabilities(runtime, tensorrt, gpu, cuda),
            *_board_capabilities(runtime, tensorrt, gpu, cuda, device),
        ],
    )


def _onnxruntime() -> str:
    load_backend("ort")
    return str(import_module("onnxruntime").__version__)


def _tensorrt() -> str:
    version = installed_version()
    require_supported(version)
    return str(version)


def _gpu() -> str:
    gpu = require_gpu()
    return f"{gpu}, its driver runs CUDA up to {gpu.cuda}"


def _cuda_python() -> str:
    return str(import_cuda().__name__)


def _device_state() -> DeviceState:
    return find_device().state()


def _finding(found: str | None, missing: str | None) -> Finding:
    return Finding(found=found, missing=missing)


def _host_capabilities(runtime: Finding, tensorrt: Finding, gpu: Finding, cuda: Finding) -> list[Capability]:
    """What makes engines."""
    plans = _missing(tensorrt, gpu)
    gate = [] if cuda.missing is None else [f"{cuda.missing} Without it: --no-check."]
    return [
        Capability(name="analyze, freeze, pack, export", missing=_absent(_HOST_MODULES, _GET_HOST)),
        Capability(name="build-ort", missing=_missing(runtime)),
        Capability(name="build-trt", missing=[*_absent(_CONVERSION_MODULES, GET_CONVERSION), *plans, *gate]),
    ]


def _board_capabilities(
    runtime: Finding, tensorrt: Finding, gpu: Finding, cuda: Finding, device: DeviceState | None
) -> list[Capability]:
    """What runs and measures them."""
    ssh = [] if shutil.which("ssh") else ["There is no program ssh: sudo apt install openssh-client."]
    return [
        Capability(name="evaluate and profile ONNX engines", missing=_missing(runtime)),
        Capability(name="evaluate and profile TensorRT plans", missing=_missing(tensorrt, gpu, cuda)),
        Capability(name="evaluate checkpoints", missing=_absent(_HOST_MODULES, _GET_HOST)),
        Capability(name="profile --device jetson", missing=_no_jetson(device)),
        Capability(
            name="profile --device cuda",
            missing=[*_missing(gpu), *_absent(("pynvml",), "pip install 'eamdeploy[cuda]'")],
        ),
        Capability(name="profile on other machines", missing=ssh),
        Capability(name="report", missing=_absent(_REPORT_MODULES, _GET_HOST)),
    ]


def _missing(*findings: Finding) -> list[str]:
    return [finding.missing for finding in findings if finding.missing is not None]


def _absent(modules: Sequence[str], get: str) -> list[str]:
    """One line about those of `modules` that can't be imported here, found out without importing them."""
    absent = [name for name in modules if not _is_there(name)]
    return [f"Not installed: {', '.join(absent)}. Get it with: {get}"] if absent else []


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: a module without a specification, put there by a program
        return False


def _no_jetson(device: DeviceState | None) -> list[str]:
    if find_jetpack() is not None if device is None else device.kind == "jetson":
        return []
    return ["This is no Jetson board with a known JetPack: /etc/nv_tegra_release does not say so."]
