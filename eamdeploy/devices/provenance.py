"""What an engine was built on and what a measurement ran on: processor and package versions."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

from eamdeploy.devices.cpu import cpu_model

_PACKAGES = (
    "eamdeploy",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "tensorrt",
    "onnx",
    "onnx-graphsurgeon",
    "torch",
    "timm",
)


def package_versions() -> dict[str, str]:
    """Version by name of Python and of the packages that decide results; absent ones are left out.

    Several packages bring the module onnxruntime and overwrite each other's; the one that is loaded counts.
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if (runtime := sys.modules.get("onnxruntime")) is not None:
        versions["onnxruntime"] = str(runtime.__version__)
    return versions


def usable_cores() -> int:
    """Cores that this process may run on; containers and taskset can make them fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_summary() -> str:
    """One line: processor, cores, architecture and operating system."""
    system = f"{platform.system()} {platform.release()}"
    return f"{cpu_model()}, {usable_cores()} cores, {platform.machine()}, {system}"
