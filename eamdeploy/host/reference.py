"""The reference forward of an EAM checkpoint in torch: the meaning that every engine is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from eamdeploy.eam.checkpoint import (
    AttentionShape,
    Checkpoint,
    CheckpointHeader,
    FrozenFactors,
    FrozenMaps,
)
from eamdeploy.errors import CheckpointError
from eamdeploy.host.attention import Constants, Factors, attention_sites, freeze_attention
from eamdeploy.host.model import RANDOM, ModelSpec, load_model, load_weights
from eamdeploy.host.sites import AttentionSite, window_maps
from eamdeploy.vocabulary import Quantizer


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model in torch.

    Attributes:
        model: in evaluation mode, float32; frozen or not, as asked.
        sites: its attention modules.
    """

    model: Any
    sites: list[AttentionSite]


def load_reference(checkpoint: Checkpoint, *, frozen: bool, where: str) -> LoadedModel:
    """The checkpoint's model with its frozen maps in place, or with all of its attention live.

    Args:
        where: what errors call the checkpoint.

    Raises:
        CheckpointError: timm's architecture of that name does not have these weights or attention modules.
        UnsupportedGraph: the architecture is not supported.
    """
    header = checkpoint.header
    model = load_model(ModelSpec(header.timm_model, RANDOM, header.timm_kwargs))
    weights = {key: torch.from_numpy(value) for key, value in checkpoint.weights.items()}
    load_weights(model, weights, where)
    sites = attention_sites(model)
    _check_sites(header, sites, where)
    if frozen:
        constants = constants_of(checkpoint.frozen, header.freezing.quantizer, header.attention, checkpoint.factors)
        freeze_attention(model, constants)
    return LoadedModel(model, sites)


def constants_of(
    frozen: Mapping[str, FrozenMaps],
    quantizer: Quantizer,
    attention: Mapping[str, AttentionShape],
    factors: Mapping[str, tuple[FrozenFactors, ...]] = MappingProxyType({}),
) -> dict[str, Constants]:
    """What is frozen as torch's attention takes it, by module path.

    Args:
        attention: of every module, for the windows that share a map.
        factors: heads of low rank.
    """
    return {
        path: constants_of_module(frozen.get(path), factors.get(path, ()), quantizer, shape)
        for path, shape in attention.items()
        if path in frozen or path in factors
    }


def constants_of_module(
    maps: FrozenMaps | None, factors: Sequence[FrozenFactors], quantizer: Quantizer, shape: AttentionShape
) -> Constants:
    """What is frozen in one attention module, as torch's attention takes it."""
    no_maps = np.zeros((0, *shape.rows, shape.tokens), np.float32)
    mask = None if maps is None else maps.mask
    return Constants(
        heads=torch.from_numpy(np.zeros(0, np.int64) if maps is None else maps.heads),
        maps=torch.from_numpy(no_maps if maps is None else maps.maps(quantizer)),
        mask=None if mask is None else torch.from_numpy(mask),
        windows=None if shape.windows is None else tuple(shape.windows),
        factors=tuple(_factors(group, quantizer) for group in factors),
    )


def _factors(group: FrozenFactors, quantizer: Quantizer) -> Factors:
    return Factors(
        torch.from_numpy(group.heads),
        torch.from_numpy(group.mix(quantizer)),
        torch.from_numpy(group.pool(quantizer)),
    )


def _check_sites(header: CheckpointHeader, sites: list[AttentionSite], where: str) -> None:
    """The header's attention modules are the model's, with the same heads, tokens and windows."""
    mode = header.freezing.window_maps
    expected = {path: (shape.heads, shape.tokens) for path, shape in header.attention.items()}
    got = {site.path: (site.heads, site.tokens) for site in sites}
    if expected != got:
        path = next(p for p in [*expected, *got] if expected.get(p) != got.get(p))
        raise CheckpointError(
            f"{where} does not fit timm's {header.timm_model}: heads and tokens of {path}",
            expected=expected.get(path, "no such module"),
            got=got.get(path, "no such module"),
            hint="It was made with another model, or with other --model-kwargs.",
        )
    for site in sites:
        used, own = header.attention[site.path].windows, window_maps(site, mode or "shared")
        if (None if used is None else tuple(used)) != own:
            raise CheckpointError(
                f"{where} does not fit timm's {header.timm_model}: windows of {site.path} (window_maps: {mode})",
                expected=_windows(used),
                got=_windows(own),
                hint="It was made with another model, or with other --model-kwargs or --window-maps.",
            )


def _windows(used: Sequence[int] | None) -> str:
    if used is None:
        return "no windows"
    return f"{len(used)} windows with maps {', '.join(map(str, used[:16]))}{', …' if len(used) > 16 else ''}"
