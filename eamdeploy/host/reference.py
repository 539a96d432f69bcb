"""The reference forward of an EAM checkpoint in torch: the meaning that every engine is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from eamdeploy.eam.checkpoint import Checkpoint
from eamdeploy.errors import CheckpointError
from eamdeploy.host.attention import AttentionSite, attention_sites, freeze_attention
from eamdeploy.host.model import RANDOM, ModelSpec, load_model, load_weights


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
    if frozen:
        maps = {
            path: (torch.from_numpy(item.heads), torch.from_numpy(item.maps(header.freezing.quantizer)))
            for path, item in checkpoint.frozen.items()
        }
        freeze_attention(model, maps)
    return LoadedModel(model, sites)
