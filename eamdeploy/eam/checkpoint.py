"""The EAM checkpoint, format 3: a model's weights and its frozen attention maps in one safetensors file.

| tensor | dtype, shape | holds |
|---|---|---|
| `model.<timm state-dict key>` | as trained | the weights |
| `eam.<attention module path>.heads` | int64 [F] | the heads with something frozen, strictly ascending |
| `eam.<attention module path>.codes` | uint8 [ceil(codes·bits / 8)] | codes of the frozen entries, see below |
| `eam.<attention module path>.scales` | float32 [F, *rows] | one scale per row, 0 where nothing of it is frozen |
| `eam.<attention module path>.mask` | uint8 [ceil(pieces / 8)] | granularity row or entry: what is frozen |
| `eam.<attention module path>.rank<r>.heads` | int64 [G] | heads that are frozen with rank r |
| `….rank<r>.mix_codes` and `.mix_scales` | uint8 packed, float32 [G, *rows] | the mix [G, *rows, r] |
| `….rank<r>.pool_codes` and `.pool_scales` | uint8 packed, float32 [G, *maps, r] | the pool [G, *maps, r, N] |

*rows* is N, or with windows M, N; *maps* is nothing, or with windows M. The codes are those of the
frozen entries alone, in row-major order of [F, *rows, N] (for granularity head: all of it), packed
by `pack_codes`. The mask is bool [F, N] for rows or [F, N, N] for entries, packed by `pack_mask`;
it holds in all M window maps.

The file's metadata has one entry, `eam`: a `CheckpointHeader` as JSON. Its key `content_digest` is
the seal (`eamdeploy.seal`) of the JSON's other keys and of all tensors, so that no bit of either
can change unnoticed. Format 2 has no ranks, and format 1 no seal either.
Only modules with frozen heads have tensors under `eam.`. Nothing is unpickled, and what is loaded
has passed `validate`.
Source: docs/design.md, Checkpoint; docs/reference/formats.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.file_kinds import in_words
from eamdeploy.artifacts.files import write_bytes
from eamdeploy.artifacts.seal import SEAL, check_seal, seal_of
from eamdeploy.eam.packing import pack_codes, pack_mask, unpack_codes, unpack_mask
from eamdeploy.eam.records import (
    FORMAT,
    MASK_AXES,
    AttentionShape,
    Calibration,
    Checkpoint,
    CheckpointHeader,
    FrozenFactors,
    FrozenMaps,
    split_rank,
    spread_mask,
)
from eamdeploy.eam.validation import check_header, validate
from eamdeploy.errors import CheckpointError, ConfigError, MissingDependency
from eamdeploy.vocabulary import Bits, Granularity

__all__ = [
    "AttentionShape",
    "Calibration",
    "Checkpoint",
    "CheckpointHeader",
    "FrozenFactors",
    "FrozenMaps",
    "load",
    "save",
]

_SUFFIXES: dict[Granularity, tuple[str, ...]] = {
    "head": ("heads", "codes", "scales"),
    "row": ("heads", "mask", "codes", "scales"),
    "entry": ("heads", "mask", "codes", "scales"),
}
_FACTORS = ("heads", "mix_codes", "mix_scales", "pool_codes", "pool_scales")
_UNSEALED = 1  # the format of before
_KNOWN = (_UNSEALED, 2, FORMAT)
_DTYPES = ("F16", "F32", "F64", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")


def save(checkpoint: Checkpoint, path: Path) -> CheckpointHeader:
    """`path` holds `checkpoint`, sealed, or is unchanged if that fails. The same checkpoint gives the same bytes.

    Returns:
        the header as the file has it, with its seal.

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
        codes = frozen.codes[spread_mask(frozen.mask, frozen.codes.shape)]
        tensors[f"eam.{module}.heads"] = frozen.heads
        tensors[f"eam.{module}.codes"] = pack_codes(codes, checkpoint.header.freezing.bits)
        tensors[f"eam.{module}.scales"] = frozen.scales
        if frozen.mask is not None:
            tensors[f"eam.{module}.mask"] = pack_mask(frozen.mask)
    bits = checkpoint.header.freezing.bits
    for module, groups in checkpoint.factors.items():
        for group in groups:
            tensors |= {
                f"eam.{module}.rank{group.rank}.{suffix}": tensor
                for suffix, tensor in zip(_FACTORS, _packed_factors(group, bits), strict=True)
            }
    contiguous = {key: np.ascontiguousarray(tensor).reshape(tensor.shape) for key, tensor in tensors.items()}
    header = checkpoint.header.model_copy(update={"format": FORMAT})
    seal = seal_of(json.loads(header.model_dump_json()), contiguous)
    sealed = header.model_copy(update={SEAL: seal})
    write_bytes(path, to_bytes(contiguous, metadata={"eam": sealed.model_dump_json()}))
    return sealed


def load(path: Path, *, verify: bool = True) -> Checkpoint:
    """The checkpoint in the file at `path`, validated, and if the file has a seal, as it was written.

    Args:
        verify: False for a file that was changed on purpose: its seal is not looked at.

    Raises:
        CheckpointError: the file is truncated, foreign, of an unknown format, was altered after it was written, or
            fails `validate`; the message names the file and the tensor or header key, expected and got.
        ConfigError: `path` can't be read.
        MissingDependency: safetensors is not installed.
    """
    text, tensors = _read(path)
    document = _parse_json(text, path)
    if verify:
        _check_seal(document, tensors, path)
    header = CheckpointHeader.parse(text, f"{path}: header metadata `eam`")
    check_header(header, str(path))
    weights = {key.removeprefix("model."): tensor for key, tensor in tensors.items() if key.startswith("model.")}
    modules, ranks = _group_by_module(tensors, header.freezing.granularity, path)
    frozen = {module: _unpack_maps(parts, module, header, path) for module, parts in modules.items()}
    factors: dict[str, tuple[FrozenFactors, ...]] = {}
    for module, rank in sorted(ranks):
        group = _unpack_factors(ranks[module, rank], module, rank, header, path)
        factors[module] = (*factors.get(module, ()), group)
    checkpoint = Checkpoint(weights, frozen, header, factors)
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
            f"{path} is damaged or no safetensors file",
            got=in_words(path, "safetensors", otherwise=err),
            hint="Copy or download it again.",
        ) from err


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    """The header as JSON, of a format that this version knows."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise CheckpointError(f"{path}: header metadata `eam` is no JSON", got=str(err)) from err
    number = document.get("format") if isinstance(document, dict) else None
    if not isinstance(document, dict) or type(number) is not int or number not in _KNOWN:
        raise CheckpointError(
            f"{path} has an unknown checkpoint format",
            expected=f"format {' or '.join(map(str, _KNOWN))}",
            got=repr(number),
            hint="It was written by another version of eamdeploy, or by another program.",
        )
    return document


def _check_seal(document: dict[str, Any], tensors: dict[str, NDArray[Any]], path: Path) -> None:
    if document["format"] == _UNSEALED and document.get(SEAL) is None:
        return
    hint = "Copy or make it again; or, if you changed it on purpose, use --no-verify."
    check_seal(document.get(SEAL), seal_of(document, tensors), str(path), hint)


_Parts: TypeAlias = dict[str, NDArray[Any]]


def _group_by_module(
    tensors: dict[str, NDArray[Any]], granularity: Granularity, path: Path
) -> tuple[dict[str, _Parts], dict[tuple[str, int], _Parts]]:
    """The tensors under `eam.`, each group with exactly those that it must have.

    Returns:
        by module path and suffix those of maps, which the granularity decides; by module path, rank and suffix those of
        heads of low rank.
    """
    suffixes = _SUFFIXES[granularity]
    modules: dict[str, _Parts] = {}
    ranks: dict[tuple[str, int], _Parts] = {}
    for key, tensor in tensors.items():
        if key.startswith("model.") and key != "model.":
            continue
        module, _, suffix = key.removeprefix("eam.").rpartition(".")
        of_rank = split_rank(module)
        known = suffixes if of_rank is None else _FACTORS
        if not key.startswith("eam.") or not module or suffix not in known:
            raise CheckpointError(
                f"{path}: unknown tensor {key}",
                expected=f"model.<timm state-dict key> or eam.<module>.{', .'.join(suffixes)}"
                f" for granularity {granularity}"
                f", or eam.<module>.rank<r>.{', .'.join(_FACTORS)}",
                got=key,
            )
        if of_rank is None:
            modules.setdefault(module, {})[suffix] = tensor
        else:
            ranks.setdefault(of_rank, {})[suffix] = tensor
    for module, parts in modules.items():
        _check_complete(f"eam.{module}", parts, suffixes, f" for granularity {granularity}", path)
    for (module, rank), parts in ranks.items():
        _check_complete(f"eam.{module}.rank{rank}", parts, _FACTORS, "", path)
    return modules, ranks


def _check_complete(name: str, parts: _Parts, suffixes: tuple[str, ...], why: str, path: Path) -> None:
    if missing := [suffix for suffix in suffixes if suffix not in parts]:
        raise CheckpointError(
            f"{path}: {name} is incomplete",
            expected=f"{', '.join(f'{name}.{suffix}' for suffix in suffixes)}{why}",
            got=f"no {', '.join(missing)}",
        )


def _packed_factors(group: FrozenFactors, bits: Bits) -> tuple[NDArray[Any], ...]:
    """The tensors of one rank in the order of `_FACTORS`."""
    mix, pool = pack_codes(group.mix_codes, bits), pack_codes(group.pool_codes, bits)
    return group.heads, mix, group.mix_scales, pool, group.pool_scales


def _unpack_factors(parts: _Parts, module: str, rank: int, header: CheckpointHeader, path: Path) -> FrozenFactors:
    """The factors of one rank of one module; checked no further than that needs."""
    attention = _attention_of(module, header, path)
    where, bits, heads = f"{path}: eam.{module}.rank{rank}", header.freezing.bits, parts["heads"]
    mix_shape = (heads.size, *attention.rows, rank)
    pool_shape = (heads.size, *attention.rows[:-1], rank, attention.tokens)
    return FrozenFactors(
        heads,
        unpack_codes(parts["mix_codes"], bits, mix_shape, where=f"{where}.mix_codes"),
        parts["mix_scales"],
        unpack_codes(parts["pool_codes"], bits, pool_shape, where=f"{where}.pool_codes"),
        parts["pool_scales"],
    )


def _attention_of(module: str, header: CheckpointHeader, path: Path) -> AttentionShape:
    attention = header.attention.get(module)
    if attention is None:
        raise CheckpointError(
            f"{path}: eam.{module} belongs to no attention module in the header",
            expected=f"one of {', '.join(header.attention)}",
            got=module,
        )
    return attention


def _unpack_maps(parts: dict[str, NDArray[Any]], module: str, header: CheckpointHeader, path: Path) -> FrozenMaps:
    """The maps of one module, their codes spread to where they belong; checked no further than that needs."""
    attention = _attention_of(module, header, path)
    where, bits = f"{path}: eam.{module}", header.freezing.bits
    heads, scales, tokens = parts["heads"], parts["scales"], attention.tokens
    shape = (heads.size, *attention.rows, tokens)
    if header.freezing.granularity == "head":
        return FrozenMaps(heads, unpack_codes(parts["codes"], bits, shape, where=f"{where}.codes"), scales)
    pieces = shape[:1] + (tokens,) * MASK_AXES[header.freezing.granularity]
    mask = unpack_mask(parts["mask"], pieces, where=f"{where}.mask")
    n_codes = np.count_nonzero(spread_mask(mask, (heads.size, tokens, tokens))) * attention.n_maps
    frozen_codes = unpack_codes(parts["codes"], bits, (int(n_codes),), where=f"{where}.codes")
    codes = np.zeros(shape, np.uint8)
    codes[spread_mask(mask, shape)] = frozen_codes
    return FrozenMaps(heads, codes, scales, mask)


def _missing_safetensors(path: Path) -> MissingDependency:
    return MissingDependency(
        f"the EAM checkpoint {path} needs the package safetensors, which is not installed here",
        hint="Install the host packages with: pip install 'eamdeploy[host]'.",
    )
