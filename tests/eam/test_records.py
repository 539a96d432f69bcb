"""Shapes of attention with and without windows, and frozen maps of every granularity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_checkpoints import frozen_maps
from numpy.typing import NDArray

from eamdeploy.eam.quantizers import dequantize
from eamdeploy.eam.records import AttentionShape, FrozenMaps, spread_mask
from eamdeploy.errors import CheckpointError
from eamdeploy.vocabulary import GRANULARITIES, QUANTIZERS, Granularity, Quantizer


@pytest.mark.parametrize(
    ("windows", "n_windows", "n_maps", "rows", "entries"),
    [
        (None, 1, 1, (5,), 25),
        ([0], 1, 1, (1, 5), 25),
        ([0, 0, 0, 0], 4, 1, (1, 5), 100),
        ([0, 1, 1, 2], 4, 3, (3, 5), 100),
        ([0, 1, 2, 3], 4, 4, (4, 5), 100),
    ],
)
def test_attention_shapes(
    windows: list[int] | None, n_windows: int, n_maps: int, rows: tuple[int, ...], entries: int
) -> None:
    shape = AttentionShape(heads=2, tokens=5, windows=windows)
    assert (shape.n_windows, shape.n_maps, shape.rows, shape.entries_per_head) == (n_windows, n_maps, rows, entries)
    assert AttentionShape.parse(shape.model_dump_json(), "shape") == shape


def test_shapes_of_before_windows_still_parse() -> None:
    assert AttentionShape.parse('{"heads": 2, "tokens": 5}', "shape") == AttentionShape(heads=2, tokens=5)


@pytest.mark.parametrize("windows", [[], [1], [0, 2], [-1, 0], [0, 10**12], [1, 1]])
def test_window_numbers_with_gaps_are_refused(windows: list[int]) -> None:
    with pytest.raises(CheckpointError, match=r"not a valid AttentionShape: windows: .*each at least once, got \["):
        AttentionShape.parse(f'{{"heads": 1, "tokens": 2, "windows": {windows}}}', "shape")


@given(windows=st.lists(st.integers(-1, 4), max_size=6))
def test_window_numbers_are_those_from_0_to_the_last(windows: list[int]) -> None:
    sound = bool(windows) and set(windows) == set(range(len(set(windows))))
    try:
        AttentionShape(heads=1, tokens=1, windows=windows)
    except ValueError:
        assert not sound
    else:
        assert sound


def test_a_mask_is_spread_over_window_maps_and_keys() -> None:
    rows = np.array([[True, False], [False, True]])
    for mask, shape in ((None, (2, 2, 2)), (None, (2, 3, 2, 2))):
        assert spread_mask(mask, shape).shape == shape and spread_mask(mask, shape).all()
    by_row = np.array([[[True, True], [False, False]], [[False, False], [True, True]]])
    np.testing.assert_array_equal(spread_mask(rows, (2, 2, 2)), by_row)
    np.testing.assert_array_equal(spread_mask(rows, (2, 3, 2, 2)), np.stack([by_row] * 3, axis=1))
    by_entry = np.random.default_rng(0).random((2, 2, 2)) < 0.5
    np.testing.assert_array_equal(spread_mask(by_entry, (2, 2, 2)), by_entry)
    np.testing.assert_array_equal(spread_mask(by_entry, (2, 3, 2, 2)), np.stack([by_entry] * 3, axis=1))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("windows", [None, [0, 1, 1, 0]], ids=["no windows", "two window maps"])
def test_maps_are_zero_where_nothing_is_frozen(
    windows: list[int] | None, granularity: Granularity, quantizer: Quantizer
) -> None:
    shape = AttentionShape(heads=3, tokens=6, windows=windows)
    made = frozen_maps(np.random.default_rng(0), shape, [0, 2], granularity, quantizer=quantizer)
    maps = made.maps(quantizer)
    assert (maps.shape, maps.dtype) == ((2, *shape.rows, 6), np.dtype(np.float32))
    np.testing.assert_array_equal(maps, dequantize(made.codes, made.scales, quantizer))
    frozen = made.frozen()
    assert (frozen.shape, frozen.dtype, made.frozen_entries) == ((2, 6, 6), np.dtype(np.bool_), frozen.sum())
    for window_map in maps.reshape(2, -1, 6, 6).transpose(1, 0, 2, 3):
        assert (window_map[~frozen] == 0).all()
        sums = window_map.sum(axis=-1, dtype=np.float64)
        np.testing.assert_allclose(sums[frozen.all(axis=-1)], 1, rtol=0, atol=1e-6)
        assert (sums <= 1 + 1e-6).all()


def test_frozen_entries_by_granularity() -> None:
    codes, scales = np.zeros((2, 3, 3), np.uint8), np.zeros((2, 3), np.float32)

    def count(mask: NDArray[np.bool_] | None) -> int:
        return FrozenMaps(np.array([0, 1]), codes, scales, mask).frozen_entries

    assert count(None) == 18
    assert count(np.array([[True, False, True], [False, False, True]])) == 9
    assert count(np.eye(3, dtype=np.bool_)[None].repeat(2, axis=0)) == 6
