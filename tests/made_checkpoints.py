"""Checkpoints of any granularity, with and without windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import Freezing
from eamdeploy.eam.quantizers import quantize_rows
from eamdeploy.eam.records import AttentionShape, Checkpoint, FrozenMaps, spread_mask
from eamdeploy.vocabulary import Bits, Granularity, Quantizer

WindowMaps = Literal["shared", "class", "window"]

WINDOWS: dict[WindowMaps | None, list[int] | None] = {
    None: None,
    "shared": [0, 0, 0, 0],
    "class": [0, 1, 1, 2],
    "window": [0, 1, 2, 3],
}
"""Of a module with four windows, by window maps."""


def random_mask(rng: np.random.Generator, shape: tuple[int, ...], share: float = 0.4) -> NDArray[np.bool_]:
    """True with probability `share`, and at least once for every head."""
    mask = rng.random(shape) < share
    mask[:, -1] |= ~mask.reshape(shape[0], -1).any(axis=1).reshape(-1, *(1,) * (mask.ndim - 2))
    return mask


def frozen_maps(
    rng: np.random.Generator,
    shape: AttentionShape,
    heads: list[int],
    granularity: Granularity,
    bits: Bits = 3,
    quantizer: Quantizer = "squared",
) -> FrozenMaps:
    """Random maps of `heads`, of which a random part is frozen."""
    means = rng.dirichlet(np.full(shape.tokens, 0.5), size=(len(heads), *shape.rows))
    axes = {"head": 0, "row": 1, "entry": 2}[granularity]
    mask = random_mask(rng, (len(heads), *(shape.tokens,) * axes)) if axes else None
    codes, scales = quantize_rows(means, bits, quantizer, mask=spread_mask(mask, means.shape))
    return FrozenMaps(np.array(heads, np.int64), codes, scales, mask)


def with_frozen(
    base: Checkpoint,
    attention: Mapping[str, AttentionShape],
    frozen: dict[str, FrozenMaps],
    *,
    granularity: Granularity,
    window_maps: WindowMaps | None,
    bits: Bits = 3,
    quantizer: Quantizer = "squared",
) -> Checkpoint:
    """`base` with other attention modules and frozen maps, and a header that says so."""
    entries = sum(int(maps.frozen().sum()) * attention[path].n_windows for path, maps in frozen.items())
    freezing = Freezing(
        granularity=granularity,
        window_maps=window_maps,
        bits=bits,
        quantizer=quantizer,
        score="variance",
        sparsity_asked=None,
        sparsity=entries / sum(shape.heads * shape.n_windows * shape.tokens**2 for shape in attention.values()),
        heads={path: maps.heads.tolist() for path, maps in frozen.items()},
    )
    changes: dict[str, Any] = {"attention": dict(attention), "freezing": freezing}
    return Checkpoint(base.weights, frozen, base.header.model_copy(update=changes))


def make(base: Checkpoint, granularity: Granularity, window_maps: WindowMaps | None = None) -> Checkpoint:
    """Two modules of three heads and five tokens; of `blocks.1.attn` heads 0 and 2 have something frozen."""
    shape = AttentionShape(heads=3, tokens=5, windows=WINDOWS[window_maps])
    frozen = {"blocks.1.attn": frozen_maps(np.random.default_rng(1), shape, [0, 2], granularity)}
    attention = {"blocks.0.attn": shape, "blocks.1.attn": shape}
    return with_frozen(base, attention, frozen, granularity=granularity, window_maps=window_maps)
