from __future__ import annotations

import numpy as np
import pytest

from eamdeploy.eam.records import FrozenMaps
from eamdeploy.errors import ConfigError
from eamdeploy.host.given_maps import fit_maps
from eamdeploy.host.sites import AttentionSite

N = 4
PLAIN, SHIFTED = AttentionSite("a", 3, N, (0, 0, 0, 0, 0, 0)), AttentionSite("b", 3, N, (0, 0, 1, 0, 0, 1))
VIT = AttentionSite("a", 3, N)


def given(*axes: int, mask: tuple[int, ...] | None = None) -> FrozenMaps:
    """Two heads whose codes have these axes between heads and rows, and whose mask has this shape behind the heads."""
    codes = np.ones((2, *axes, N, N), np.uint8)
    chosen = None if mask is None else np.ones((2, *mask), np.bool_)
    return FrozenMaps(np.array([0, 2]), codes, np.full((2, *axes, N), 0.25, np.float32), chosen)


@pytest.mark.parametrize(
    ("maps", "mode"),
    [
        ({"a": given(1), "b": given(1)}, "shared"),
        ({"a": given(1), "b": given(2)}, "class"),
        ({"b": given(2)}, "class"),
        ({"a": given(6), "b": given(6)}, "window"),
        ({"b": given(6)}, "window"),
        ({"a": given(1)}, "shared"),
        ({"a": given(), "b": given()}, "shared"),
        ({"a": given(), "b": given(2)}, "class"),
        ({}, "shared"),
    ],
    ids=str,
)
def test_the_number_of_maps_tells_which_windows_share_one(maps: dict[str, FrozenMaps], mode: str) -> None:
    granularity, windows, fitted = fit_maps(maps, [PLAIN, SHIFTED], "m")
    assert (granularity, windows) == ("head", mode)
    for path, item in fitted.items():
        assert item.codes.ndim == 4 and item.scales.ndim == 3
        np.testing.assert_array_equal(item.codes.reshape(maps[path].codes.shape), maps[path].codes)


@pytest.mark.parametrize(("mask", "granularity"), [(None, "head"), ((N,), "row"), ((N, N), "entry")])
def test_the_mask_tells_what_a_piece_is(mask: tuple[int, ...] | None, granularity: str) -> None:
    maps = {"a": given(mask=mask)}
    assert fit_maps(maps, [VIT], "m") == (granularity, None, maps)


@pytest.mark.parametrize(
    ("maps", "sites", "message"),
    [
        ({"c": given()}, [VIT], "m has no attention module c; expected one of a"),
        ({"a": given(3)}, [PLAIN, SHIFTED], r"each head of a has.*expected 1 \(shared\) or 1 \(class\) or 6 .*got 3"),
        ({"a": given(6), "b": given(2)}, [PLAIN, SHIFTED], r"each head of b has.*expected 6 \(window\); got 2"),
        (
            {"a": given(1), "b": given(1, mask=(N,))},
            [PLAIN, SHIFTED],
            "maps of b are frozen by row; expected one granularity for all modules, head",
        ),
    ],
)
def test_maps_that_contradict_the_model_or_each_other_are_refused(
    maps: dict[str, FrozenMaps], sites: list[AttentionSite], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_maps(maps, sites, "m")
