"""TensorRT 11.4: types are those of the model; no EXPLICIT_BATCH, no precision flags, no precision of layers."""

from __future__ import annotations

from eamdeploy.engines.trt.device import Gpu
from fake_tensorrt.common import Fake, FakeModule, make_module
from fake_tensorrt.cuda import FakeCuda


class DeviceMemoryV2:
    @property
    def device_memory_size_v2(self) -> int:
        return 8192


def make(cuda: FakeCuda, gpu: Gpu, version: str | None) -> FakeModule:
    """The module."""
    return make_module(
        Fake(cuda, gpu, version or "11.4.0.106"),
        own={"ICudaEngine": (DeviceMemoryV2,)},
        enums={
            "BuilderFlag": "DEBUG TF32 VERSION_COMPATIBLE",
            "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
            "DataType": "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4",
        },
        first=2,
        inspector_tensors="I/O Tensors",
    )
