"""Chooses the device that is measured.

The environment variable EAMDEPLOY_ROOT says where `/etc`, `/proc` and `/sys` of the board are, for containers that
mount them elsewhere, and for tests. It is read here and nowhere else.
"""

from __future__ import annotations

import os
from pathlib import Path

from eamdeploy.devices.base import Device
from eamdeploy.devices.cpu import CpuDevice
from eamdeploy.devices.cuda import CudaDevice
from eamdeploy.devices.jetson import JetsonDevice, is_jetson
from eamdeploy.errors import ConfigError, DeviceError, MissingDependency

ROOT_VARIABLE = "EAMDEPLOY_ROOT"
DEVICES = ("cpu", "cuda", "jetson")


def open_device(name: str) -> Device:
    """The device of that kind on this machine.

    Raises:
        ConfigError: there is no such kind.
        DeviceError: this machine has none, or it does not answer.
        MissingDependency: a package to ask it is not installed here.
    """
    if name == "jetson":
        return JetsonDevice(_root())
    if name == "cuda":
        return CudaDevice()
    if name == "cpu":
        return CpuDevice(_root())
    raise ConfigError("no such device", expected=f"one of {', '.join(DEVICES)}", got=name)


def find_device(*, gpu: bool = True) -> Device:
    """The device that this machine is: a Jetson, else a GPU that answers, else the processor.

    Args:
        gpu: whether a GPU beside a processor is meant; a Jetson is always measured as a whole.
    """
    if is_jetson(_root()):
        return JetsonDevice(_root())
    if not gpu:
        return CpuDevice(_root())
    try:
        return CudaDevice()
    except (DeviceError, MissingDependency):
        return CpuDevice(_root())


def _root() -> Path:
    return Path(os.environ.get(ROOT_VARIABLE) or "/")
