"""Does what a `BuilderRequest` says with TensorRT's builder: model in, serialized engine out.

Members of enumerations are looked up by name each time, never kept as numbers: 10.0 and 11.0 renumber them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from eamdeploy.engines.trt.cache import load_cache, save_cache
from eamdeploy.engines.trt.device import free_memory
from eamdeploy.engines.trt.log import BuildLog, make_logger, node_named
from eamdeploy.engines.trt.precision import Step, steps_to_keep
from eamdeploy.engines.trt.request import BuilderRequest, ModelFacts
from eamdeploy.errors import EngineError

# What TensorRT says, and what to try; found with 8.6.0 on an H100 (docs/results/gpu.md).
_HINTS = {
    "params.weights.type() != DataType::kINT8": "TensorRT 8.6.0 without cuBLAS built no FP16 engine with INT8 "
    "constants: see that cuBLAS is installed, or leave --int8 or --fp16 out.",
    "error while computing output extent": "TensorRT 8.6.0 can't join a class token that was repeated for a dynamic "
    "batch: export with eamdeploy, with a fixed batch, or by torch's TorchScript exporter.",
}
_STATISTICS = frozenset({"mean", "square root", "add", "subtract", "multiply", "power"})

# Kinds of layers by TensorRT's names; those with operations are told apart by `op`.
_LAYERS = {
    "NORMALIZATION": "normalization",  # from 8.6
    "SOFTMAX": "softmax",
    "SHUFFLE": "view",
    "IDENTITY": "view",
    "CAST": "view",
}
_OPERATIONS = {
    "ELEMENTWISE": (
        "IElementWiseLayer",
        "ElementWiseOperation",
        {"SUM": "add", "SUB": "subtract", "PROD": "multiply", "POW": "power", "DIV": "divide"},
    ),
    "REDUCE": ("IReduceLayer", "ReduceOperation", {"AVG": "mean"}),
    "UNARY": ("IUnaryLayer", "UnaryOperation", {"SQRT": "square root"}),
}


def build_plan(
    trt: Any,
    request: BuilderRequest,
    model: bytes | Path,
    facts: ModelFacts,
    log: BuildLog,
    note: Callable[[str], None],
) -> bytes:
    """The serialized engine.

    Args:
        trt: the module tensorrt; there must be a GPU.
        model: the ONNX model in the form that the request speaks of; a path for one of two files.
        note: is told what a person should know.

    Raises:
        EngineError: the parser or the builder refused; with its last errors, the node they name and the free memory.
    """
    logger = make_logger(trt, log)
    try:
        builder = trt.Builder(logger)
    except (RuntimeError, TypeError) as err:
        raise _failure("TensorRT's builder can't start", log, facts) from err
    network = builder.create_network(_network_flags(trt, request))
    _parse(trt, network, logger, model, facts, log)
    config = builder.create_builder_config()
    _configure(trt, config, request)
    if request.shapes:
        config.add_optimization_profile(_profile(builder, request))
    if request.fp32_layers:
        _keep_fp32(trt, network, request)
    cache = None if request.timing_cache is None else Path(request.timing_cache)
    handed_over = cache is not None and load_cache(config, cache, note)
    plan = builder.build_serialized_network(network, config)
    if handed_over and log.cache_refused:
        note(f"timing cache {cache}: TensorRT said that it will not be used, and went on without")
    if plan is None:
        raise _failure("TensorRT could not build an engine", log, facts)
    if cache is not None:
        save_cache(config, cache, note)
    return bytes(plan)


def _network_flags(trt: Any, request: BuilderRequest) -> int:
    flags = 0
    for name in request.network_flags:
        flags |= 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))
    return flags


def _parse(trt: Any, network: Any, logger: Any, model: bytes | Path, facts: ModelFacts, log: BuildLog) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model)):
        return
    errors = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        number = error.node()
        where = " ".join(facts.nodes[number]) if 0 <= number < len(facts.nodes) else "the model"
        errors.append(f"{where}: {' '.join(error.desc().split())}")
    said = " | ".join(errors) or log.last_errors()
    raise EngineError(
        f"TensorRT's parser can't read the model: {said}",
        hint=f"{_known(said)}`eamdeploy lint MODEL.onnx` names rules that the model breaks.",
    )


def _known(said: str) -> str:
    """What to try against failures that were met before; empty for others."""
    return "".join(f"{hint} " for fragment, hint in _HINTS.items() if fragment in said)


def _configure(trt: Any, config: Any, request: BuilderRequest) -> None:
    for name in request.set_flags:
        config.set_flag(getattr(trt.BuilderFlag, name))
    for name in request.cleared_flags:
        config.clear_flag(getattr(trt.BuilderFlag, name))
    for name, size in request.memory_pools.items():
        config.set_memory_pool_limit(getattr(trt.MemoryPoolType, name), size)
    config.profiling_verbosity = getattr(trt.ProfilingVerbosity, request.profiling_verbosity)
    if request.builder_optimization_level is not None:
        config.builder_optimization_level = request.builder_optimization_level
    if request.hardware_compatibility_level is not None:
        level = getattr(trt.HardwareCompatibilityLevel, request.hardware_compatibility_level)
        config.hardware_compatibility_level = level


def _profile(builder: Any, request: BuilderRequest) -> Any:
    profile = builder.create_optimization_profile()
    for name, (low, best, high) in request.shapes.items():
        profile.set_shape(name, tuple(low), tuple(best), tuple(high))
    return profile


def _keep_fp32(trt: Any, network: Any, request: BuilderRequest) -> None:
    """The layers of the requested kinds compute in FP32; the statistics of a LayerNorm are also handed on in it."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    steps = [
        Step(
            _kind(trt, layer),
            tuple(_tensor_names(layer.get_input, layer.num_inputs)),
            tuple(_tensor_names(layer.get_output, layer.num_outputs)),
        )
        for layer in layers
    ]
    for index in steps_to_keep(steps, request.fp32_layers):
        layers[index].precision = trt.DataType.FLOAT
        if steps[index].kind in _STATISTICS:
            for output in range(layers[index].num_outputs):
                layers[index].set_output_type(output, trt.DataType.FLOAT)


def _tensor_names(get: Callable[[int], Any], count: int) -> list[str]:
    """Names of a layer's tensors; an optional input that is not there has none."""
    return [tensor.name if (tensor := get(index)) is not None else "" for index in range(count)]


def _kind(trt: Any, layer: Any) -> str:
    """What a `Step` calls the layer."""
    for name, kind in _LAYERS.items():
        if layer.type == getattr(trt.LayerType, name, None):
            return kind
    for name, (layer_class, operations, kinds) in _OPERATIONS.items():
        if layer.type == getattr(trt.LayerType, name):
            layer.__class__ = getattr(trt, layer_class)  # a network hands out layers as plain ILayer, without `op`
            for operation, kind in kinds.items():
                if layer.op == getattr(getattr(trt, operations), operation):
                    return kind
    return str(layer.type)


def _failure(what: str, log: BuildLog, facts: ModelFacts) -> EngineError:
    said = log.last_errors()
    node = node_named(said, facts.nodes)
    at = "" if node is None else f", at {node}"
    usual = "The whole log lies beside the engine (*.log). If memory is short: --workspace, or a smaller --max-batch."
    return EngineError(f"{what}{at}: {said}; free: {free_memory()}", hint=f"{_known(said)}{usual}")
