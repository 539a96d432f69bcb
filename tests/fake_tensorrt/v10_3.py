"""TensorRT 10.3, JetPack 6.1: EXPLICIT_BATCH does nothing, BF16, device memory under a second name."""

from __future__ import annotations

from eamdeploy.engines.trt.device import Gpu
from fake_tensorrt.common import Fake, FakeModule, make_module
from fake_tensorrt.cuda import FakeCuda
from fake_tensorrt.v8_6 import FLAGS, DeviceMemory, LayerPrecision, WeaklyTyped


class DeviceMemoryV2(DeviceMemory):
    @property
    def device_memory_size_v2(self) -> int:
        return 8192


def make(cuda: FakeCuda, gpu: Gpu, version: str | None) -> FakeModule:
    """The module."""
    return make_module(
        Fake(cuda, gpu, version or "10.3.0"),
        own={"ILayer": (LayerPrecision,), "ICudaEngine": (DeviceMemoryV2, DeviceMemory), "Builder": (WeaklyTyped,)},
        enums={
            "BuilderFlag": f"{FLAGS} BF16",
            "NetworkDefinitionCreationFlag": "EXPLICIT_BATCH STRONGLY_TYPED",
            "DataType": "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4",
        },
        first=1,
        inspector_tensors="Bindings",
    )
