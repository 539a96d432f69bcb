"""What all generations of the fake have; each adds its own in a module of its own."""

from __future__ import annotations

import ctypes
import json
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from eamdeploy.engines.trt.device import Gpu
from fake_tensorrt.cuda import FakeCuda
from fake_tensorrt.recording import Member, Recorded, Recording, enum

MAGIC = b"FAKEPLAN"
CACHE_MAGIC = b"FAKECACHE"

_LAYERS = {
    "LayerNormalization": ("NORMALIZATION", None),
    "Softmax": ("SOFTMAX", None),
    "Add": ("ELEMENTWISE", "SUM"),
    "Sub": ("ELEMENTWISE", "SUB"),
    "Mul": ("ELEMENTWISE", "PROD"),
    "Pow": ("ELEMENTWISE", "POW"),
    "Div": ("ELEMENTWISE", "DIV"),
    "ReduceMean": ("REDUCE", "AVG"),
    "Sqrt": ("UNARY", "SQRT"),
    "Erf": ("UNARY", "ERF"),
    "DequantizeLinear": ("DEQUANTIZE", None),
    "QuantizeLinear": ("QUANTIZE", None),
    "Reshape": ("SHUFFLE", None),
    "Transpose": ("SHUFFLE", None),
    "Cast": ("CAST", None),
    "MatMul": ("MATRIX_MULTIPLY", None),
    "Gemm": ("MATRIX_MULTIPLY", None),
    "Conv": ("CONVOLUTION", None),
}
_OPERATION_ENUMS = {"ELEMENTWISE": "ElementWiseOperation", "REDUCE": "ReduceOperation", "UNARY": "UnaryOperation"}
LAYER_TYPES = (
    "CONVOLUTION CAST ELEMENTWISE SOFTMAX DECONVOLUTION UNARY REDUCE SHUFFLE IDENTITY CONSTANT MATRIX_MULTIPLY "
    "GATHER QUANTIZE DEQUANTIZE NORMALIZATION"
)


@dataclass
class Fake:
    """What a test can ask of a fake module, and what it has seen.

    Attributes:
        parse_error: the parser says it of the first node.
        build_error: the builder logs it and gives no engine; `starts` False: no builder either.
        memory_short: there is no execution context.
        fused: the inspector names a fused attention.
        touched: every attribute that was used, as `Class.attribute`, and every name of the module.
    """

    cuda: FakeCuda
    gpu: Gpu
    version: str
    parse_error: str | None = None
    build_error: str | None = None
    starts: bool = True
    memory_short: bool = False
    fused: bool = True
    names_only: bool = False
    touched: set[str] = field(default_factory=set)


class FakeModule(types.ModuleType):
    """The module; notes which of its names are used."""

    fake: Any
    __version__: str
    _inspector_tensors: str

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("_") and name != "fake":
            super().__getattribute__("fake").touched.add(name)
        return value


def of(trt: FakeModule, owner: str, name: str) -> Any:
    """An attribute of the module's class, without noting it."""
    return trt.__dict__[owner].__dict__[name]


def new(trt: FakeModule, name: str, *arguments: Any) -> Any:
    """An object of the module's own class of that name."""
    return trt.__dict__[name](*arguments)


def say(logger: Any, trt: FakeModule, severity: str, message: str) -> None:
    """The logger is told, by its method, which pybind11 calls without looking at the class."""
    type(logger).__dict__["log"](logger, of(trt, "ILogger", severity), message)


def read_plan(data: bytes) -> tuple[dict[str, Any], bytes]:
    """What the builder was asked for the engine, and the ONNX model in it."""
    header, _, model = data.removeprefix(MAGIC).partition(b"\n")
    return json.loads(header), model


class ILogger(Recorded):
    """Base of loggers; what is derived from it must have `log`."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = (Member("Severity", n, i) for i, n in enumerate("EFWIV"))

    def __init__(self) -> None:
        pass

    def log(self, severity: Member, message: str) -> None:
        raise NotImplementedError


class IProfiler(Recorded):
    """Base of profilers; what is derived from it must have `report_layer_time`."""

    def __init__(self) -> None:
        pass

    def report_layer_time(self, layer_name: str, ms: float) -> None:
        raise NotImplementedError


class IHostMemory(Recorded):
    """Bytes that TensorRT owns."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __bytes__(self) -> bytes:
        return self._data


class ITensor(Recorded):
    """A tensor of a network."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        return self._name


class ILayer(Recorded):
    """A layer as a network hands it out: without what only its own class has."""

    _trt: FakeModule

    def __init__(self, node: onnx.NodeProto, kind: Member, op: Member | None) -> None:
        self._node, self._kind, self._op = node, kind, op
        self._precision: Any = None
        self._output_types: dict[int, Any] = {}

    @property
    def type(self) -> Member:
        return self._kind

    @property
    def num_inputs(self) -> int:
        return len(self._node.input)

    @property
    def num_outputs(self) -> int:
        return len(self._node.output)

    def get_input(self, index: int) -> ITensor | None:
        name = self._node.input[index]
        return new(self._trt, "ITensor", name) if name else None

    def get_output(self, index: int) -> ITensor | None:
        return new(self._trt, "ITensor", self._node.output[index])


class INetworkDefinition(Recorded):
    """A network; has layers once a model is parsed into it."""

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._model = b""
        self._layers: list[ILayer] = []

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]


class ParserError(Recorded):
    """Why a node was refused."""

    def __init__(self, node: int, text: str) -> None:
        self._node, self._text = node, text

    def node(self) -> int:
        return self._node

    def desc(self) -> str:
        return self._text


class OnnxParser(Recorded):
    """The parser, with the rules of docs/tensorrt.md that are the same everywhere."""

    _trt: FakeModule

    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        self._network, self._logger = network, logger
        self._errors: list[ParserError] = []

    def parse(self, data: bytes) -> bool:
        return self._parse(lambda: onnx.load_model_from_string(data))

    def parse_from_file(self, path: str) -> bool:
        return self._parse(lambda: onnx.load(path))

    def _parse(self, load: Callable[[], onnx.ModelProto]) -> bool:
        trt = self._trt
        try:
            model = load()
            onnx.checker.check_model(model)
        except Exception as err:  # noqa: BLE001
            say(self._logger, trt, "ERROR", f"ModelImporter: {err}")
            return False
        if trt.fake.parse_error is not None:
            self._errors.append(new(trt, "ParserError", 0, trt.fake.parse_error))
            return False
        unsigned = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.UINT8}
        for index, node in enumerate(model.graph.node):
            if set(node.input) & unsigned:
                self._errors.append(new(trt, "ParserError", index, "Unsupported data type UINT8"))
                return False
            kind, op = _LAYERS.get(node.op_type, ("IDENTITY", None))
            operation = None if op is None else of(trt, _OPERATION_ENUMS[kind], op)
            self._network._layers.append(new(trt, "ILayer", node, of(trt, "LayerType", kind), operation))
        self._network._model = model.SerializeToString()
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class ITimingCache(Recorded):
    """Measurements of a version on a GPU."""

    _trt: FakeModule

    def __init__(self, owner: str, entries: set[str]) -> None:
        self._owner, self._entries = owner, entries

    def combine(self, other: ITimingCache, ignore_mismatch: bool) -> bool:
        if other._owner != self._owner and not ignore_mismatch:
            return False
        self._entries |= other._entries
        return True

    def serialize(self) -> IHostMemory:
        return new(self._trt, "IHostMemory", CACHE_MAGIC + json.dumps([self._owner, sorted(self._entries)]).encode())


class IOptimizationProfile(Recorded):
    """Shapes of inputs."""

    def __init__(self) -> None:
        self._shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, low: Any, best: Any, high: Any) -> None:
        assert all(isinstance(shape, tuple) for shape in (low, best, high))
        self._shapes[name] = [list(low), list(best), list(high)]


class IBuilderConfig(Recorded):
    """What the builder is asked."""

    _trt: FakeModule
    profiling_verbosity: Any = None
    builder_optimization_level: int = 3
    hardware_compatibility_level: Any = None

    def __init__(self) -> None:
        self._flags = {"TF32"}
        self._pools: dict[str, int] = {}
        self._profiles: list[IOptimizationProfile] = []
        self._cache: ITimingCache | None = None

    def set_flag(self, flag: Member) -> None:
        self._flags.add(flag.name)

    def clear_flag(self, flag: Member) -> None:
        self._flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: Member, size: int) -> None:
        self._pools[pool.name] = size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, data: bytes) -> ITimingCache | None:
        fake = self._trt.fake
        if not data:
            return new(self._trt, "ITimingCache", f"{fake.version} {fake.gpu.name}", set())
        try:
            owner, entries = json.loads(data.removeprefix(CACHE_MAGIC))
        except ValueError:
            return None
        return new(self._trt, "ITimingCache", owner, set(entries))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        fake = self._trt.fake
        if cache._owner != f"{fake.version} {fake.gpu.name}" and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class Builder(Recorded):
    """The builder; its engine is the model behind a header."""

    _trt: FakeModule

    def __init__(self, logger: Any) -> None:
        if not self._trt.fake.starts:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        return new(self._trt, "INetworkDefinition", flags)

    def create_builder_config(self) -> IBuilderConfig:
        return new(self._trt, "IBuilderConfig")

    def create_optimization_profile(self) -> IOptimizationProfile:
        return new(self._trt, "IOptimizationProfile")

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory | None:
        trt, fake = self._trt, self._trt.fake
        say(self._logger, trt, "VERBOSE", "looking at tactics")
        say(self._logger, trt, "INFO", "building")
        error = fake.build_error or self._refusal(network, config)
        if error is not None:
            say(self._logger, trt, "WARNING", "this may go wrong")
            say(self._logger, trt, "ERROR", error)
            return None
        if config._cache is not None:
            config._cache._entries.add(f"kernel {len(network._layers)}")
        header = {
            "version": fake.version,
            "gpu": fake.gpu.name,
            "network_flags": network._flags,
            "flags": sorted(config._flags),
            "pools": config._pools,
            "profile": config._profiles[0]._shapes if config._profiles else None,
            "level": vars(config).get("builder_optimization_level"),
            "compatibility": getattr(vars(config).get("hardware_compatibility_level"), "name", None),
            "verbosity": getattr(vars(config).get("profiling_verbosity"), "name", None),
            "fp32": [each._node.name for each in network._layers if each._precision is not None],
            "fp32_outputs": [each._node.name for each in network._layers if each._output_types],
        }
        return new(trt, "IHostMemory", MAGIC + json.dumps(header).encode() + b"\n" + network._model)

    def _refusal(self, network: INetworkDefinition, config: IBuilderConfig) -> str | None:
        """What TensorRT refuses to build; a generation may add to it."""
        if _io(network._model)[0][1][0] < 0 and not config._profiles:
            return "Network has dynamic or shape inputs, but no optimization profile has been defined."
        return None


def _io(model: bytes) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of input and output; −1 for a dynamic axis."""
    graph = onnx.load_model_from_string(model).graph
    return [
        (item.name, tuple(dim.dim_value or -1 for dim in item.type.tensor_type.shape.dim))
        for item in (graph.input[0], graph.output[0])
    ]


class Runtime(Recorded):
    """The runtime. The real one ends the process where there is no GPU."""

    _trt: FakeModule
    engine_host_code_allowed = False

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> ICudaEngine | None:
        trt, fake = self._trt, self._trt.fake
        if not data.startswith(MAGIC):
            say(self._logger, trt, "ERROR", "Magic tag does not match")
            return None
        header, model = read_plan(data)
        portable = "VERSION_COMPATIBLE" in header["flags"] and vars(self).get("engine_host_code_allowed")
        if header["version"] != fake.version and not portable:
            say(
                self._logger,
                trt,
                "ERROR",
                "The engine plan file is not compatible with this version of TensorRT, expecting library version "
                f"{fake.version} got {header['version']}",
            )
            return None
        return new(trt, "ICudaEngine", header, model, self._logger)


class ICudaEngine(Recorded):
    """An engine."""

    _trt: FakeModule

    def __init__(self, header: dict[str, Any], model: bytes, logger: Any) -> None:
        self._header, self._model, self._logger = header, model, logger
        self._tensors = dict(_io(model))

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Member:
        mode: Member = of(self._trt, "TensorIOMode", "INPUT" if name == next(iter(self._tensors)) else "OUTPUT")
        return mode

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name]

    def get_tensor_dtype(self, name: str) -> Any:
        del name
        return of(self._trt, "DataType", "FLOAT")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        shapes = self._header["profile"]
        return [self._tensors[name]] * 3 if shapes is None else [tuple(shape) for shape in shapes[name]]

    def create_execution_context(self) -> IExecutionContext | None:
        if self._trt.fake.memory_short:
            say(self._logger, self._trt, "ERROR", "out of memory")
            return None
        return new(self._trt, "IExecutionContext", self)

    def create_engine_inspector(self) -> EngineInspector:
        return new(self._trt, "EngineInspector", self)


class IExecutionContext(Recorded):
    """Runs the engine's model in ONNX Runtime, on the memory at the addresses that were set."""

    profiler: Any = None

    def __init__(self, engine: ICudaEngine) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        self._session = onnxruntime.InferenceSession(engine._model, options, providers=["CPUExecutionProvider"])
        self._engine = engine
        self._addresses: dict[str, int] = {}
        self._shape: tuple[int, ...] = ()

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine._tensors

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = (self._engine._header["profile"] or {name: [self._engine._tensors[name]] * 3})[name]
        self._shape = shape
        return low[0] <= shape[0] <= high[0]

    def execute_async_v3(self, stream: int) -> bool:
        cuda = self._engine._trt.fake.cuda
        assert stream in cuda.alive
        shape, addresses = self._shape, dict(self._addresses)
        cuda.queue(lambda: self._run(shape, addresses))
        return True

    def _run(self, shape: tuple[int, ...], addresses: dict[str, int]) -> None:
        source, target = list(self._engine._tensors)
        count = int(np.prod(shape))
        images = np.ctypeslib.as_array((ctypes.c_float * count).from_address(addresses[source])).reshape(shape)
        (logits,) = self._session.run([target], {source: images})
        if "FP16" in self._engine._header["flags"]:
            logits = logits.astype(np.float16).astype(np.float32)
        ctypes.memmove(addresses[target], np.ascontiguousarray(logits).ctypes.data, logits.nbytes)
        profiler = vars(self).get("profiler")
        if profiler is not None:
            for name, ms in (("first", 0.25), ("second", 0.5)):
                type(profiler).__dict__["report_layer_time"](profiler, name, ms)


class EngineInspector(Recorded):
    """Describes every node of the model as a layer, frozen maps as constants."""

    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine

    def get_engine_information(self, form: Member) -> str:
        assert form.name == "JSON"
        trt = self._engine._trt
        graph = onnx.load_model_from_string(self._engine._model).graph
        maps = {item.name: item for item in graph.initializer}
        layers: list[Any] = []
        for node in graph.node:
            layer: dict[str, Any] = {"Name": node.name or node.output[0], "LayerType": node.op_type}
            if node.op_type == "DequantizeLinear" and node.input[0] in maps:
                count = numpy_helper.to_array(maps[node.input[0]]).size
                layer |= {"LayerType": "Constant", "weights": {"Type": "Half", "Count": count}}
            layer["Outputs"] = [
                {"Name": name, "Format/Datatype": "Row major linear FP16 format"} for name in node.output
            ]
            if node.op_type == "Softmax" and trt.fake.fused:
                layer = {"Name": f"_gemm_mha_v2_{len(layers)}", "LayerType": "kgen", "TacticName": "fmha"}
            layers.append(layer)
        if trt.fake.names_only:
            layers = [layer["Name"] for layer in layers]
        tensors = trt._inspector_tensors
        return json.dumps({"Layers": layers, tensors: list(self._engine._tensors)})


CLASSES: tuple[type, ...] = (
    ILogger,
    IProfiler,
    IHostMemory,
    ITensor,
    ILayer,
    INetworkDefinition,
    ParserError,
    OnnxParser,
    ITimingCache,
    IOptimizationProfile,
    IBuilderConfig,
    Builder,
    Runtime,
    ICudaEngine,
    IExecutionContext,
    EngineInspector,
)


def make_module(
    fake: Fake, *, own: dict[str, tuple[type, ...]], enums: dict[str, str], first: int, inspector_tensors: str
) -> FakeModule:
    """A module with all classes, each mixed with what the generation adds to it.

    Args:
        own: mixins by name of the class.
        enums: members by name of the enumeration, beside those that all generations have.
        first: number of each enumeration's first member.
    """
    module = FakeModule("tensorrt")
    module.fake = fake
    module.__version__ = fake.version
    module._inspector_tensors = inspector_tensors
    for base in CLASSES:
        mixins = own.get(base.__name__, ())
        body = {"_trt": module, "_touched": fake.touched}
        for each in reversed((*mixins, base)):
            body |= {name: value for name, value in each.__dict__.items() if name not in ("__dict__", "__weakref__")}
        body |= {"_trt": module, "_touched": fake.touched}
        setattr(module, base.__name__, type(base)(base.__name__, (Recorded,), body))
    for name in ("IElementWiseLayer", "IReduceLayer", "IUnaryLayer"):
        op = property(lambda self: self._op)
        body = {"op": op, "_touched": fake.touched}
        setattr(module, name, Recording(name, (vars(module)["ILayer"],), body))
    for name, members in {**_ENUMS, **enums}.items():
        made = enum(name, members, first)
        made._touched = fake.touched
        setattr(module, name, made)
    fake.touched.clear()
    return module


_ENUMS = {
    "LayerType": LAYER_TYPES,
    "ElementWiseOperation": "SUM PROD MAX MIN SUB DIV POW",
    "ReduceOperation": "SUM PROD MAX MIN AVG",
    "UnaryOperation": "EXP LOG SQRT RECIP ERF",
    "MemoryPoolType": "WORKSPACE DLA_MANAGED_SRAM",
    "ProfilingVerbosity": "LAYER_NAMES_ONLY NONE DETAILED",
    "HardwareCompatibilityLevel": "NONE AMPERE_PLUS",
    "LayerInformationFormat": "ONELINE JSON",
    "TensorIOMode": "NONE INPUT OUTPUT",
}
