from __future__ import annotations

import numpy as np
import pytest

from eamdeploy.eam.records import FrozenFactors, FrozenMaps
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


def pooled(*axes: int, head: int = 1, rank: int = 2) -> FrozenFactors:
    """One head of that rank whose factors have these axes behind the head."""
    mix, pool = np.ones((1, *axes, N, rank), np.uint8), np.ones((1, *axes, rank, N), np.uint8)
    scales = (np.full(codes.shape[:-1], 1 / codes.shape[-1], np.float32) for codes in (mix, pool))
    mix_scales, pool_scales = scales
    return FrozenFactors(np.array([head]), mix, mix_scales, pool, pool_scales)


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
    fitted = fit_maps(maps, {}, [PLAIN, SHIFTED], "m")
    assert (fitted.granularity, fitted.windows) == ("head", mode)
    for path, item in fitted.maps.items():
        assert item.codes.ndim == 4 and item.scales.ndim == 3
        np.testing.assert_array_equal(item.codes.reshape(maps[path].codes.shape), maps[path].codes)


@pytest.mark.parametrize(("mask", "granularity"), [(None, "head"), ((N,), "row"), ((N, N), "entry")])
def test_the_mask_tells_what_a_piece_is(mask: tuple[int, ...] | None, granularity: str) -> None:
    maps = {"a": given(mask=mask)}
    assert fit_maps(maps, {}, [VIT], "m") == (granularity, None, maps, {})


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
        fit_maps(maps, {}, sites, "m")


@pytest.mark.parametrize(
    ("maps", "factors", "mode"),
    [
        ({}, {"a": (pooled(),)}, "shared"),
        ({"a": given()}, {"b": (pooled(),)}, "shared"),
        ({"a": given(1)}, {"b": (pooled(2),)}, "class"),
        ({"b": given(2)}, {"b": (pooled(2), pooled(2, rank=3))}, "class"),
        ({"a": given(6)}, {"a": (pooled(6),), "b": (pooled(6),)}, "window"),
    ],
    ids=str,
)
def test_factors_tell_which_windows_share_one_too(
    maps: dict[str, FrozenMaps], factors: dict[str, tuple[FrozenFactors, ...]], mode: str
) -> None:
    fitted = fit_maps(maps, factors, [PLAIN, SHIFTED], "m")
    assert (fitted.granularity, fitted.windows) == ("head", mode)
    assert fitted.maps.keys() == maps.keys() and fitted.factors.keys() == factors.keys()
    for path, groups in factors.items():
        assert [group.rank for group in fitted.factors[path]] == [group.rank for group in groups]
        for one, other in zip(fitted.factors[path], groups, strict=True):
            windows = one.mix_codes.shape[1]
            assert one.mix_codes.shape == (1, windows, N, one.rank) and one.mix_scales.shape == (1, windows, N)
            assert one.pool_codes.shape == (1, windows, one.rank, N)
            assert one.pool_scales.shape == (1, windows, one.rank)
            np.testing.assert_array_equal(one.mix_codes.reshape(other.mix_codes.shape), other.mix_codes)


def test_factors_of_a_model_without_windows_stay_as_they_are() -> None:
    factors = {"a": (pooled(),)}
    assert fit_maps({}, factors, [VIT], "m") == ("head", None, {}, factors)


@pytest.mark.parametrize(
    ("maps", "factors", "message"),
    [
        ({}, {"c": (pooled(),)}, "m has no attention module c; expected one of a, b"),
        (
            {"b": given(2)},
            {"b": (pooled(6, rank=3),)},
            r"each head with rank 3 of b has.*expected 2 \(class\); got 6",
        ),
        ({"a": given(6)}, {"b": (pooled(),)}, r"each head with rank 2 of b has.*expected 6 \(window\); got 1"),
        ({}, {"b": (pooled(2), pooled(rank=3))}, r"each head with rank 3 of b has.*expected 2 \(class\); got 1"),
        (
            {"b": given(mask=(N,))},
            {"a": (pooled(),)},
            r"the maps of b are frozen by row, and a has heads of low rank; expected no mask in any module.*leave out",
        ),
        (
            {"a": given(mask=(N, N))},
            {"a": (pooled(),)},
            "the maps of a are frozen by entry, and a has",
        ),
    ],
)
def test_factors_that_contradict_the_model_or_the_maps_are_refused(
    maps: dict[str, FrozenMaps], factors: dict[str, tuple[FrozenFactors, ...]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_maps(maps, factors, [PLAIN, SHIFTED], "m")
