"""Read the frozen maps that somebody's own EAM training wrote, for `pack`.

A safetensors or .npz file, with these arrays for every attention module that has frozen heads:

| array | dtype, shape | holds |
|---|---|---|
| `<module path>.heads` | integers [F] | which heads are frozen |
| `<module path>.maps` | float [F, N, N] | their maps, rows summing to 1; quantized here |
| `<module path>.codes` | integers [F, N, N] | or their codes, kept as they are, each in 0 … 2^bits − 1 |

With codes, the scale of a row is 1 ÷ Σ code² (`squared`) or 1 ÷ Σ code (`uniform`), so that it sums to 1.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.eam.checkpoint import FrozenMaps
from eamdeploy.eam.quantizers import Bits, Quantizer, integer_values, quantize_rows
from eamdeploy.errors import CheckpointError, ConfigError


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
        if not module or kind not in ("heads", "maps", "codes"):
            raise CheckpointError(
                f"{path}: unknown array {key}", expected="<module path>.heads, .maps or .codes", got=key
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
    if values.ndim != 3 or len(values) != len(heads) or values.shape[1] != values.shape[2]:
        raise CheckpointError(
            f"{where} has maps of the wrong shape", expected=f"[{len(heads)}, N, N]", got=list(values.shape)
        )
    order = np.argsort(heads)
    heads, values = heads[order].astype(np.int64), values[order]
    if "maps" in parts:
        codes, scales = quantize_rows(values, bits, quantizer, where=where)
        return FrozenMaps(heads, codes, scales)
    return FrozenMaps(heads, *_check_codes(values, f"{where}.codes", bits, quantizer))


def _check_codes(
    codes: NDArray[Any], where: str, bits: Bits, quantizer: Quantizer
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    largest = 2**bits - 1
    if codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise CheckpointError(
            f"{where} are no codes", expected="integers [F, N, N]", got=f"{codes.dtype} {list(codes.shape)}"
        )
    if codes.min() < 0 or codes.max() > largest:
        raise CheckpointError(
            f"{where} out of range",
            expected=f"integers in 0 … {largest} ({bits} bits)",
            got=f"{codes.min()} … {codes.max()}",
            hint="See --bits.",
        )
    small = codes.astype(np.uint8)
    sums = integer_values(small, quantizer).sum(axis=-1, dtype=np.int64)
    if (sums == 0).any():
        raise CheckpointError(f"{where}: a row has no code but 0", expected="rows that can sum to 1")
    return small, (1 / sums).astype(np.float32)


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if path.suffix not in (".npz", ".safetensors"):
        raise ConfigError(f"cannot read maps from {path}", expected="a .npz or .safetensors file", got=path.suffix)
    if not path.is_file():
        raise ConfigError(f"no file of maps at {path}")
    try:
        if path.suffix == ".npz":
            archive = np.load(path, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array, not an archive of named arrays")
            with archive:
                return dict(archive)
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as err:
        raise CheckpointError(f"{path} is damaged or no .npz file", got=str(err)) from err
    try:
        arrays: dict[str, NDArray[Any]] = load_file(path)
    except (OSError, SafetensorError, TypeError) as err:  # TypeError: bfloat16, which numpy does not have
        raise CheckpointError(f"{path} is damaged or no safetensors file", got=str(err)) from err
    return arrays
