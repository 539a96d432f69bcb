"""Fit the frozen maps and factors that somebody's own EAM training gave to a model's attention modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from eamdeploy.eam.records import FrozenFactors, FrozenMaps
from eamdeploy.errors import ConfigError
from eamdeploy.host.sites import AttentionSite, window_maps
from eamdeploy.vocabulary import WINDOW_MAPS, Granularity, WindowMaps

# By the number of axes of a mask, None for no mask.
_GRANULARITIES: dict[int | None, Granularity] = {None: "head", 2: "row", 3: "entry"}


class Fitted(NamedTuple):
    """What was given, as it fits the model.

    Attributes:
        granularity: what is frozen as one piece.
        windows: which windows share a map; None for a model without windows.
        maps: by attention module path, with their axis for windows.
        factors: heads of low rank, likewise.
    """

    granularity: Granularity
    windows: WindowMaps | None
    maps: dict[str, FrozenMaps]
    factors: dict[str, tuple[FrozenFactors, ...]]


def fit_maps(
    maps: Mapping[str, FrozenMaps],
    factors: Mapping[str, tuple[FrozenFactors, ...]],
    sites: list[AttentionSite],
    model: str,
) -> Fitted:
    """What is frozen as one piece, which windows share a map, and maps and factors with their axis for windows.

    Maps `[F, N, N]` of a model with windows serve all of them, and so do factors without that axis. How many maps every
    head has decides between `shared`, `class` and `window`; where several fit, the first of these.

    Args:
        maps, factors: by attention module path, as `maps_file.read_maps` reads them.
        model: what errors call the model.

    Raises:
        ConfigError: a module is unknown, modules differ in granularity, or no way of sharing gives these numbers.
    """
    by_path = {site.path: site for site in sites}
    for path in (*maps, *factors):
        if path not in by_path:
            raise ConfigError(f"{model} has no attention module {path}", expected=f"one of {', '.join(by_path)}")
    granularity = _granularity(maps, factors)
    if sites[0].classes is None:
        return Fitted(granularity, None, dict(maps), dict(factors))
    fitted = {path: _with_window_axis(item) for path, item in maps.items()}
    pooled = {path: tuple(map(_with_window_axes, groups)) for path, groups in factors.items()}
    numbers = [(by_path[path], "", item.codes.shape[1]) for path, item in fitted.items()]
    numbers += [
        (by_path[path], f" with rank {group.rank}", group.mix_codes.shape[1])
        for path, groups in pooled.items()
        for group in groups
    ]
    return Fitted(granularity, _window_mode(numbers), fitted, pooled)


def _granularity(maps: Mapping[str, FrozenMaps], factors: Mapping[str, tuple[FrozenFactors, ...]]) -> Granularity:
    """What is frozen as one piece, alike in all modules."""
    found: dict[str, Granularity] = {
        path: _GRANULARITIES[None if item.mask is None else item.mask.ndim] for path, item in maps.items()
    }
    masked = next((path for path in found if found[path] != "head"), None)
    if factors and masked is not None:
        raise ConfigError(
            f"the maps of {masked} are frozen by {found[masked]}, and {next(iter(factors))} has heads of low rank",
            expected="no mask in any module, where one has factors",
            got=f"a mask of {masked}",
            hint="Factors stand for whole maps: leave out the masks, or the factors.",
        )
    if len(set(found.values())) > 1:
        other = next(path for path in found if found[path] != found[next(iter(found))])
        raise ConfigError(
            f"the maps of {other} are frozen by {found[other]}",
            expected=f"one granularity for all modules, {found[next(iter(found))]}",
            hint="Give every module a mask of the same number of axes, or none.",
        )
    return next(iter(found.values()), "head")


def _with_window_axis(item: FrozenMaps) -> FrozenMaps:
    if item.codes.ndim == 4:
        return item
    return replace(item, codes=item.codes[:, None], scales=item.scales[:, None])


def _with_window_axes(group: FrozenFactors) -> FrozenFactors:
    if group.mix_codes.ndim == 4:
        return group
    return FrozenFactors(
        group.heads,
        group.mix_codes[:, None],
        group.mix_scales[:, None],
        group.pool_codes[:, None],
        group.pool_scales[:, None],
    )


def _window_mode(n_maps: list[tuple[AttentionSite, str, int]]) -> WindowMaps:
    """The first way of sharing that gives every module its number of maps.

    Args:
        n_maps: modules, which of their heads, and the number of maps that each of these has.
    """
    modes = list(WINDOW_MAPS)
    for site, which, number in n_maps:
        numbers = {mode: len(set(window_maps(site, mode) or ())) for mode in modes}
        modes = [mode for mode in modes if numbers[mode] == number]
        if not modes:
            raise ConfigError(
                f"the number of maps that each head{which} of {site.path} has for its windows",
                expected=" or ".join(f"{count} ({mode})" for mode, count in numbers.items()),
                got=number,
                hint="Windows share one map, one for each shift mask, or none, alike in all modules.",
            )
    return modes[0]
