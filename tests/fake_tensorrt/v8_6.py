"""TensorRT 8.6, JetPack 6.0: EXPLICIT_BATCH needed, precision by flags and by layer.

What the real 8.6.0 said and refused on an H100 is here as it said it (docs/results/gpu.md).
"""

from __future__ import annotations

from typing import Any

import onnx

from eamdeploy.engines.trt.device import Gpu
from fake_tensorrt.common import (
    Builder,
    EngineInspector,
    Fake,
    FakeModule,
    IBuilderConfig,
    ITimingCache,
    make_module,
    of,
    say,
)
from fake_tensorrt.cuda import FakeCuda


class LayerPrecision:
    """Precision of single layers."""

    _precision: Any

    @property
    def precision(self) -> Any:
        return self._precision

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


NO_INT8 = (
    "2: [graphOptimizer.cpp::convertMyelinWeightsToFp32::7903] Error Code 2: Internal Error (Assertion "
    "params.weights.type() != DataType::kINT8 failed. )"
)
NO_CACHE = (
    "1: [myelinCache.h::deserializeFromBuffer::52] Error Code 1: Myelin (Myelin error from unknown graph)",
    "4: The timing cache will not be used!",
)


class NoInt8BesideHalf(WeaklyTyped):
    """A builder that builds no INT8 constant in an FP16 engine, and speaks of timing caches."""

    def _refusal(self, network: Any, config: Any) -> str | None:
        graph = onnx.load_model_from_string(network._model).graph
        int8 = {item.name for item in graph.initializer if item.data_type == onnx.TensorProto.INT8}
        if "FP16" in config._flags and any(
            node.op_type == "DequantizeLinear" and node.input[0] in int8 for node in graph.node
        ):
            return NO_INT8
        return WeaklyTyped._refusal(self, network, config)

    def create_builder_config(self) -> IBuilderConfig:
        config = Builder.create_builder_config(self)  # type: ignore[arg-type]
        config._logger = self._logger  # type: ignore[attr-defined]
        return config


class TalkativeCache:
    """Complains about every timing cache with measurements in it, and uses it."""

    def create_timing_cache(self, data: bytes) -> ITimingCache | None:
        for line in NO_CACHE if data else ():
            say(self._logger, self._trt, "ERROR", line)  # type: ignore[attr-defined]
        return IBuilderConfig.create_timing_cache(self, data)  # type: ignore[arg-type]


class RawSeparators:
    """Writes the separators of its metadata, control characters, into the JSON as they are."""

    def get_engine_information(self, form: Any) -> str:
        text = EngineInspector.get_engine_information(self, form)  # type: ignore[arg-type]
        return text.replace('{"Name"', '{"Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]", "Name"')


FLAGS = "FP16 INT8 DEBUG TF32 OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS VERSION_COMPATIBLE"


def make(cuda: FakeCuda, gpu: Gpu, version: str | None) -> FakeModule:
    """The module."""
    return make_module(
        Fake(cuda, gpu, version or "8.6.2.3"),
        own={
            "ILayer": (LayerPrecision,),
            "ICudaEngine": (DeviceMemory,),
            "Builder": (NoInt8BesideHalf, WeaklyTyped),
            "IBuilderConfig": (TalkativeCache,),
            "EngineInspector": (RawSeparators,),
        },
        enums={
            "BuilderFlag": FLAGS,
            "NetworkDefinitionCreationFlag": "EXPLICIT_BATCH EXPLICIT_PRECISION",
            "DataType": "FLOAT HALF INT8 INT32 BOOL UINT8 FP8",
        },
        first=0,
        inspector_tensors="Bindings",
    )
