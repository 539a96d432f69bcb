"""Which of the sets that a score proposes is frozen: the one that costs least as a whole.

Costs of pieces add up only nearly (see `eam.effects`), so a proposed set is run as a whole on the calibration images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eamdeploy.artifacts.card import FreezingCost, Preprocessing
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.records import FrozenMaps
from eamdeploy.eam.selection import Selection
from eamdeploy.host.attention import FrozenAttention, replaced_attention
from eamdeploy.host.calibrate import Seen, as_tensors
from eamdeploy.host.means import freeze_pieces, mean_maps
from eamdeploy.host.reference import constants_of
from eamdeploy.host.sites import AttentionSite, attention_shapes
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT, Observer
from eamdeploy.parity.accuracy import kl_divergence, same_top1

_BATCH = 16


@dataclass(frozen=True, eq=False)
class Chosen:
    """What is frozen.

    Attributes:
        frozen: the quantized maps, by attention module path.
        cost: of the whole set on the calibration images; None where it was not measured.
    """

    selection: Selection
    frozen: dict[str, FrozenMaps]
    cost: FreezingCost | None


def choose(
    model: Any,
    sites: list[AttentionSite],
    seen: Seen,
    images: ImageSource,
    how: Preprocessing,
    selections: Sequence[Selection],
    options: FreezeOptions,
    observer: Observer,
    *,
    always_measure: bool,
) -> Chosen:
    """The selection whose maps, quantized, change the model's answers least; of equal ones the first.

    Args:
        selections: at least one.
        always_measure: measure the cost of a single one, too.
    """
    stored = [_freeze(sites, seen, each, options) for each in selections]
    if len(stored) == 1 and not always_measure:
        return Chosen(selections[0], stored[0], None)
    costs = _measure(model, sites, seen, images, how, stored, options, observer)
    best = min(range(len(costs)), key=lambda index: costs[index].kl)
    return Chosen(selections[best], stored[best], costs[best])


def _freeze(
    sites: list[AttentionSite], seen: Seen, selection: Selection, options: FreezeOptions
) -> dict[str, FrozenMaps]:
    return {
        site.path: freeze_pieces(
            site.path,
            mean_maps(site, seen.statistics[site.path]),
            selection.pieces[site.path],
            options.bits,
            options.quantizer,
        )
        for site in sites
        if site.path in selection.pieces
    }


@torch.inference_mode()
def _measure(
    model: Any,
    sites: list[AttentionSite],
    seen: Seen,
    images: ImageSource,
    how: Preprocessing,
    stored: Sequence[Mapping[str, FrozenMaps]],
    options: FreezeOptions,
    observer: Observer,
) -> list[FreezingCost]:
    """What each set of frozen maps costs as a whole on all calibration images."""
    attention = attention_shapes(sites, options.window_maps)
    sets = [
        {path: FrozenAttention(model.get_submodule(path), *each) for path, each in constants.items()}
        for constants in (constants_of(maps, options.quantizer, attention) for maps in stored)
    ]
    divergence: list[list[NDArray[np.float64]]] = [[] for _ in sets]
    same: list[list[NDArray[np.bool_]]] = [[] for _ in sets]
    done = 0
    for batch in as_tensors(images.batches(seen.folder, how, _BATCH, SILENT), how):
        live = model(batch).numpy()
        for modules, kls, equals in zip(sets, divergence, same, strict=True):
            with replaced_attention(model, modules):
                changed = model(batch).numpy()
            kls.append(kl_divergence(live, changed))
            equals.append(same_top1(live, changed))
        done += len(batch)
        observer.progress("cost of the frozen set", done, len(seen.folder.files))
    return [
        FreezingCost(
            n_images=done,
            kl=float(np.concatenate(kls).mean()),
            agreement=float(np.concatenate(equals).mean() * 100),
        )
        for kls, equals in zip(divergence, same, strict=True)
    ]
