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

The same file may hold factors of heads of low rank, see `factors_file`; a head has either a map or factors.

What is not frozen is ignored, so it may hold anything. The scale of a row that is frozen whole is 1 ÷ Σ code²
(`squared`) or 1 ÷ Σ code (`uniform`), so that it sums to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.file_kinds import in_words
from eamdeploy.artifacts.files import is_file
from eamdeploy.artifacts.npz import read_npz
from eamdeploy.eam.quantizers import quantize_rows
from eamdeploy.eam.records import FrozenFactors, FrozenMaps, split_rank, spread_mask
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.host.factors_file import FACTOR_ARRAYS, read_factors
from eamdeploy.host.given_rows import check_given_heads, read_codes, whole_row_scales
from eamdeploy.vocabulary import Bits, Quantizer

_HINT = (
    "Write the maps again, with numpy.savez or safetensors.numpy.save_file; "
    "docs/reference/formats.md says which arrays."
)
_KINDS = ("heads", "maps", "codes", "mask", "scales")


_Parts = dict[str, NDArray[Any]]


class GivenMaps(NamedTuple):
    """What is frozen of the modules in the file, by module path, with heads ascending.

    Attributes:
        maps: whole maps, or rows or entries of them.
        factors: heads of low rank, ranks ascending.
    """

    maps: dict[str, FrozenMaps]
    factors: dict[str, tuple[FrozenFactors, ...]]


def read_maps(path: Path, bits: Bits, quantizer: Quantizer) -> GivenMaps:
    """The frozen maps and factors in the file.

    Raises:
        ConfigError: the file can't be read or has another suffix.
        CheckpointError: it is damaged, an array is missing, unknown or misshapen, a code out of range, a head given
            twice, or a row of a map or of a factor does not sum to 1.
    """
    modules, ranks = _by_module(_read_arrays(path), path)
    maps = {module: _module_maps(parts, f"{path}: {module}", bits, quantizer) for module, parts in modules.items()}
    factors: dict[str, tuple[FrozenFactors, ...]] = {}
    for module, rank in sorted(ranks):
        group = read_factors(ranks[module, rank], f"{path}: {module}.rank{rank}", rank, bits, quantizer)
        factors[module] = (*factors.get(module, ()), group)
    for module in factors:
        _check_apart(maps.get(module), factors[module], f"{path}: {module}")
    return GivenMaps(maps, factors)


def _by_module(
    arrays: Mapping[str, NDArray[Any]], path: Path
) -> tuple[dict[str, _Parts], dict[tuple[str, int], _Parts]]:
    """The arrays of maps by module, and those of factors by module and rank, each by the last part of its name."""
    modules: dict[str, _Parts] = {}
    ranks: dict[tuple[str, int], _Parts] = {}
    for key, array in arrays.items():
        module, _, kind = key.rpartition(".")
        of_rank = split_rank(module)
        if not module or kind not in (_KINDS if of_rank is None else FACTOR_ARRAYS) or _is_no_rank(module):
            raise CheckpointError(
                f"{path}: unknown array {key}",
                expected=f"<module path>.{', .'.join(_KINDS)},"
                f" or <module path>.rank<r>.{', .'.join(FACTOR_ARRAYS)} with r from 1 on",
                got=key,
                hint=_HINT,
            )
        if of_rank is None:
            modules.setdefault(module, {})[kind] = array
        else:
            ranks.setdefault(of_rank, {})[kind] = array
    if not modules and not ranks:
        raise CheckpointError(
            f"{path} holds no maps",
            expected="<module path>.heads and .maps or .codes, or <module path>.rank<r>.heads, .mix and .pool",
        )
    return modules, ranks


def _is_no_rank(module: str) -> bool:
    """Whether the name ends like that of a rank but has none: `rank0`, `rank04`, `rank`."""
    return module.rpartition(".")[2].startswith("rank") and split_rank(module) is None


def _check_apart(maps: FrozenMaps | None, groups: tuple[FrozenFactors, ...], where: str) -> None:
    """No head of a module has both a map and factors, or factors of two ranks."""
    found: dict[int, str] = {} if maps is None else dict.fromkeys(maps.heads.tolist(), "heads")
    for group in groups:
        name = f"rank{group.rank}.heads"
        for head in group.heads.tolist():
            if head in found:
                raise CheckpointError(
                    f"{where}: head {head} is frozen twice",
                    expected="a head in one of these arrays",
                    got=f"{head} in .{found[head]} and in .{name}",
                    hint="Leave the head out of one of the two, with its maps or its factors.",
                )
            found[head] = name


def _module_maps(parts: _Parts, where: str, bits: Bits, quantizer: Quantizer) -> FrozenMaps:
    if "heads" not in parts or ("maps" in parts) == ("codes" in parts):
        raise CheckpointError(
            f"{where} is incomplete", expected="heads, and either maps or codes", got=", ".join(sorted(parts))
        )
    heads, values = parts["heads"], parts["maps"] if "maps" in parts else parts["codes"]
    check_given_heads(heads, f"{where}.heads", "F")
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
        codes = read_codes(values, frozen, f"{where}.codes", "[F, N, N]", bits)
        scales = whole_row_scales(codes, frozen, f"{where}.codes", quantizer) if scales is None else scales[order]
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


def _read_scales(parts: _Parts, where: str, rows: tuple[int, ...]) -> NDArray[Any] | None:
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
