"""Every attribute of the module tensorrt that is used here, and in which versions.

Checked when TensorRT is loaded, so that a version that has changed once more is an error with a name in it and no
traceback; and held against the real modules in tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import EngineError


@dataclass(frozen=True)
class Span:
    """Versions in which an attribute is used: from `since` up to, but without, `until`."""

    since: tuple[int, ...] = (8, 5)
    until: tuple[int, ...] = (99, 0)

    def holds(self, version: TrtVersion) -> bool:
        return version.reaches(*self.since) and not version.reaches(*self.until)


_ALWAYS = Span()

# Class, then its attributes. Source of the spans: docs/tensorrt.md, and the real modules of 8.6.0 and 11.4.
_EVERYWHERE = """
ILogger: INTERNAL_ERROR ERROR WARNING INFO VERBOSE
Builder: create_network create_builder_config create_optimization_profile build_serialized_network
OnnxParser: parse parse_from_file num_errors get_error
ParserError: node desc
IBuilderConfig: set_flag clear_flag set_memory_pool_limit profiling_verbosity add_optimization_profile
IBuilderConfig: create_timing_cache set_timing_cache get_timing_cache
BuilderFlag: TF32
MemoryPoolType: WORKSPACE
ProfilingVerbosity: DETAILED
IOptimizationProfile: set_shape
ITimingCache: combine serialize
Runtime: deserialize_cuda_engine
ICudaEngine: num_io_tensors get_tensor_name get_tensor_mode get_tensor_shape get_tensor_dtype get_tensor_profile_shape
ICudaEngine: create_execution_context create_engine_inspector
TensorIOMode: INPUT
DataType: FLOAT
IExecutionContext: set_tensor_address set_input_shape execute_async_v3 profiler
EngineInspector: get_engine_information
LayerInformationFormat: JSON
IProfiler: report_layer_time
"""

_BEFORE_10 = Span(until=(10, 0))
_BEFORE_11 = Span(until=(11, 0))
_FROM_8_6 = Span(since=(8, 6))
_LAYERS_8_6 = Span(since=(8, 6), until=(11, 0))

API: Mapping[str, Span] = MappingProxyType(
    {
        **{
            f"{line.partition(':')[0]}.{name}": _ALWAYS
            for line in _EVERYWHERE.strip().splitlines()
            for name in line.partition(":")[2].split()
        },
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": _BEFORE_10,
        "BuilderFlag.FP16": _BEFORE_11,
        "BuilderFlag.INT8": _BEFORE_11,
        "BuilderFlag.BF16": Span(since=(10, 0), until=(11, 0)),
        "BuilderFlag.OBEY_PRECISION_CONSTRAINTS": _BEFORE_11,
        "BuilderFlag.VERSION_COMPATIBLE": _FROM_8_6,
        "IBuilderConfig.builder_optimization_level": _FROM_8_6,
        "IBuilderConfig.hardware_compatibility_level": _FROM_8_6,
        "HardwareCompatibilityLevel.AMPERE_PLUS": _FROM_8_6,
        "Runtime.engine_host_code_allowed": _FROM_8_6,
        **dict.fromkeys(
            (
                *(f"ILayer.{name}" for name in ["type", "precision", "set_output_type", "num_inputs", "num_outputs"]),
                *("ILayer.get_input", "ILayer.get_output", "ITensor.name"),
                *("INetworkDefinition.num_layers", "INetworkDefinition.get_layer"),
                *(f"LayerType.{name}" for name in ["SOFTMAX", "SHUFFLE", "IDENTITY", "ELEMENTWISE", "REDUCE", "UNARY"]),
                *(f"ElementWiseOperation.{name}" for name in ["SUM", "SUB", "PROD", "POW", "DIV"]),
                *("ReduceOperation.AVG", "UnaryOperation.SQRT"),
                *("IElementWiseLayer.op", "IReduceLayer.op", "IUnaryLayer.op"),
            ),
            _BEFORE_11,
        ),
        "LayerType.NORMALIZATION": _LAYERS_8_6,
        "LayerType.CAST": _LAYERS_8_6,
        "ICudaEngine.device_memory_size": Span(until=(10, 1)),
        "ICudaEngine.device_memory_size_v2": Span(since=(10, 1)),
    }
)


def missing_attributes(trt: Any, version: TrtVersion) -> Iterator[str]:
    """What the module should have in that version and has not."""
    for path, span in API.items():
        owner, _, name = path.partition(".")
        if span.holds(version) and not hasattr(getattr(trt, owner, None), name):
            yield path


def require_api(trt: Any, version: TrtVersion) -> None:
    """The module has everything that is used of it.

    Raises:
        EngineError: it lacks something.
    """
    missing = list(missing_attributes(trt, version))
    if missing:
        raise EngineError(
            f"the TensorRT {version} here is not complete, or has changed",
            expected=", ".join(missing),
            got="no such attributes",
            hint="Use another release of TensorRT, from 8.5 to 11.4.",
        )
