"""Tiny models with heads of low rank beside live ones and whole maps, packed as from a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import KWARGS, NAME, SWIN_KWARGS, SWIN_NAME, SWIN_PATHS, TOKENS, make_model, save_weights

from eamdeploy import pack
from eamdeploy.eam.records import CheckpointHeader
from eamdeploy.host.maps_file import read_maps
from eamdeploy.host.model import ModelSpec

Arrays = dict[str, NDArray[Any]]
Plan = dict[str, tuple[tuple[int, ...], dict[int, tuple[int, ...]], tuple[int, ...]]]
"""By module path the heads with a whole map, those of each rank, and the axes for windows; others are live."""

WINDOW_TOKENS = 16
FOUR_HEADS = {"num_heads": (4, 4)}
PLANS: dict[str, Plan] = {
    "vit": {
        "blocks.0.attn": ((1,), {4: (2,)}, ()),
        "blocks.1.attn": ((), {1: (0,), 3: (1, 2)}, ()),
    },
    "vit of low rank alone": {
        "blocks.0.attn": ((), {4: (0, 1, 2)}, ()),
        "blocks.1.attn": ((), {2: (0, 1), 5: (2,)}, ()),
    },
    "swin": {
        SWIN_PATHS[1]: ((0,), {1: (2,), 3: (1,)}, (4,)),
        SWIN_PATHS[2]: ((), {2: (0, 1, 2, 3)}, (1,)),
        SWIN_PATHS[3]: ((1,), {4: (0,)}, (1,)),
    },
}
"""Layers that mix live heads, maps and ranks, and layers of low rank alone; maps by shift mask in the Swin."""


def rows(*shape: int) -> NDArray[np.float32]:
    """Rows along the last axis that sum to 1, few of their entries large."""
    *outer, keys = shape
    return np.random.default_rng(sum(shape)).dirichlet(np.full(keys, 0.3), outer).astype(np.float32)


def low_rank(path: str, heads: list[int], rank: int, tokens: int = TOKENS, windows: tuple[int, ...] = ()) -> Arrays:
    """Factors of a file for `pack`."""
    name = f"{path}.rank{rank}"
    return {
        f"{name}.heads": np.array(heads),
        f"{name}.mix": rows(len(heads), *windows, tokens, rank),
        f"{name}.pool": rows(len(heads), *windows, rank, tokens),
    }


def whole(path: str, heads: list[int], tokens: int = TOKENS, windows: tuple[int, ...] = ()) -> Arrays:
    """Maps of a file for `pack`."""
    return {f"{path}.heads": np.array(heads), f"{path}.maps": rows(len(heads), *windows, tokens, tokens)}


def packed(spec: ModelSpec, arrays: Arrays, output: Path, bits: Any = 4) -> CheckpointHeader:
    """`output` is the checkpoint of a file with these arrays."""
    file = output.with_name("maps.npz")
    np.savez(file, **arrays)  # type: ignore[arg-type]
    given = read_maps(file, bits, "squared")
    return pack(spec, given.maps, output, bits=bits, quantizer="squared", factors=given.factors)


def packed_plan(name: str, folder: Path, bits: Any = 3) -> Path:
    """A checkpoint of the plan in `folder`. Squares of 3-bit codes fit INT8, so no export quantizes them anew."""
    is_swin = name == "swin"
    model = make_model(SWIN_NAME, FOUR_HEADS) if is_swin else make_model()
    weights = save_weights(model, folder / "weights.safetensors")
    spec = ModelSpec(
        *((SWIN_NAME, str(weights), {**SWIN_KWARGS, **FOUR_HEADS}) if is_swin else (NAME, str(weights), KWARGS))
    )
    tokens = WINDOW_TOKENS if is_swin else TOKENS
    arrays: Arrays = {}
    for path, (maps, ranks, windows) in PLANS[name].items():
        if maps:
            arrays |= whole(path, list(maps), tokens, windows)
        for rank, heads in ranks.items():
            arrays |= low_rank(path, list(heads), rank, tokens, windows)
    packed(spec, arrays, folder / "x.eam.safetensors", bits)
    return folder / "x.eam.safetensors"
