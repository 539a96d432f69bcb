"""TensorRT 8.6, JetPack 6.0: EXPLICIT_BATCH needed, precision by flags and by layer."""

from __future__ import annotations

from typing import Any

from eamdeploy.engines.trt_device import Gpu
from fake_tensorrt.common import Builder, Fake, FakeModule, make_module, of
from fake_tensorrt.cuda import FakeCuda


class LayerPrecision:
    """Precision of single layers."""

    @property
    def precision(self) -> Any:
        return self._precision  # type: ignore[attr-defined]

    @precision.setter
    def precision(self, value: Any) -> None:
        self._precision = value

    def set_output_type(self, index: int, value: Any) -> None:
        self._output_types[index] = value  # type: ignore[attr-defined]


class DeviceMemory:
    @property
    def device_memory_size(self) -> int:
        return 4096


class WeaklyTyped:
    """What the builder refuses while types are hints."""

    def _refusal(self, network: Any, config: Any) -> str | None:
        trt = self._trt  # type: ignore[attr-defined]
        explicit = 1 << int(of(trt, "NetworkDefinitionCreationFlag", "EXPLICIT_BATCH"))
        if trt.fake.version.startswith("8.") and not network._flags & explicit:
            return "Network must have EXPLICIT_BATCH"
        if any(each._kind.name == "DEQUANTIZE" for each in network._layers) and "INT8" not in config._flags:
            return "Int8 precision is not configured in the builder"
        return Builder._refusal(self, network, config)  # type: ignore[arg-type]


FLAGS = "FP16 INT8 DEBUG TF32 OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS VERSION_COMPATIBLE"


def make(cuda: FakeCuda, gpu: Gpu, version: str | None) -> FakeModule:
    """The module."""
    return make_module(
        Fake(cuda, gpu, version or "8.6.2.3"),
        own={"ILayer": (LayerPrecision,), "ICudaEngine": (DeviceMemory,), "Builder": (WeaklyTyped,)},
        enums={
            "BuilderFlag": FLAGS,
            "NetworkDefinitionCreationFlag": "EXPLICIT_BATCH EXPLICIT_PRECISION",
            "DataType": "FLOAT HALF INT8 INT32 BOOL UINT8 FP8",
        },
        first=0,
        inspector_tensors="Bindings",
    )
