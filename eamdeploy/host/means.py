"""The maps that freezing puts in place: means over images and windows, quantized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from eamdeploy.eam.checkpoint import FrozenFactors, FrozenMaps
from eamdeploy.eam.factors import factorize
from eamdeploy.eam.quantizers import quantize_rows
from eamdeploy.eam.records import spread_mask
from eamdeploy.eam.statistics import MapStatistics
from eamdeploy.host.sites import AttentionSite
from eamdeploy.vocabulary import Bits, Quantizer


def mean_maps(site: AttentionSite, statistics: Sequence[MapStatistics]) -> NDArray[np.float64]:
    """The mean maps of `site`, float64 `[H, N, N]`, or `[H, M, N, N]` with windows, of its M statistics."""
    if site.classes is None:
        return statistics[0].mean()
    return np.stack([each.mean() for each in statistics], axis=1)


def freeze_pieces(
    where: str, means: NDArray[np.float64], pieces: NDArray[np.bool_], bits: Bits, quantizer: Quantizer
) -> FrozenMaps:
    """The chosen pieces of `means`, quantized.

    Args:
        where: what errors call the module.
        means: float64 `[H, N, N]` or `[H, M, N, N]`.
        pieces: true for what is frozen, bool `[H]` (heads), `[H, N]` (rows) or `[H, N, N]` (entries).
    """
    heads = np.flatnonzero(pieces.reshape(len(pieces), -1).any(axis=1))
    mask = None if pieces.ndim == 1 else pieces[heads]
    rows = means[heads]
    spread = None if mask is None else spread_mask(mask, rows.shape)
    codes, scales = quantize_rows(rows, bits, quantizer, where=where, mask=spread)
    return FrozenMaps(heads, codes, scales, mask)


def freeze_factors(
    where: str,
    means: NDArray[np.float64],
    heads: NDArray[np.int64],
    rank: int,
    bits: Bits,
    quantizer: Quantizer,
) -> FrozenFactors:
    """The chosen heads of `means` as factors of one rank, quantized.

    Args:
        where: what errors call the module.
        means: float64 `[H, N, N]` or `[H, M, N, N]`.
        heads: ascending.

    Raises:
        ConfigError: the rank is above N.
    """
    chosen = means[heads]
    tokens = chosen.shape[-1]
    found = [factorize(each, rank, where) for each in chosen.reshape(-1, tokens, tokens)]
    mix, pool = (np.stack(each).reshape(*chosen.shape[:-2], *each[0].shape) for each in zip(*found, strict=True))
    mix_codes, mix_scales = quantize_rows(mix, bits, quantizer, where=where)
    pool_codes, pool_scales = quantize_rows(pool, bits, quantizer, where=where)
    return FrozenFactors(heads, mix_codes, mix_scales, pool_codes, pool_scales)
