"""What is asked of TensorRT's builder for a version, a model and the user's options; decided without TensorRT.

`trt_build` does what a `BuilderRequest` says and decides nothing; `--dry-run` prints it. What a version can do comes
from `trt_versions` alone.

- Below 11 types are hints: builder flags allow FP16, BF16 and INT8, and layers that must stay FP32 are constrained one
  by one. From 11 the types in the ONNX file decide, so the file is converted before it is parsed.
- A model with DequantizeLinear needs the INT8 flag, even when nothing but its frozen maps is INT8 (NVIDIA's developer
  guide, "Working with INT8": the flag must be set to enable any quantized operations). With Q/DQ layers in the network
  TensorRT makes nothing else INT8.
- TF32 is on by default and keeps 10 bits of a product's mantissa: cleared for an FP32 engine, which is held to the
  reference within FP32's own noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eamdeploy.artifacts.card import ModelCard
from eamdeploy.artifacts.onnx_files import ModelData
from eamdeploy.artifacts.records import Record
from eamdeploy.engines.manifest import CalibratedProducts
from eamdeploy.engines.trt.versions import Capabilities, TrtVersion, capabilities
from eamdeploy.errors import ConfigError
from eamdeploy.vocabulary import Precision

Kept = Literal["norm-softmax", "norm", "none"]
KeepFp32 = Literal["auto", "norm-softmax", "norm", "none"]

_MAX_LEVEL = 5
_DEFAULT_MAX_BATCH = 8
_KEPT: dict[Kept, tuple[str, ...]] = {
    "norm-softmax": ("normalization", "softmax"),
    "norm": ("normalization",),
    "none": (),
}


@dataclass(frozen=True)
class TrtOptions:
    """What the user asks for.

    Attributes:
        precision: the lowest floating-point type that layers may compute in.
        int8: run in INT8 what QuantizeLinear/DequantizeLinear in the model say, its own or those of calibration.
        keep_fp32: what stays FP32 in an FP16 or BF16 engine. "auto": LayerNorms that are spelled out, whose squares
            overflow FP16; one that is a layer of its own computes in FP32 inside by default, and asking for more made
            8.6.0 compute a whole DeiT in FP32 (docs/results/gpu.md).
        workspace_bytes: most memory that a layer may use while it runs; None for TensorRT's default, all of it.
        min_batch, opt_batch, max_batch: for a model with dynamic batch; None for the default.
        builder_level: 0 (fastest build) to 5 (longest search); None for TensorRT's default, 3.
        version_compatible: also runs on newer TensorRT; hardware_compatible: on any GPU from Ampere.
        cuda_graph: the engine's runner queues an inference as one recorded graph.
        layer_profile: time every layer of the finished engine.
    """

    precision: Precision = "fp32"
    int8: bool = False
    keep_fp32: KeepFp32 = "auto"
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    min_batch: int | None = None
    opt_batch: int | None = None
    max_batch: int | None = None
    builder_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    cuda_graph: bool = False
    layer_profile: bool = False


@dataclass(frozen=True)
class FrozenMap:
    """A frozen map in the model.

    Attributes:
        name: of its initializer.
        aliases: names of the nodes and tensors on its way into the product with the values.
        shape: of the initializer.
    """

    name: str
    aliases: frozenset[str]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFacts:
    """What the request depends on and what messages need, read from the model that the parser gets.

    Attributes:
        input_shape: [B, 3, H, W] of the one input; B is None when dynamic.
        nodes: operator and name of every node, by its number in the file.
        dequantizes: has DequantizeLinear; `quantizes`: has QuantizeLinear, so activations are quantized too.
        decomposed_norms: has a LayerNorm that is spelled out in products and sums.
        requantized: frozen maps that got other codes than the checkpoint's, in words; empty for none.
    """

    input_name: str
    input_shape: tuple[int | None, ...]
    nodes: tuple[tuple[str, str], ...]
    dequantizes: bool
    quantizes: bool
    decomposed_norms: bool = False
    maps: tuple[FrozenMap, ...] = ()
    requantized: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TrtModel:
    """A model ready for TensorRT's parser.

    Attributes:
        path: where it came from; `digest` is that of its files.
        data: what the parser gets, serialized.
        card: of the file; None for a foreign model.
        changes: what was done to it, in words.
        calibration: what became INT8 by calibration images; None where nothing did.
    """

    path: Path
    digest: str
    data: ModelData
    card: ModelCard | None
    facts: ModelFacts
    changes: tuple[str, ...]
    calibration: CalibratedProducts | None = None


class BatchRange(Record):
    """Batch sizes of the one optimization profile: any from `min` to `max` runs, tactics are chosen at `opt`."""

    min: int
    opt: int
    max: int


class BuilderRequest(Record):
    """Everything that the builder is asked, by TensorRT's own names.

    Attributes:
        tensorrt: the version asked.
        keep_fp32: what stays FP32, by the option's names and never `auto`; None for an FP32 engine.
        model_changes: what is done to the ONNX file before the parser sees it.
        network_flags: members of NetworkDefinitionCreationFlag.
        set_flags, cleared_flags: members of BuilderFlag.
        fp32_layers: kinds of layers whose precision is set to FP32 one by one; none where the model's types decide.
        shapes: min, opt and max [B, 3, H, W] of the input, for the optimization profile; empty for a fixed batch.
        memory_pools: bytes by member of MemoryPoolType.
        hardware_compatibility_level: member of HardwareCompatibilityLevel.
    """

    tensorrt: str
    precision: Precision
    keep_fp32: Kept | None
    int8: bool
    strongly_typed: bool
    model_changes: list[str]
    network_flags: list[str]
    set_flags: list[str]
    cleared_flags: list[str]
    fp32_layers: list[str]
    batch: BatchRange | None
    shapes: dict[str, list[list[int]]]
    memory_pools: dict[str, int]
    builder_optimization_level: int | None
    hardware_compatibility_level: str | None
    profiling_verbosity: Literal["DETAILED"] = "DETAILED"
    timing_cache: str | None
    cuda_graph: bool
    layer_profile: bool

    @property
    def version_compatible(self) -> bool:
        return "VERSION_COMPATIBLE" in self.set_flags

    def settings(self) -> dict[str, str]:
        """What of this shapes the engine, flat, for its manifest; what is empty is left out."""
        left_out = {"tensorrt", "model_changes", "timing_cache", "layer_profile", "batch"}
        flat: dict[str, str] = {}
        for key, value in self.model_dump(exclude=left_out, exclude_none=True).items():
            if isinstance(value, list):
                flat[key] = ",".join(map(str, value))
            elif isinstance(value, dict):
                flat |= {f"{key}.{name}": str(entry) for name, entry in value.items()}
            else:
                flat[key] = str(value)
        return {key: text for key, text in flat.items() if text not in ("", "False")}


def make_request(version: TrtVersion, options: TrtOptions, facts: ModelFacts, changes: list[str]) -> BuilderRequest:
    """What to ask of the builder of that version.

    Args:
        changes: what was done to the model, in words.

    Raises:
        ConfigError: the version can't do what the options ask, or the model and the options don't go together.
    """
    can = capabilities(version)
    _require_possible(version, can, options)
    if options.int8 and not facts.quantizes:
        raise ConfigError(
            "--int8 needs a model that says what is INT8",
            expected="QuantizeLinear and DequantizeLinear around activations",
            got="none in the model",
            hint="Give --calib-data; TensorRT's own calibrators are gone from version 11 and are not used.",
        )
    batch = _batch_range(options, facts)
    return BuilderRequest(
        tensorrt=str(version),
        precision=options.precision,
        keep_fp32=what_stays_fp32(options, decomposed_norms=facts.decomposed_norms),
        int8=options.int8,
        strongly_typed=can.strongly_typed == "always",
        model_changes=changes,
        network_flags=["EXPLICIT_BATCH"] if can.explicit_batch == "required" else [],
        set_flags=_set_flags(can, options, facts),
        cleared_flags=["TF32"] if options.precision == "fp32" else [],
        fp32_layers=list(_constrained(can, options, facts)),
        batch=batch,
        shapes={} if batch is None else {facts.input_name: _shapes(batch, facts)},
        memory_pools={} if options.workspace_bytes is None else {"WORKSPACE": options.workspace_bytes},
        builder_optimization_level=options.builder_level,
        hardware_compatibility_level="AMPERE_PLUS" if options.hardware_compatible else None,
        timing_cache=None if options.timing_cache is None else str(options.timing_cache),
        cuda_graph=options.cuda_graph,
        layer_profile=options.layer_profile,
    )


def what_stays_fp32(options: TrtOptions, *, decomposed_norms: bool) -> Kept | None:
    """What stays FP32 of a model with or without LayerNorms that are spelled out; None for an FP32 engine."""
    if options.precision == "fp32":
        return None
    if options.keep_fp32 == "auto":
        return "norm" if decomposed_norms else "none"
    return options.keep_fp32


def kept_kinds(kept: Kept | None) -> tuple[str, ...]:
    """The same as kinds of `trt_precision.steps_to_keep`."""
    return () if kept is None else _KEPT[kept]


def _constrained(can: Capabilities, options: TrtOptions, facts: ModelFacts) -> tuple[str, ...]:
    """Kinds of layers that are constrained one by one."""
    kept = what_stays_fp32(options, decomposed_norms=facts.decomposed_norms)
    return kept_kinds(kept) if can.layer_precision else ()


def _require_possible(version: TrtVersion, can: Capabilities, options: TrtOptions) -> None:
    if options.precision == "bf16" and not can.bf16_flag:
        raise ConfigError(
            f"TensorRT {version} can't make a BF16 engine of an FP32 model",
            expected="a version from 10.0 to 10.16",
            got=version,
            hint="Use --fp16. From 11 the types in the model decide, and no converter for BF16 takes frozen maps.",
        )
    newer = {
        "--version-compatible": options.version_compatible,
        "--hardware-compatible": options.hardware_compatible,
        "--builder-level": options.builder_level is not None,
    }
    asked = [name for name, wanted in newer.items() if wanted]
    if asked and not can.version_compatible:
        raise ConfigError(f"{', '.join(asked)} can't be used", expected="TensorRT 8.6 or newer", got=version)
    if options.builder_level is not None and not 0 <= options.builder_level <= _MAX_LEVEL:
        raise ConfigError("--builder-level", expected=f"0 to {_MAX_LEVEL}", got=options.builder_level)
    if options.workspace_bytes is not None and options.workspace_bytes < 1:
        raise ConfigError("--workspace", expected="at least 1 byte", got=options.workspace_bytes)


def _set_flags(can: Capabilities, options: TrtOptions, facts: ModelFacts) -> list[str]:
    flags = []
    if can.precision_flags:
        flags += [] if options.precision == "fp32" else [options.precision.upper()]
        flags += ["INT8"] if facts.dequantizes or facts.quantizes else []
    if _constrained(can, options, facts):
        flags.append("OBEY_PRECISION_CONSTRAINTS")
    if options.version_compatible:
        flags.append("VERSION_COMPATIBLE")
    return flags


def _batch_range(options: TrtOptions, facts: ModelFacts) -> BatchRange | None:
    asked = (options.min_batch, options.opt_batch, options.max_batch)
    if facts.input_shape[0] is not None:
        if any(batch is not None for batch in asked):
            raise ConfigError(
                "--min-batch, --opt-batch and --max-batch need a model with a dynamic batch",
                got=f"a fixed batch of {facts.input_shape[0]}",
                hint="Export with --batch dynamic, or leave them out.",
            )
        return None
    low, best, high = asked
    best = best or low or min(1, high or 1)
    low, high = low or 1, high or max(best, _DEFAULT_MAX_BATCH)
    if not 1 <= low <= best <= high:
        raise ConfigError(
            "the batch sizes can't be used", expected="1 <= min <= opt <= max", got=f"{low}, {best}, {high}"
        )
    return BatchRange(min=low, opt=best, max=high)


def _shapes(batch: BatchRange, facts: ModelFacts) -> list[list[int]]:
    rest = [dim or 1 for dim in facts.input_shape[1:]]
    return [[size, *rest] for size in (batch.min, batch.opt, batch.max)]
