"""Which of the sets that a score proposes is frozen: the one that costs least as a whole.

Costs of pieces add up only nearly (see `eam.effects`), so a proposed set is run as a whole on the calibration images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eamdeploy.artifacts.card import FreezingCost, Preprocessing
from eamdeploy.eam.kinds import Kind
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.records import FrozenFactors, FrozenMaps
from eamdeploy.eam.selection import Selection
from eamdeploy.host.attention import FrozenAttention, replaced_attention
from eamdeploy.host.calibrate import Seen, as_tensors
from eamdeploy.host.means import freeze_factors, freeze_pieces, mean_maps
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
        factors: the quantized factors of heads of low rank, by attention module path.
    """

    selection: Selection
    frozen: dict[str, FrozenMaps]
    cost: FreezingCost | None
    factors: dict[str, tuple[FrozenFactors, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Stored:
    """A selection's quantized maps and factors."""

    frozen: dict[str, FrozenMaps]
    factors: dict[str, tuple[FrozenFactors, ...]]


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
    kinds: Mapping[str, tuple[Kind, ...]] = MappingProxyType({}),
    saved: Mapping[str, NDArray[np.float64]] | None = None,
) -> Chosen:
    """The selection whose maps, quantized, change the model's answers least; of equal ones the first.

    Args:
        selections: at least one.
        always_measure: measure the cost of a single one, too.
        kinds: what every head of a module would be frozen to; a module that is not there has whole maps.
        saved: multiply-adds that freezing each head saves; then the selection with the least change for each of them is
            taken.
    """
    stored = [_freeze(sites, seen, each, kinds, options) for each in selections]
    if len(stored) == 1 and not always_measure:
        return Chosen(selections[0], stored[0].frozen, None, stored[0].factors)
    costs = _measure(model, sites, seen, images, how, stored, options, observer)
    weights = [1.0 if saved is None else _saved_by(each, saved) for each in selections]
    best = min(range(len(costs)), key=lambda index: costs[index].kl / weights[index])
    return Chosen(selections[best], stored[best].frozen, costs[best], stored[best].factors)


def _saved_by(selection: Selection, saved: Mapping[str, NDArray[np.float64]]) -> float:
    """Multiply-adds that a selection of heads saves; 1 for one of none."""
    return float(sum(saved[path][pieces].sum() for path, pieces in selection.pieces.items())) or 1.0


def _freeze(
    sites: list[AttentionSite],
    seen: Seen,
    selection: Selection,
    kinds: Mapping[str, tuple[Kind, ...]],
    options: FreezeOptions,
) -> _Stored:
    frozen: dict[str, FrozenMaps] = {}
    factors: dict[str, tuple[FrozenFactors, ...]] = {}
    for path, site in ((site.path, site) for site in sites if site.path in selection.pieces):
        means, pieces = mean_maps(site, seen.statistics[path]), selection.pieces[path]
        ranks = np.array([kind or 0 for kind in kinds.get(path, (None,) * site.heads)])
        whole = pieces & (ranks == 0).reshape(-1, *(1,) * (pieces.ndim - 1))
        if whole.any():
            frozen[path] = freeze_pieces(path, means, whole, options.bits, options.quantizer)
        groups = [
            freeze_factors(path, means, np.flatnonzero(pieces & (ranks == rank)), rank, options.bits, options.quantizer)
            for rank in sorted(set(ranks[ranks > 0].tolist()))
            if (pieces & (ranks == rank)).any()
        ]
        if groups:
            factors[path] = tuple(groups)
    return _Stored(frozen, factors)


@torch.inference_mode()
def _measure(
    model: Any,
    sites: list[AttentionSite],
    seen: Seen,
    images: ImageSource,
    how: Preprocessing,
    stored: Sequence[_Stored],
    options: FreezeOptions,
    observer: Observer,
) -> list[FreezingCost]:
    """What each set of frozen maps costs as a whole on all calibration images."""
    attention = attention_shapes(sites, options.window_maps)
    sets = [
        {path: FrozenAttention(model.get_submodule(path), each) for path, each in constants.items()}
        for constants in (constants_of(each.frozen, options.quantizer, attention, each.factors) for each in stored)
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
