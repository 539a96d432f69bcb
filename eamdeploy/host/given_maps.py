"""Fit the frozen maps that somebody's own EAM training gave to a model's attention modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from eamdeploy.eam.records import FrozenMaps
from eamdeploy.errors import ConfigError
from eamdeploy.host.sites import AttentionSite, window_maps
from eamdeploy.vocabulary import WINDOW_MAPS, Granularity, WindowMaps

# By the number of axes of a mask, None for no mask.
_GRANULARITIES: dict[int | None, Granularity] = {None: "head", 2: "row", 3: "entry"}


def fit_maps(
    maps: Mapping[str, FrozenMaps], sites: list[AttentionSite], model: str
) -> tuple[Granularity, WindowMaps | None, dict[str, FrozenMaps]]:
    """What is frozen as one piece, which windows share a map, and the maps with their axis for windows.

    Maps `[F, N, N]` of a model with windows serve all of them. How many maps every head has decides between
    `shared`, `class` and `window`; where several fit, the first of these.

    Args:
        maps: by attention module path, as `maps_file.read_maps` reads them.
        model: what errors call the model.

    Raises:
        ConfigError: a module is unknown, modules differ in granularity, or no way of sharing gives these numbers.
    """
    by_path = {site.path: site for site in sites}
    for path in maps:
        if path not in by_path:
            raise ConfigError(f"{model} has no attention module {path}", expected=f"one of {', '.join(by_path)}")
    found: dict[str, Granularity] = {
        path: _GRANULARITIES[None if item.mask is None else item.mask.ndim] for path, item in maps.items()
    }
    if len(set(found.values())) > 1:
        other = next(path for path in found if found[path] != found[next(iter(found))])
        raise ConfigError(
            f"the maps of {other} are frozen by {found[other]}",
            expected=f"one granularity for all modules, {found[next(iter(found))]}",
            hint="Give every module a mask of the same number of axes, or none.",
        )
    granularity: Granularity = next(iter(found.values()), "head")
    if sites[0].classes is None:
        return granularity, None, dict(maps)
    fitted = {path: _with_window_axis(item) for path, item in maps.items()}
    return granularity, _window_mode({path: item.codes.shape[1] for path, item in fitted.items()}, by_path), fitted


def _with_window_axis(item: FrozenMaps) -> FrozenMaps:
    if item.codes.ndim == 4:
        return item
    return replace(item, codes=item.codes[:, None], scales=item.scales[:, None])


def _window_mode(n_maps: Mapping[str, int], sites: Mapping[str, AttentionSite]) -> WindowMaps:
    """The first way of sharing that gives every module its number of maps."""
    modes = list(WINDOW_MAPS)
    for path, number in n_maps.items():
        numbers = {mode: len(set(window_maps(sites[path], mode) or ())) for mode in modes}
        modes = [mode for mode in modes if numbers[mode] == number]
        if not modes:
            raise ConfigError(
                f"the number of maps that each head of {path} has for its windows",
                expected=" or ".join(f"{count} ({mode})" for mode, count in numbers.items()),
                got=number,
                hint="Windows share one map, one for each shift mask, or none, alike in all modules.",
            )
    return modes[0]
