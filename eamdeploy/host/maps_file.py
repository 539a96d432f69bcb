"""Read the frozen maps that somebody's own EAM training wrote, for `pack`.

A safetensors or .npz file, with these arrays for every attention module that has frozen heads:

| array | dtype, shape | holds |
|---|---|---|
| `<module path>.heads` | integers [F] | which heads have something frozen |
| `<module path>.maps` | float [F, N, N] | their maps, rows summing to 1; quantized here |
| `<module path>.codes` | integers [F, N, N] | or their codes, kept as they are, each in 0 … 2^bits − 1 |
| `<module path>.mask` | bool or 0 and 1, [F, N] or [F, N, N] | which rows or entries are frozen; all without it |
| `<module path>.scales` | float [F, N] | with codes and a mask of entries: one scale per row |

In a model with windows, maps and codes are [F, M, N, N] and scales [F, M, N] with M = 1 (all windows share a map), one
for each shift mask (numbered as they first occur, row by row), or one for each window; without that axis, M is 1. The
mask is the same for all M. The axes of the mask say what is frozen as one piece, alike for all modules.

What is not frozen is ignored, so it may hold anything. The scale of a row that is frozen whole is 1 ÷ Σ code²
(`squared`) or 1 ÷ Σ code (`uniform`), so that it sums to 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.file_kinds import in_words
from eamdeploy.artifacts.files import is_file
from eamdeploy.artifacts.npz import read_npz
from eamdeploy.eam.quantizers import integer_values, quantize_rows
from eamdeploy.eam.records import FrozenMaps, spread_mask
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.vocabulary import Bits, Quantizer

_HINT = (
    "Write the maps again, with numpy.savez or safetensors.numpy.save_file; "
    "docs/reference/formats.md says which arrays."
)
_KINDS = ("heads", "maps", "codes", "mask", "scales")


def read_maps(path: Path, bits: Bits, quantizer: Quantizer) -> dict[str, FrozenMaps]:
    """The frozen maps in the file, by module path, with heads ascending.

    Raises:
        ConfigError: the file can't be read or has another suffix.
        CheckpointError: it is damaged, an array is missing, unknown or misshapen, a code out of range, a head given
            twice, or a row of a map does not sum to 1.
    """
    arrays = _read_arrays(path)
    modules: dict[str, dict[str, NDArray[Any]]] = {}
    for key, array in arrays.items():
        module, _, kind = key.rpartition(".")
        if not module or kind not in _KINDS:
            raise CheckpointError(
                f"{path}: unknown array {key}", expected=f"<module path>.{', .'.join(_KINDS)}", got=key
            )
        modules.setdefault(module, {})[kind] = array
    if not modules:
        raise CheckpointError(f"{path} holds no maps", expected="<module path>.heads and .maps or .codes")
    return {module: _module_maps(parts, f"{path}: {module}", bits, quantizer) for module, parts in modules.items()}


def _module_maps(parts: dict[str, NDArray[Any]], where: str, bits: Bits, quantizer: Quantizer) -> FrozenMaps:
    if "heads" not in parts or ("maps" in parts) == ("codes" in parts):
        raise CheckpointError(
            f"{where} is incomplete", expected="heads, and either maps or codes", got=", ".join(sorted(parts))
        )
    heads, values = parts["heads"], parts["maps"] if "maps" in parts else parts["codes"]
    if heads.ndim != 1 or not np.issubdtype(heads.dtype, np.integer) or len(np.unique(heads)) != len(heads):
        raise CheckpointError(f"{where}.heads", expected="distinct integers [F]", got=heads.tolist())
    if values.ndim not in (3, 4) or len(values) != len(heads) or values.shape[-2] != values.shape[-1]:
        raise CheckpointError(
            f"{where} has maps of the wrong shape",
            expected=f"[{len(heads)}, N, N], or [{len(heads)}, M, N, N] with windows",
            got=list(values.shape),
        )
    mask = _read_mask(parts["mask"], where, len(heads), values.shape[-1]) if "mask" in parts else None
    scales = _read_scales(parts, where, values.shape[:-1])
    order = np.argsort(heads)
    values, mask = values[order], None if mask is None else mask[order]
    frozen = spread_mask(mask, values.shape)
    if "maps" in parts:
        if np.issubdtype(values.dtype, np.floating):
            values = _completed(values, frozen)
        codes, scales = quantize_rows(values, bits, quantizer, where=where, mask=frozen)
    else:
        codes = _read_codes(values, frozen, f"{where}.codes", bits)
        scales = _whole_row_scales(codes, frozen, where, quantizer) if scales is None else scales[order]
        scales = np.where(frozen.any(axis=-1), scales, 0).astype(np.float32)
    return FrozenMaps(heads[order].astype(np.int64), codes, scales, mask)


def _read_mask(mask: NDArray[Any], where: str, heads: int, tokens: int) -> NDArray[np.bool_]:
    if mask.shape not in ((heads, tokens), (heads, tokens, tokens)):
        raise CheckpointError(
            f"{where}.mask has the wrong shape",
            expected=f"[{heads}, {tokens}] (rows) or [{heads}, {tokens}, {tokens}] (entries)",
            got=list(mask.shape),
        )
    if not np.isin(mask, (0, 1)).all():
        raise CheckpointError(f"{where}.mask", expected="true and false, or 0 and 1", got=np.unique(mask)[:5].tolist())
    frozen = mask.astype(np.bool_)
    empty = ~frozen.reshape(heads, -1).any(axis=1)
    if empty.any():
        raise CheckpointError(
            f"{where}.mask: nothing of the head at index {int(empty.argmax())} is frozen",
            expected="at least one row or entry of every head",
        )
    return frozen


def _read_scales(parts: dict[str, NDArray[Any]], where: str, rows: tuple[int, ...]) -> NDArray[Any] | None:
    """The scales where the file must give them: with codes of entries, whose sum is not known otherwise."""
    needed = "codes" in parts and "mask" in parts and parts["mask"].ndim == 3
    if needed != ("scales" in parts):
        raise CheckpointError(
            f"{where}.scales {'are missing' if needed else 'are of no use'}",
            expected="scales together with codes and a mask of entries, where rows do not sum to 1",
            got=", ".join(sorted(parts)),
        )
    if not needed:
        return None
    scales = parts["scales"]
    if scales.shape != rows or not np.issubdtype(scales.dtype, np.floating):
        raise CheckpointError(
            f"{where}.scales", expected=f"floating point {list(rows)}", got=f"{scales.dtype} {list(scales.shape)}"
        )
    return scales


def _completed(maps: NDArray[Any], frozen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`maps` with what is not frozen replaced by equal values that bring every row to sum 1."""
    kept = np.where(frozen, maps, 0).astype(np.float64)
    live = np.count_nonzero(~frozen, axis=-1, keepdims=True)
    rest = np.maximum(1 - kept.sum(axis=-1, keepdims=True), 0) / np.maximum(live, 1)
    return np.where(frozen, kept, rest)


def _read_codes(codes: NDArray[Any], frozen: NDArray[np.bool_], where: str, bits: Bits) -> NDArray[np.uint8]:
    """The codes, 0 where nothing is frozen."""
    largest = 2**bits - 1
    if codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise CheckpointError(
            f"{where} are no codes", expected="integers [F, N, N]", got=f"{codes.dtype} {list(codes.shape)}"
        )
    kept = np.where(frozen, codes, 0)
    if kept.min() < 0 or kept.max() > largest:
        raise CheckpointError(
            f"{where} out of range",
            expected=f"integers in 0 … {largest} ({bits} bits)",
            got=f"{kept.min()} … {kept.max()}",
            hint="See --bits.",
        )
    return kept.astype(np.uint8)


def _whole_row_scales(
    codes: NDArray[np.uint8], frozen: NDArray[np.bool_], where: str, quantizer: Quantizer
) -> NDArray[np.float64]:
    sums = integer_values(codes, quantizer).sum(axis=-1, dtype=np.int64)
    if (frozen.any(axis=-1) & (sums == 0)).any():
        raise CheckpointError(f"{where}.codes: a row has no code but 0", expected="rows that can sum to 1")
    scales: NDArray[np.float64] = 1 / np.maximum(sums, 1)
    return scales


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if path.suffix not in (".npz", ".safetensors"):
        raise ConfigError(f"cannot read maps from {path}", expected="a .npz or .safetensors file", got=path.suffix)
    if not is_file(path):
        raise ConfigError(f"no file of maps at {path}")
    if path.suffix == ".npz":
        return read_npz(path, ".npz file", _HINT)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays: dict[str, NDArray[Any]] = load_file(path)
    except (OSError, SafetensorError, TypeError, AttributeError) as err:  # the last two: types that numpy does not have
        got = in_words(path, "safetensors", otherwise=err)
        raise CheckpointError(f"{path} is damaged or no safetensors file", got=got, hint=_HINT) from err
    return arrays
