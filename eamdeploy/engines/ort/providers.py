"""The execution providers of ONNX Runtime that an engine can be built for: one table, and what it takes to trust one.

Facts behind the table, from a DeiT-Tiny: for OpenVINO on x86 with onnxruntime-openvino 1.24.1, for CUDA on an H100 with
onnxruntime-gpu 1.31.1; for the others from their documentation alone:

- **OpenVINO** compiles the whole graph itself, with the maps as UINT8 or INT8 behind DequantizeLinear. ONNX Runtime's
  optimizations before it changed neither the processor's time nor the logits, and neither did folding the maps by
  `session.disable_quant_qdq`. So they are off, and it gets the graph that was checked.
  Its precision is said, though this version chooses FP32 by itself: in `bf16`, which the processor had, logits were
  off by 0.11 instead of 1.3e-5. An FP32 engine quantizes no activations either. Its threads come through `load_config`,
  with the properties; the option `num_of_threads` is deprecated, and would also make as many inference requests. They
  are not pinned: two sessions of one thread each pin that to the same core.
  It runs static INT8 in far less of the processor's time than FP32, dynamic INT8 in more.
- **CUDA** computes products in TF32 unless it is told not to. ONNX Runtime does not look for the libraries that pip put
  beside it (`onnxruntime-gpu[cuda,cudnn]`); see `load_libraries`.
- **TensorRT**, the provider, has no option against TF32; where the parity gate refuses an engine because of it,
  `NVIDIA_TF32_OVERRIDE=0` in the environment turns it off. The environment can set FP16 and INT8 too; options win
  over that. It builds its engine anew at every load: `build-trt` keeps one.
- **XNNPACK** has threads of its own and takes convolutions and two-dimensional products; the rest, most of a vision
  transformer, runs on the CPU provider. Operators run one after another, so both get the threads, and neither spins.
- **ACL** uses the session's threads. `enable_fast_math` would give up accuracy. ONNX Runtime 1.24 knows it, 1.32 not.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from eamdeploy.errors import DeviceError, EngineError, MissingDependency
from eamdeploy.vocabulary import ProviderName

CPU = "CPUExecutionProvider"
OPTION = "provider."
"""Stands before a provider's own options among an engine's settings."""
PROOF: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "anything": {},
        "all": {"session.disable_cpu_ep_fallback": "1"},  # or loading fails
        "arithmetic": {"session.record_ep_graph_assignment_info": "1"},  # the session can tell, see `require_placed`
        "some": {"session.record_ep_graph_assignment_info": "1"},
    }
)
"""What every session needs so that what a provider must take is known, by `Provider.takes`."""

_INSTEAD = "It takes the place of onnxruntime, which must go first: pip uninstall onnxruntime && pip install"
_CPU = "CPU."
# Parts of the names of operators that compute with images; a provider may leave shapes and indices to the processor.
_ARITHMETIC = ("Attention", "Conv", "Gelu", "Gemm", "MatMul", "Norm", "Softmax")


def _same(options: Mapping[str, str], threads: int) -> dict[str, str]:
    """For a provider that uses the session's threads, or none."""
    del threads
    return dict(options)


def _openvino_threads(options: Mapping[str, str], threads: int) -> dict[str, str]:
    """The properties of OpenVINO's device, in the table behind `CPU.`, go into one option."""
    properties = {key.removeprefix(_CPU): value for key, value in options.items() if key.startswith(_CPU)}
    properties["INFERENCE_NUM_THREADS"] = str(threads)
    return {"device_type": options["device_type"], "load_config": json.dumps({"CPU": properties})}


def _xnnpack_threads(options: Mapping[str, str], threads: int) -> dict[str, str]:
    return {**options, "intra_op_num_threads": str(threads)}


@dataclass(frozen=True)
class Provider:
    """How engines use an execution provider.

    Attributes:
        ort_name: ONNX Runtime's name for it.
        get: how to get an ONNX Runtime that has it.
        takes: what must run on it, or the engine is refused: `all` nodes, all `arithmetic`, or `some` node; with
            `anything` there is nowhere else.
        settings: of the sessions of an engine that is built for it, by ONNX Runtime's names.
        options: its own, but for threads; an engine's manifest can give these other values, and names no others.
        with_threads: its options, and those that give it a number of threads.
        own_threads: it computes in threads of its own alone, so that the session needs one.
        beside: providers, by ONNX Runtime's names, that take what it can't before the CPU gets that.
        on_gpu: it computes on a GPU.
        int8: the kinds of INT8 that are worth building for it; see `ort_form`.
        fused_attention: it has ONNX Runtime's operator MultiHeadAttention.
    """

    ort_name: str
    get: str
    takes: Literal["anything", "all", "arithmetic", "some"]
    settings: Mapping[str, str]
    options: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    with_threads: Callable[[Mapping[str, str], int], dict[str, str]] = _same
    own_threads: bool = False
    beside: tuple[str, ...] = ()
    on_gpu: bool = False
    int8: tuple[Literal["dynamic", "static"], ...] = ()
    fused_attention: bool = False


PROVIDERS: Mapping[ProviderName, Provider] = MappingProxyType(
    {
        "cpu": Provider(
            CPU,
            get="pip install onnxruntime",
            takes="anything",
            settings=MappingProxyType(
                {  # why: see `ort`
                    "graph_optimization_level": "all",
                    "session.disable_quant_qdq": "1",
                    "optimization.disable_specified_optimizers": "MatMulAddFusion",
                }
            ),
            int8=("dynamic", "static"),
            fused_attention=True,
        ),
        "openvino": Provider(
            "OpenVINOExecutionProvider",
            get=f"{_INSTEAD} onnxruntime-openvino (x86).",
            takes="all",
            settings=MappingProxyType({"graph_optimization_level": "disable"}),
            options=MappingProxyType(
                {
                    "device_type": "CPU",
                    "CPU.INFERENCE_PRECISION_HINT": "f32",
                    "CPU.DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
                    "CPU.NUM_STREAMS": "1",
                    "CPU.ENABLE_CPU_PINNING": "NO",
                }
            ),
            with_threads=_openvino_threads,
            own_threads=True,
            int8=("static",),
        ),
        "cuda": Provider(
            "CUDAExecutionProvider",
            get=f"{_INSTEAD} 'onnxruntime-gpu[cuda,cudnn]' (x86); on a Jetson the wheel for its JetPack.",
            takes="arithmetic",
            settings=MappingProxyType({"graph_optimization_level": "all", "session.disable_quant_qdq": "1"}),
            options=MappingProxyType({"use_tf32": "0"}),
            on_gpu=True,
            fused_attention=True,
        ),
        "tensorrt": Provider(
            "TensorrtExecutionProvider",
            get=f"{_INSTEAD} onnxruntime-gpu (x86) and TensorRT; on a Jetson the wheel for its JetPack.",
            takes="arithmetic",
            # TensorRT's parser refuses UINT8, so that the maps must be float when it gets them
            settings=MappingProxyType({"graph_optimization_level": "basic", "session.disable_quant_qdq": "1"}),
            options=MappingProxyType({"trt_fp16_enable": "False", "trt_int8_enable": "False"}),
            beside=("CUDAExecutionProvider",),
            on_gpu=True,
        ),
        "xnnpack": Provider(
            "XnnpackExecutionProvider",
            get="No package has it: build ONNX Runtime with --use_xnnpack.",
            takes="some",
            settings=MappingProxyType(
                {
                    "graph_optimization_level": "all",
                    "session.disable_quant_qdq": "1",
                    "session.intra_op.allow_spinning": "0",
                }
            ),
            with_threads=_xnnpack_threads,
        ),
        "acl": Provider(
            "ACLExecutionProvider",
            get="No package has it: build ONNX Runtime 1.24 or older with --use_acl (Arm).",
            takes="some",
            settings=MappingProxyType({"graph_optimization_level": "all", "session.disable_quant_qdq": "1"}),
            options=MappingProxyType({"enable_fast_math": "false"}),
        ),
    }
)


def installed_providers() -> list[ProviderName]:
    """Those that the installed ONNX Runtime was built with; whether they work here, only a session tells."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [name for name, provider in PROVIDERS.items() if provider.ort_name in available]


def require_provider(name: ProviderName) -> Provider:
    """The provider of that name, which the installed ONNX Runtime was built with.

    Raises:
        MissingDependency: it was not.
    """
    found = installed_providers()
    if name not in found:
        raise MissingDependency(
            f"the installed ONNX Runtime has no provider {name}",
            expected=PROVIDERS[name].ort_name,
            got=", ".join(found),
            hint=PROVIDERS[name].get,
        )
    return PROVIDERS[name]


def load_libraries(name: ProviderName) -> None:
    """What pip installed of CUDA and cuDNN beside ONNX Runtime is loaded, for a provider on a GPU.

    Nothing happens where there is none, or ONNX Runtime is older than 1.21: the loader finds others by its own paths.
    """
    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)
    if PROVIDERS[name].on_gpu and preload is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what is missing; a session says what it needs
            preload()


def chosen_options(name: ProviderName, settings: Mapping[str, str], engine: str) -> dict[str, str]:
    """The provider's options, with the values that `settings` give for some of them.

    Raises:
        EngineError: `settings` have an option that is not in the table: some load libraries or write files.
    """
    given = {key.removeprefix(OPTION): value for key, value in settings.items() if key.startswith(OPTION)}
    table = PROVIDERS[name].options
    if unknown := sorted(given.keys() - table.keys()):
        raise EngineError(
            f"engine {engine} has options that are not known for provider {name}",
            expected=", ".join(table) or "none",
            got=", ".join(unknown),
        )
    return {**table, **given}


def require_present(name: ProviderName, session_providers: Iterable[str], engine: str) -> None:
    """The provider started; where it does not, ONNX Runtime runs everything on the CPU without a word.

    Args:
        session_providers: what the session says that it has.

    Raises:
        DeviceError: it computes on a GPU, and is not there. EngineError: another is not there.
    """
    wanted, present = PROVIDERS[name].ort_name, list(session_providers)
    if wanted not in present:
        kind = DeviceError if PROVIDERS[name].on_gpu else EngineError
        raise kind(
            f"provider {name} did not start for {engine}, and ONNX Runtime would run it elsewhere",
            expected=wanted,
            got=", ".join(present),
            hint="The libraries, driver or hardware that it was built for are not here; see eamdeploy doctor.",
        )


def require_placed(name: ProviderName, placed: Iterable[tuple[str, str]], engine: str) -> None:
    """What must run on the provider does.

    Args:
        placed: for every node the provider that runs it, by ONNX Runtime's name, and its operator.

    Raises:
        EngineError: it does not.
    """
    wanted, strict, pairs = PROVIDERS[name].ort_name, PROVIDERS[name].takes == "arithmetic", set(placed)
    elsewhere = sorted(
        f"{operator} on {where}"
        for where, operator in pairs
        if where != wanted and any(part in operator for part in _ARITHMETIC)
    )
    # any operator counts: what a provider has compiled has a name of its own
    if all(where != wanted for where, _ in pairs) or (strict and elsewhere):
        raise EngineError(
            f"provider {name} does not run {engine}",
            expected=f"{'all that computes' if strict else 'something'} on {wanted}",
            got=", ".join(elsewhere) or "nothing",
        )
