from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from timm_graphs import random_maps

from eamdeploy.graph.frozen import HeadGroups, head_groups, padded

ROWS = np.array([[True, False, True], [True, True, True], [False, True, False]])
ENTRIES = np.stack([np.eye(3, dtype=np.bool_), np.ones((3, 3), np.bool_), ROWS])


def test_heads_are_grouped_by_how_much_is_frozen() -> None:
    maps = random_maps((1, 3, 4), 3)
    assert head_groups(6, None) == HeadGroups((0, 1, 2, 3, 4, 5), (), ())
    assert head_groups(6, maps) == HeadGroups((0, 2, 5), (), (1, 3, 4))
    for mask in (ROWS, ENTRIES):
        groups = head_groups(6, replace(maps, mask=mask))
        assert groups == HeadGroups((0, 2, 5), (1, 4), (3,))
        assert groups.order == [0, 2, 5, 1, 4, 3]


@pytest.mark.parametrize("mask", [None, ROWS, ENTRIES], ids=["heads", "rows", "entries"])
def test_maps_of_some_heads_keep_windows_and_their_part_of_the_mask(mask: np.ndarray | None) -> None:
    maps = random_maps((1, 3, 4), 3, windows=(0, 1, 1), mask=mask)
    taken = maps.take((4, 1))
    assert (taken.heads, taken.windows, taken.by_row) == ((4, 1), (0, 1, 1), mask is ROWS)
    np.testing.assert_array_equal(taken.integers, maps.integers[[2, 0]])
    np.testing.assert_array_equal(taken.scales, maps.scales[[2, 0]])
    if mask is None:
        assert taken.mask is None
    else:
        np.testing.assert_array_equal(taken.mask, mask[[2, 0]])


@pytest.mark.parametrize("mask", [None, ROWS, ENTRIES], ids=["heads", "rows", "entries"])
def test_maps_of_some_rows_are_those_of_the_heads_with_something_frozen_there(mask: np.ndarray | None) -> None:
    maps = random_maps((1, 3, 4), 3, windows=(0, 1, 1), mask=mask)
    assert maps.of_rows(None) is maps
    cut = maps.of_rows((2, 0))
    assert cut is not None
    heads = [0, 1] if mask is ROWS else [0, 1, 2]  # rows 0 and 2 of the last are live
    assert (cut.heads, cut.windows) == (tuple(maps.heads[i] for i in heads), (0, 1, 1))
    np.testing.assert_array_equal(cut.integers, maps.integers[heads][:, :, [2, 0]])
    np.testing.assert_array_equal(cut.scales, maps.scales[heads][:, :, [2, 0]])
    if mask is None:
        assert cut.mask is None
    else:
        np.testing.assert_array_equal(cut.mask, mask[heads][:, [2, 0]])


def test_rows_of_which_nothing_is_frozen_have_no_maps() -> None:
    maps = random_maps((1,), 3, mask=ROWS[:1])
    assert maps.of_rows((1,)) is None
    whole = maps.of_rows((0, 2))
    assert whole is not None and head_groups(2, whole) == HeadGroups((0,), (), (1,))


def test_only_entries_mix_frozen_and_live_in_one_row() -> None:
    maps = random_maps((1, 3, 4), 3)
    assert [replace(maps, mask=mask).mixes_rows for mask in (None, ROWS, ENTRIES)] == [False, False, True]


def test_padded_indices_repeat_the_last_of_a_shorter_row() -> None:
    assert padded(ROWS).tolist() == [[0, 2, 2], [0, 1, 2], [1, 1, 1]]
    assert padded(ROWS[[0, 2]]).tolist() == [[0, 2], [1, 1]]
