"""Read the factors of heads of low rank that somebody's own EAM training wrote, for `pack`.

They stand in the file of maps (`maps_file`), for every attention module and rank r:

| array | dtype, shape | holds |
|---|---|---|
| `<module path>.rank<r>.heads` | integers [G] | which heads have this rank |
| `<module path>.rank<r>.mix` | float [G, N, r] | how much of each pooled token a query gets |
| `<module path>.rank<r>.pool` | float [G, r, N] | which tokens each pooled token is made of |
| `….mix_codes`, `….pool_codes` | integers of these shapes | in place of floats: codes, kept |

All rows sum to 1. In a model with windows, they are [G, M, N, r] and [G, M, r, N], with M as for
maps; without that axis, M is 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.eam.maps import check_maps
from eamdeploy.eam.quantizers import quantize_rows
from eamdeploy.eam.records import FrozenFactors
from eamdeploy.errors import CheckpointError
from eamdeploy.host.given_rows import check_given_heads, read_codes, whole_row_scales
from eamdeploy.vocabulary import Bits, Quantizer

FACTOR_ARRAYS = ("heads", "mix", "mix_codes", "pool", "pool_codes")


def read_factors(
    parts: dict[str, NDArray[Any]], where: str, rank: int, bits: Bits, quantizer: Quantizer
) -> FrozenFactors:
    """The factors of the heads of one module that have this rank, with heads ascending.

    Args:
        parts: the arrays by the last part of their names, some of `FACTOR_ARRAYS`.
        where: what errors call the module and the rank.

    Raises:
        CheckpointError: an array is missing or misshapen, the rank is another one or above the
            tokens, a head is given twice, a code is out of range, or a row does not sum to 1.
    """
    doubled = [part for part in ("mix", "pool") if (part in parts) == (f"{part}_codes" in parts)]
    if "heads" not in parts or doubled:
        raise CheckpointError(
            f"{where} is incomplete",
            expected="heads, either mix or mix_codes, and either pool or pool_codes",
            got=", ".join(sorted(parts)),
        )
    heads = parts["heads"]
    check_given_heads(heads, f"{where}.heads", "G")
    mix_name, pool_name = (name if name in parts else f"{name}_codes" for name in ("mix", "pool"))
    mix, pool = parts[mix_name], parts[pool_name]
    _check_shapes(mix, pool, len(heads), rank, where)
    mix_codes, mix_scales = _quantized(mix, where, mix_name, bits, quantizer)
    pool_codes, pool_scales = _quantized(pool, where, pool_name, bits, quantizer)
    order = np.argsort(heads)
    return FrozenFactors(
        heads[order].astype(np.int64),
        mix_codes[order],
        mix_scales[order],
        pool_codes[order],
        pool_scales[order],
    )


def _check_shapes(mix: NDArray[Any], pool: NDArray[Any], heads: int, rank: int, where: str) -> None:
    """Mix and pool are of one module's heads with that rank."""
    if pool.ndim in (3, 4) and rank > pool.shape[-1] > 0:
        raise CheckpointError(
            f"{where}: the rank is above the tokens",
            expected=f"a rank in 1…{pool.shape[-1]}, the tokens of the pool {list(pool.shape)}",
            got=rank,
            hint="A head of that many pooled tokens saves nothing: give its whole map.",
        )
    windows, tokens = mix.shape[1:-2], mix.shape[-2] if mix.ndim in (3, 4) else 0
    right = (heads, *windows, tokens, rank), (heads, *windows, rank, tokens)
    if not tokens or (mix.shape, pool.shape) != right:
        raise CheckpointError(
            f"{where}: mix and pool have the wrong shapes",
            expected=f"[{heads}, N, {rank}] and [{heads}, {rank}, N],"
            f" or [{heads}, M, N, {rank}] and [{heads}, M, {rank}, N] with windows",
            got=f"{list(mix.shape)} and {list(pool.shape)}",
            hint="The number behind `rank` in the name is the number of pooled tokens.",
        )


def _quantized(
    values: NDArray[Any], where: str, name: str, bits: Bits, quantizer: Quantizer
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes and scales of floats, or of codes, where the name says so."""
    if not name.endswith("_codes"):
        check_maps(values, where, "mixes" if name == "mix" else "pools")
        return quantize_rows(values, bits, quantizer, where=where)
    whole = np.broadcast_to(np.True_, values.shape)
    shape = "[G, N, r]" if name.startswith("mix") else "[G, r, N]"
    codes = read_codes(values, whole, f"{where}.{name}", shape, bits)
    scales = whole_row_scales(codes, whole, f"{where}.{name}", quantizer)
    return codes, scales.astype(np.float32)
