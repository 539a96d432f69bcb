"""The EAM checkpoint, format 1: a model's weights and its frozen attention maps in one safetensors file.

| tensor | dtype, shape | holds |
|---|---|---|
| `model.<timm state-dict key>` | as trained | the weights |
| `eam.<attention module path>.heads` | int64 [F] | the frozen heads, strictly ascending |
| `eam.<attention module path>.codes` | uint8 [ceil(F·N·N·bits / 8)] | their maps' codes [F, N, N], see `pack_codes` |
| `eam.<attention module path>.scales` | float32 [F, N] | one scale per row |

The file's metadata has one entry, `eam`: a `CheckpointHeader` as JSON. Only modules with frozen heads have tensors
under `eam.`. Nothing is unpickled, and what is loaded has passed `validate`.
Source: DESIGN §3.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue

from eamdeploy.artifact import Freezing, Preprocessing, Record, write_bytes
from eamdeploy.eam.quantizers import Quantizer, dequantize, pack_codes, unpack_codes
from eamdeploy.eam.validation import check_header, validate
from eamdeploy.errors import CheckpointError, ConfigError, MissingDependency

FORMAT: Final = 1
_SUFFIXES = ("heads", "codes", "scales")
_DTYPES = ("F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")


class AttentionShape(Record):
    """One attention module: `heads` maps of [tokens, tokens]."""

    heads: int = Field(ge=1)
    tokens: int = Field(ge=1)

    @property
    def entries_per_head(self) -> int:
        """Entries of one map."""
        return self.tokens**2


class Calibration(Record):
    """What the frozen maps were averaged over.

    Attributes:
        n_images: how many images.
        digest: SHA-256 of the images' contents.
        source: the folder's name, as the user gave it.
    """

    n_images: int = Field(ge=1)
    digest: str
    source: str


class CheckpointHeader(Record):
    """The JSON in the file's metadata: all that is not a tensor.

    Attributes:
        timm_model, timm_kwargs: arguments of `timm.create_model`.
        weights: where the weights came from; `random` marks a model that is good for latency only.
        attention: every attention module by its path, in the model's order, frozen or not.
        calibration: None when the maps came from the user's own training.
        versions: version by package name.
    """

    format: Literal[1] = FORMAT
    timm_model: str
    timm_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    weights: str
    num_classes: int = Field(ge=1)
    class_names: list[str] | None = None
    preprocessing: Preprocessing
    attention: dict[str, AttentionShape]
    freezing: Freezing
    calibration: Calibration | None = None
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class FrozenMaps:
    """The frozen maps of one attention module.

    Attributes:
        heads: int64 [F], strictly ascending.
        codes: uint8 [F, N, N], unpacked.
        scales: float32 [F, N].
    """

    heads: NDArray[np.int64]
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]

    def maps(self, quantizer: Quantizer) -> NDArray[np.float32]:
        """The maps themselves, float32 [F, N, N], rows summing to 1."""
        return dequantize(self.codes, self.scales, quantizer)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model with frozen attention maps.

    Attributes:
        weights: the timm state dict; float16, float32 or float64 parameters, integer and boolean buffers.
        frozen: by attention module path, only modules with frozen heads.
    """

    weights: dict[str, NDArray[Any]]
    frozen: dict[str, FrozenMaps]
    header: CheckpointHeader


def save(checkpoint: Checkpoint, path: Path) -> None:
    """`path` holds `checkpoint`, or is unchanged if that fails. The same checkpoint gives the same bytes.

    Raises:
        CheckpointError: `checkpoint` does not pass `validate`.
        ConfigError: `path` can't be written.
        MissingDependency: safetensors is not installed.
    """
    validate(checkpoint, f"checkpoint for {path}")
    try:
        from safetensors.numpy import save as to_bytes
    except ImportError as err:
        raise _missing_safetensors(path) from err

    tensors: dict[str, NDArray[Any]] = {f"model.{key}": weight for key, weight in checkpoint.weights.items()}
    for module, frozen in checkpoint.frozen.items():
        tensors[f"eam.{module}.heads"] = frozen.heads
        tensors[f"eam.{module}.codes"] = pack_codes(frozen.codes, checkpoint.header.freezing.bits)
        tensors[f"eam.{module}.scales"] = frozen.scales
    contiguous = {key: np.ascontiguousarray(tensor).reshape(tensor.shape) for key, tensor in tensors.items()}
    write_bytes(path, to_bytes(contiguous, metadata={"eam": checkpoint.header.model_dump_json()}))


def load(path: Path) -> Checkpoint:
    """The checkpoint in the file at `path`, validated.

    Raises:
        CheckpointError: the file is truncated, foreign, of an unknown format, or fails `validate`; the message names
            the file and the tensor or header key, expected and got.
        ConfigError: `path` can't be read.
        MissingDependency: safetensors is not installed.
    """
    text, tensors = _read(path)
    header = _parse_header(text, path)
    check_header(header, str(path))
    weights = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}
    frozen = {
        module: _unpack_maps(parts, module, header, path) for module, parts in _group_by_module(tensors, path).items()
    }
    checkpoint = Checkpoint(weights, frozen, header)
    validate(checkpoint, str(path))
    return checkpoint


def _read(path: Path) -> tuple[str, dict[str, NDArray[Any]]]:
    """The JSON under the metadata key `eam`, and all tensors."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as err:
        raise _missing_safetensors(path) from err

    try:
        with path.open("rb"):
            pass  # a clear reason for a missing or unreadable file, which safetensors does not always give
    except OSError as err:
        raise ConfigError(f"cannot read {path}: {err.strerror or err}") from err
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("eam")
            if text is None:
                raise CheckpointError(
                    f"{path} is no EAM checkpoint",
                    expected="header metadata `eam`",
                    got="a safetensors file without it",
                    hint="These are plain weights: use `eamdeploy freeze` or `eamdeploy pack` first.",
                )
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                dtype = file.get_slice(key).get_dtype()
                if dtype not in _DTYPES:
                    raise CheckpointError(
                        f"{path}: {key} has an unsupported dtype",
                        expected=f"one of {', '.join(_DTYPES)}",
                        got=dtype,
                        hint="Cast bfloat16 weights to float32 first.",
                    )
            return text, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as err:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file", got=str(err), hint="Copy or download it again."
        ) from err


def _parse_header(text: str, path: Path) -> CheckpointHeader:
    where = f"{path}: header metadata `eam`"
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{where} is no JSON", got=str(err)) from err
    number = document.get("format") if isinstance(document, dict) else None
    if number != FORMAT:
        raise CheckpointError(
            f"{path} has an unknown checkpoint format",
            expected=f"format {FORMAT}",
            got=repr(number),
            hint="It was written by another version of eamdeploy, or by another program.",
        )
    return CheckpointHeader.parse(text, where)


def _group_by_module(tensors: dict[str, NDArray[Any]], path: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """The tensors under `eam.`, by module path and suffix, each module with exactly heads, codes and scales."""
    modules: dict[str, dict[str, NDArray[Any]]] = {}
    for key, tensor in tensors.items():
        if key.startswith("model.") and key != "model.":
            continue
        module, _, suffix = key.removeprefix("eam.").rpartition(".")
        if not key.startswith("eam.") or not module or suffix not in _SUFFIXES:
            raise CheckpointError(
                f"{path}: unknown tensor {key}",
                expected="model.<timm state-dict key> or eam.<module>.heads, .codes, .scales",
                got=key,
            )
        modules.setdefault(module, {})[suffix] = tensor
    for module, parts in modules.items():
        if missing := [suffix for suffix in _SUFFIXES if suffix not in parts]:
            raise CheckpointError(
                f"{path}: eam.{module} is incomplete",
                expected=", ".join(f"eam.{module}.{suffix}" for suffix in _SUFFIXES),
                got=f"no {', '.join(missing)}",
            )
    return modules


def _unpack_maps(parts: dict[str, NDArray[Any]], module: str, header: CheckpointHeader, path: Path) -> FrozenMaps:
    heads, scales = parts["heads"], parts["scales"]
    attention = header.attention.get(module)
    if attention is None:
        raise CheckpointError(
            f"{path}: eam.{module} belongs to no attention module in the header",
            expected=f"one of {', '.join(header.attention)}",
            got=module,
        )
    shape = (heads.size, attention.tokens, attention.tokens)
    codes = unpack_codes(parts["codes"], header.freezing.bits, shape, where=f"{path}: eam.{module}.codes")
    return FrozenMaps(heads, codes, scales)


def _missing_safetensors(path: Path) -> MissingDependency:
    return MissingDependency(
        f"the EAM checkpoint {path} needs the package safetensors, which is not installed here",
        hint="Install the host packages with: pip install 'eamdeploy[host]'.",
    )
