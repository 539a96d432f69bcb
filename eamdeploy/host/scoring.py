"""Score every piece of a model's attention maps, by what its maps do or by what freezing the piece costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.eam import scores as map_scores
from eamdeploy.eam.effects import HeadEffects
from eamdeploy.eam.kinds import HeadSize, Kind, best_kinds, fitting, kinds_of
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.selection import Selection, select, select_together
from eamdeploy.eam.telling_images import draw
from eamdeploy.host.calibrate import Seen, as_tensors
from eamdeploy.host.fisher import fisher_sensitivity
from eamdeploy.host.means import freeze_factors, freeze_pieces, mean_maps
from eamdeploy.host.sensitivity import by_module, head_effects
from eamdeploy.host.sites import AttentionSite, head_size
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT, Observer

HEAD_IMAGES = 48
"""Images for the sensitivity of heads unless the user says how many.

Source: docs/results/accuracy.md, Sensitivity in minutes.
"""
_BATCH, _GRADIENT_BATCH = 16, 8
_CHANGES = 1 << 24  # logits of all heads and a batch's images at a time: 128 MiB


@dataclass(frozen=True, eq=False)
class PieceScores:
    """What ranks the pieces.

    Attributes:
        values: the score of every piece: float64 `[H]`, `[H, N]` or `[H, N, N]` by module path.
        together: of heads by sensitivity, what pairs of them cost, float64 `[heads, heads]` over the heads of all
            modules in order, see `HeadEffects`; None where only the cost of each piece alone is known.
        is_cost: the values are costs of whole pieces, and not means over their entries.
        kinds: what every head of a module would be frozen to; a module that is not there has whole maps.
        saved: where kinds were weighed against each other, the multiply-adds that freezing each head saves.
    """

    values: dict[str, NDArray[np.float64]]
    together: NDArray[np.float64] | None
    is_cost: bool
    kinds: Mapping[str, tuple[Kind, ...]] = field(default_factory=dict)
    saved: Mapping[str, NDArray[np.float64]] | None = None

    def selections(self, sites: list[AttentionSite], sparsity: float) -> list[Selection]:
        """What may be frozen of the attention modules `sites`, see `eam.selection`: one or two different sets."""
        values = self.values
        entries = {site.path: site.heads * site.entries_per_head // values[site.path].size for site in sites}
        if self.is_cost:
            sizes: Mapping[str, Any] = entries if self.saved is None else self.saved
            values = {path: costs / sizes[path] for path, costs in values.items()}
        alone = select(values, entries, sparsity)
        if self.together is None:
            return [alone]
        together = select_together(self.together, {site.path: site.heads for site in sites}, entries, sparsity)
        return [alone] if alone.heads == together.heads else [alone, together]


def score_pieces(
    model: Any,
    sites: list[AttentionSite],
    seen: Seen,
    images: ImageSource,
    how: Preprocessing,
    options: FreezeOptions,
    observer: Observer,
) -> PieceScores:
    """The score `options.score` of every piece.

    `sensitivity` of a head is measured, with its map quantized as it will be, on images that are drawn by
    `telling_images`; of rows and entries it is estimated, see `fisher`.

    Args:
        seen: what the model did with the calibration images `images`.

    Raises:
        ConfigError: the images can't be read.
    """
    if options.score != "sensitivity":
        values = map_scores.score_pieces(seen.statistics, options.score, options.granularity, seed=options.seed)
        (kind,) = kinds_of(options.rank)  # `check_options` has seen to it that it is one
        kinds = {site.path: (kind,) * site.heads for site in sites}
        return PieceScores(values, None, is_cost=False, kinds=kinds)
    means = {site.path: mean_maps(site, seen.statistics[site.path]) for site in sites}
    measure = _head_sensitivity if options.granularity == "head" else _estimated_sensitivity
    return measure(model, sites, means, seen, images, how, options, observer)


def _head_sensitivity(
    model: Any,
    sites: list[AttentionSite],
    means: Mapping[str, NDArray[np.float64]],
    seen: Seen,
    images: ImageSource,
    how: Preprocessing,
    options: FreezeOptions,
    observer: Observer,
) -> PieceScores:
    sizes = {site.path: head_size(model, site) for site in sites}
    kinds = {path: fitting(kinds_of(options.rank), size) for path, size in sizes.items()}
    maps = {
        path: np.concatenate([_maps(path, mean, kind, options) for kind in kinds[path]]) for path, mean in means.items()
    }
    drawn = draw(seen.unsure, options.score_images or HEAD_IMAGES, options.seed)
    folder = replace(seen.folder, files=tuple(seen.folder.files[index] for index in drawn))
    n_heads, n_maps = sum(site.heads for site in sites), sum(map(len, maps.values()))
    batch_size = max(1, min(_BATCH, _CHANGES // (n_maps * model.num_classes)))
    estimated = False

    def on_progress(done: int, total: int, seconds_left: float) -> None:
        nonlocal estimated
        if not estimated:
            of = f"{n_heads} heads" if n_maps == n_heads else f"{n_heads} heads, {n_maps} ways to freeze them,"
            observer.note(f"sensitivity of {of} on {len(drawn)} images: about {_duration(seconds_left)}")
            estimated = True
        observer.progress("sensitivity", done, total)

    def batches() -> Iterator[tuple[torch.Tensor, list[float]]]:
        weights = iter(drawn.values())
        for batch in as_tensors(images.batches(folder, how, batch_size, SILENT), how):
            yield batch, [next(weights) for _ in batch]

    effects = head_effects(model, sites, maps, batches(), len(drawn), on_progress, windows=options.window_maps)
    return _best(sites, effects, kinds, sizes)


def _maps(path: str, means: NDArray[np.float64], kind: Kind, options: FreezeOptions) -> NDArray[np.float32]:
    """All heads of a module frozen to that kind, as the maps that they stand for."""
    bits, quantizer = options.bits, options.quantizer
    if kind is None:
        return freeze_pieces(path, means, np.ones(len(means), np.bool_), bits, quantizer).maps(quantizer)
    return freeze_factors(path, means, np.arange(len(means)), kind, bits, quantizer).maps(quantizer)


def _best(
    sites: list[AttentionSite],
    effects: HeadEffects,
    kinds: Mapping[str, tuple[Kind, ...]],
    sizes: Mapping[str, HeadSize],
) -> PieceScores:
    """The scores of heads, each of the kind that costs least for each multiply-add that it saves."""
    alone = by_module(sites, effects.alone, {path: len(each) for path, each in kinds.items()})
    values, chosen, saved = {}, {}, {}
    places: list[int] = []  # of the chosen kind of every head among all maps
    start = 0
    for site in sites:
        possible, damage = kinds[site.path], alone[site.path].reshape(-1, site.heads)
        savings = [sizes[site.path].saved(kind) for kind in possible]
        best, heads = best_kinds(damage, savings), np.arange(site.heads)
        values[site.path] = damage[best, heads]
        chosen[site.path] = tuple(possible[index] for index in best)
        saved[site.path] = np.array([savings[index] for index in best], np.float64)
        places += (start + best * site.heads + heads).tolist()
        start += damage.size
    weighed = any(len(each) > 1 for each in kinds.values())
    together = effects.together[np.ix_(places, places)]
    return PieceScores(values, together, is_cost=True, kinds=chosen, saved=saved if weighed else None)


def _estimated_sensitivity(
    model: Any,
    sites: list[AttentionSite],
    means: Mapping[str, NDArray[np.float64]],
    seen: Seen,
    images: ImageSource,
    how: Preprocessing,
    options: FreezeOptions,
    observer: Observer,
) -> PieceScores:
    chosen = images if options.score_images is None else replace(images, limit=options.score_images)
    folder = chosen.open()
    values = fisher_sensitivity(
        model,
        sites,
        means,
        as_tensors(chosen.batches(folder, how, _GRADIENT_BATCH, SILENT), how),
        options.granularity,
        lambda done: observer.progress("sensitivity", done, len(folder.files)),
        windows=options.window_maps,
        seed=options.seed,
    )
    return PieceScores(values, None, is_cost=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
