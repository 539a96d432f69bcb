"""TensorRT without TensorRT: modules that look like 8.6, 10.3 and 11.4 to us, and compute by ONNX Runtime.

What a generation does not have raises AttributeError; `tests/engines/test_trt_attributes.py` holds the fakes against
the real modules, as far as those can be imported here. An "engine" is the ONNX model behind a header that says what the
builder was asked, so tests can read it back with `read_plan`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eamdeploy.engines.trt.device import Gpu
from fake_tensorrt.common import FakeModule, read_plan
from fake_tensorrt.cuda import FakeCuda

__all__ = ["GENERATIONS", "GPU", "FakeModule", "Machine", "make_machine", "read_plan"]

GENERATIONS = ("8.6", "10.3", "11.4")
GPU = Gpu("Orin", "8.7", "12.6")


@dataclass
class Machine:
    """A machine with a GPU and a TensorRT.

    Attributes:
        trt: what `import tensorrt` gives; its `fake` has what a test can ask for and look at.
        cuda: what `import cuda.bindings.runtime` gives.
    """

    trt: Any
    cuda: FakeCuda
    gpu: Gpu


def make_machine(generation: str = "10.3", *, version: str | None = None, gpu: Gpu = GPU) -> Machine:
    """A machine with that generation of TensorRT, of exactly that version."""
    cuda = FakeCuda()
    module = importlib.import_module(f"fake_tensorrt.v{generation.replace('.', '_')}")
    return Machine(module.make(cuda, gpu, version), cuda, gpu)


def install(machine: Machine, monkeypatch: Any) -> None:
    """This process runs on that machine."""
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", machine.trt)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", machine.cuda)
    monkeypatch.setattr("eamdeploy.engines.trt.backend.require_gpu", lambda: machine.gpu)


FOLDER = Path(__file__).parent
