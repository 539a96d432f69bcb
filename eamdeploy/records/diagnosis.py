"""What `doctor` found."""

from __future__ import annotations

from eamdeploy.artifacts.records import Record
from eamdeploy.devices.base import DeviceState
from eamdeploy.devices.machine import Machine


class Finding(Record):
    """Something that a machine may have; one of the two is None.

    Attributes:
        found: which one it has, e.g. a version.
        missing: why it has none that can be used, and how to get one.
    """

    found: str | None = None
    missing: str | None = None


class Capability(Record):
    """One thing that eamdeploy does.

    Attributes:
        missing: what it lacks here and how to get that, one line each; empty where it is available.
    """

    name: str
    missing: list[str]


class Diagnosis(Record):
    """A machine as it is now.

    Attributes:
        memory_free_bytes: what programs can still get without swapping; the total is the machine's `memory_bytes`.
        int8_saturates: products of unsigned bytes and signed bytes of 8 full bits are cut to 16 bits here; None in a
            file made before that was told.
        providers: execution providers of the ONNX Runtime that is installed.
        cuda_python: the module through which engines of TensorRT are run.
        device: None where it could not be asked, and `device_missing` says why.
    """

    machine: Machine
    memory_free_bytes: int
    int8_saturates: bool | None = None
    onnxruntime: Finding
    providers: list[str]
    tensorrt: Finding
    gpu: Finding
    cuda_python: Finding
    device: DeviceState | None
    device_missing: str | None
    capabilities: list[Capability]
