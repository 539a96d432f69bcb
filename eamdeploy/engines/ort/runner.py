"""ONNX Runtime: builds and runs engines that are ordinary ONNX files, on its CPU provider or another one.

What the settings are on the CPU, and why (ONNX Runtime 1.31 on x86; a DeiT-Tiny-shaped graph with frozen maps); those
on other providers are in `ort_providers`:

- The engine is the model's file, byte for byte, unless another form of it is asked for (`ort_form`). A graph saved
  after optimization runs no faster and loads no faster, is tied to one version (and at the highest level to one
  processor), and would hold float maps with the next option. So the engine still is the model that was checked, and
  any ONNX Runtime opens it.
- `session.disable_quant_qdq`: without it each map's DequantizeLinear runs at every inference. With it, loading folds
  them into float constants: a little faster the more heads are frozen, the same bits, and as fast as float maps in
  the file. The file keeps its integers; in memory a map's entry takes four bytes.
- `MatMulAddFusion` is off: it makes a Gemm between two Reshapes of every linear layer with a bias, and hides bias
  and Gelu from the fusion of those two. Off, Swin-Tiny went from 1.09 to 1.13 times the stock export's speed, DeiT-Tiny
  from 1.06 to 1.08 (taking turns).
- `all` optimizations: they fuse Gelu and block the patch embedding's layout; `extended` is close, `basic` slower.
- `session.set_denormal_as_zero` is **not** set: the first session of a process decides it for the calling thread, for
  numpy too, and no later session can. It changed no time here; a graph with denormals is mended by a rewrite.
- `session.force_spinning_stop`, in every session: worker threads otherwise spin on for longer than one inference takes
  after each one, on cores that the application, or the other engine of an interleaved comparison, needs.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as state

from eamdeploy.artifacts.card import CARD_KEY, ModelCard
from eamdeploy.artifacts.file_kinds import recognize
from eamdeploy.artifacts.records import printable
from eamdeploy.engines.ort.providers import (
    OPTION,
    PROOF,
    PROVIDERS,
    chosen_options,
    load_libraries,
    require_placed,
    require_present,
    require_provider,
)
from eamdeploy.engines.ort.reasons import explain, plain
from eamdeploy.engines.runner import EngineIO, LatencySplit
from eamdeploy.errors import CheckpointError, ConfigError, EngineError
from eamdeploy.vocabulary import ProviderName

_PIXELS = "tensor(uint8)"
_INPUT_TYPES = ("tensor(float)", _PIXELS)
_LEVEL_KEY = "graph_optimization_level"
_LEVELS: Mapping[str, Any] = MappingProxyType(
    {
        "disable": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
)

ENGINE_SETTINGS: Mapping[str, str] = PROVIDERS["cpu"].settings
UNOPTIMIZED: Mapping[str, str] = MappingProxyType({_LEVEL_KEY: "disable"})
"""The graph as it is written, for proving a rewrite."""
EXACT_PRODUCTS: Mapping[str, str] = MappingProxyType({"session.x64quantprecision": "1"})
"""For models of others on x86 without VNNI: weights of 8 full bits become unsigned, whose kernels are exact, and
slower. Our engines in INT8 need no such thing, see `graph.int8_weights`."""
_EVERY_SESSION: Mapping[str, str] = MappingProxyType({"session.force_spinning_stop": "1"})
# Where a model given as bytes looks for data in other files: ONNX Runtime would look in the working directory.
_NO_DATA_FILES: Mapping[str, str] = MappingProxyType(
    {"session.model_external_initializers_file_folder_path": os.devnull}
)

_GIVE_ONNX = "Give the .onnx file that `eamdeploy export` or another exporter wrote."
_KERNEL = "_kernel_time"  # what the profiler puts behind a node's name
_PROFILE_WARMUP = 3
_FATAL_ONLY = 4  # the exception says all; ONNX Runtime would log it to stderr as well
ORT_FAILURES: tuple[type[Exception], ...] = (
    state.EPFail,
    state.Fail,
    state.InvalidArgument,
    state.InvalidGraph,
    state.InvalidProtobuf,
    state.ModelLoaded,
    state.NoModel,
    state.NoSuchFile,
    state.NotImplemented,
    state.RuntimeException,
    RuntimeError,
    ValueError,
)


class OrtRunner:
    """An ONNX file loaded into an execution provider of ONNX Runtime, which really runs it.

    Args:
        model: the file, or its bytes.
        threads: threads inside one operator; operators run one after another.
        settings: `graph_optimization_level` (disable, basic, extended, all), session config entries by ONNX
            Runtime's names, and behind `provider.` options of the provider; empty for ONNX Runtime's own defaults and
            the options of `PROVIDERS`. The attribute has those options and those of every session too.
        name: what messages call a model given as bytes; None for a file's own path.
        provider: what runs it.

    Raises:
        ConfigError: `threads` is below 1.
        CheckpointError: the card in the model's metadata, or a name, is damaged.
        EngineError: ONNX Runtime can't load the model, or its input and output are not an image classifier's, or
            the provider does not run what it must of it.
        MissingDependency: the installed ONNX Runtime has no such provider.
        DeviceError: the provider's GPU can't be used.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int,
        settings: Mapping[str, str],
        name: str | None = None,
        provider: ProviderName = "cpu",
    ) -> None:
        if threads < 1:
            raise ConfigError("the number of threads can't be used", expected="at least 1", got=threads)
        self.name = name or (str(model) if isinstance(model, Path) else "model in memory")
        self.provider = provider
        require_provider(provider)
        load_libraries(provider)
        self._options = chosen_options(provider, settings, self.name)
        own = {f"{OPTION}{key}": value for key, value in self._options.items()}
        self.settings: Mapping[str, str] = MappingProxyType({**_EVERY_SESSION, **settings, **own})
        self._source = model if isinstance(model, bytes) else _path_text(model)
        self._extra = {**PROOF[PROVIDERS[provider].takes], **(_NO_DATA_FILES if isinstance(model, bytes) else {})}
        self._threads = threads
        self._require_onnx()
        session = self._new_session(self._session_options())
        try:
            self.io = _engine_io(session, self.name)
            self.card = _card(session, self.name)
        except UnicodeDecodeError as err:  # protobuf takes any bytes for a text
            raise CheckpointError(
                f"{self.name} is damaged: a name of its input or output or its metadata is no UTF-8", got=str(err)
            ) from err
        self.device_memory_bytes: int | None = None
        if PROVIDERS[provider].takes in ("arithmetic", "some"):
            require_placed(provider, self._placed(session), self.name)
        self._session: Any = session

    def _session_options(self) -> Any:
        threads = 1 if PROVIDERS[self.provider].own_threads else self._threads
        return _session_options(threads, {**self.settings, **self._extra}, self.name)

    def _new_session(self, options: Any) -> Any:
        """A session in which the provider has started."""
        provider = PROVIDERS[self.provider]
        first = (provider.ort_name, provider.with_threads(self._options, self._threads))
        try:
            session = onnxruntime.InferenceSession(
                self._source,
                options,
                providers=[first, *provider.beside],
                enable_fallback=0,  # or a failure prints something and goes on, on the CPU
            )
        except ORT_FAILURES as err:
            raise self._refused(err) from err
        require_present(self.provider, session.get_providers(), self.name)
        return session

    def _require_onnx(self) -> None:
        """The model is no file in ONNX Runtime's own format, which it takes from memory, but not from a `.onnx` file.

        Raises:
            EngineError: it is.
        """
        if isinstance(self._source, bytes) and (kind := recognize(self._source)) is not None and kind.key == "ort":
            raise self._refused(ValueError())

    def _refused(self, err: Exception) -> EngineError:
        """What to say of a model that ONNX Runtime did not load: what the file is, or what it says of it."""
        what = f"ONNX Runtime can't load {self.name}"
        kind = recognize(self._source if isinstance(self._source, bytes) else Path(self._source))
        if kind is not None and kind.key != "onnx":
            return EngineError(what, expected="an ONNX model", got=kind.words, hint=kind.remedy or _GIVE_ONNX)
        reason = explain(str(err), onnxruntime.__version__)
        hint = reason.hint or "It is damaged, or needs a newer ONNX Runtime."
        if self.provider != "cpu" and reason.hint is None:
            hint = f"Provider {self.provider} can't start here, or not run all of it: build with --provider cpu."
        return EngineError(f"{what}: {reason.text}", hint=hint)

    def infer(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits float32 [B, classes] of images [B, 3, H, W] of the type that `io` says.

        Raises:
            ConfigError: the input's dtype or shape does not fit.
            EngineError: the engine is closed, failed, or returned something else than logits.
        """
        self.io.check(images, self.name)
        if self._session is None:
            raise EngineError(f"engine {self.name} is closed")
        try:
            (logits,) = self._session.run([self.io.output_name], {self.io.input_name: images})
        except ORT_FAILURES as err:
            raise EngineError(f"ONNX Runtime failed to run {self.name}: {_reason(err)}") from err
        if logits.dtype != np.float32 or logits.ndim != 2 or len(logits) != len(images):
            raise EngineError(
                f"engine {self.name} returned no logits",
                expected=f"float32 [{len(images)}, classes]",
                got=f"{logits.dtype} {list(logits.shape)}",
            )
        return np.asarray(logits)

    def split(self, images: NDArray[Any], runs: int) -> LatencySplit | None:
        """None: nothing is copied to a device, or ONNX Runtime does it inside its call."""
        self.io.check(images, self.name)
        return None

    def layer_times(self, images: NDArray[Any], runs: int) -> dict[str, float]:
        """Mean milliseconds of every node, as ONNX Runtime's own profiler tells; in a session of its own.

        What a provider compiled, OpenVINO the whole graph, is one node.

        Raises:
            ConfigError: the input's dtype or shape does not fit.
            EngineError: ONNX Runtime can't load or run the model, or the nodes run on a GPU.
        """
        self.io.check(images, self.name)
        if PROVIDERS[self.provider].on_gpu:
            raise EngineError(
                f"ONNX Runtime can't time the layers of {self.name}: provider {self.provider} only queues them",
                hint="A TensorRT engine can: build-trt.",
            )
        times: dict[str, list[float]] = {}
        for event in self._profiled(images, _PROFILE_WARMUP + runs):
            times.setdefault(event["name"].removesuffix(_KERNEL), []).append(event["dur"] / 1e3)
        return {name: float(np.mean(values[_PROFILE_WARMUP:])) for name, values in times.items()}

    def _profiled(self, images: NDArray[Any], runs: int) -> list[dict[str, Any]]:
        """What ONNX Runtime's profiler notes of every node in every run."""
        options = self._session_options()
        options.enable_profiling = True
        with tempfile.TemporaryDirectory() as folder:
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = self._new_session(options)
            try:
                for _ in range(runs):
                    session.run([self.io.output_name], {self.io.input_name: images})
                events = json.loads(Path(session.end_profiling()).read_text())
            except ORT_FAILURES as err:
                raise EngineError(f"ONNX Runtime failed to profile {self.name}: {_reason(err)}") from err
        return [event for event in events if event.get("cat") == "Node" and event["name"].endswith(_KERNEL)]

    def _placed(self, session: Any) -> list[tuple[str, str]]:
        """For every node the provider that runs it, and its operator."""
        if hasattr(session, "get_provider_graph_assignment_info"):
            parts = session.get_provider_graph_assignment_info()
            return [(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]
        # before ONNX Runtime 1.24 a run has to show it
        blank = np.zeros((self.io.batch or 1, *self.io.input_shape[1:]), self.io.dtype)
        return [(event["args"]["provider"], event["args"]["op_name"]) for event in self._profiled(blank, 1)]

    def close(self) -> None:
        """The session and its memory are released; a second call does nothing."""
        self._session = None

    def __enter__(self) -> OrtRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _session_options(threads: int, settings: Mapping[str, str], name: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    for key, value in settings.items():
        if key != _LEVEL_KEY:
            options.add_session_config_entry(key, value)
        elif value in _LEVELS:
            options.graph_optimization_level = _LEVELS[value]
        else:
            raise EngineError(
                f"engine {name} has an unknown {_LEVEL_KEY}", expected=f"one of {', '.join(_LEVELS)}", got=value
            )
    return options


def _engine_io(session: Any, name: str) -> EngineIO:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise EngineError(
            f"{name} is no image classifier",
            expected="one input and one output",
            got=f"{len(inputs)} inputs and {len(outputs)} outputs",
        )
    shape = inputs[0].shape
    if inputs[0].type not in _INPUT_TYPES or len(shape) != 4 or not all(isinstance(dim, int) for dim in shape[1:]):
        raise EngineError(
            f"{name} has an input that can't be used",
            expected=f"{' or '.join(_INPUT_TYPES)} [B, 3, height, width], only B may vary",
            got=f"{inputs[0].type} {shape}",
        )
    batch = shape[0] if isinstance(shape[0], int) else None
    classes = outputs[0].shape[-1] if outputs[0].shape else None
    return EngineIO(
        input_name=inputs[0].name,
        input_shape=(batch, shape[1], shape[2], shape[3]),
        output_name=outputs[0].name,
        num_classes=classes if isinstance(classes, int) else None,
        takes_pixels=inputs[0].type == _PIXELS,
    )


def _card(session: Any, name: str) -> ModelCard | None:
    text = session.get_modelmeta().custom_metadata_map.get(CARD_KEY)
    return None if text is None else ModelCard.parse(text, f"{name}: metadata {CARD_KEY}")


def _path_text(path: Path) -> str:
    """The path as ONNX Runtime takes it.

    Raises:
        ConfigError: it has none.
    """
    if printable(str(path)) != str(path):
        raise ConfigError(f"ONNX Runtime can't open {path}", expected="a name that is UTF-8", hint="Rename the file.")
    return str(path)


def _reason(err: Exception) -> str:
    """ONNX Runtime's message in one line, with the fact in it."""
    return plain(str(err) or type(err).__name__)
