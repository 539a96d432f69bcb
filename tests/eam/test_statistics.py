"""Streaming statistics against NumPy on the whole data set, and their exactness under merging."""

from __future__ import annotations

import copy
import itertools
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eamdeploy.eam.statistics import MAX_SAMPLES, MapStatistics, bin_edges
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.vocabulary import Spacing


def random_maps(samples: int, shape: tuple[int, ...] = (2, 5, 7), seed: int = 0) -> NDArray[np.float32]:
    """Maps with zeros, spikes and near-uniform rows."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(samples, *shape)) * rng.choice([0.1, 3, 200], size=(samples, *shape[:-1], 1))
    maps = np.exp(logits - logits.max(axis=-1, keepdims=True)).astype(np.float32)
    return maps / maps.sum(axis=-1, keepdims=True)


def state(statistics: MapStatistics) -> list[object]:
    arrays: list[NDArray[Any]] = [
        statistics.histogram(),
        statistics.mean(),
        statistics.variance(),
        statistics.entropy(),
        statistics.row_entropy(),
    ]
    return [statistics.n_samples, *(array.tobytes() for array in arrays)]


@pytest.mark.parametrize("spacing", ["uniform", "squared"])
@pytest.mark.parametrize("bins", [2, 16, 256])
def test_statistics_equal_numpy_on_the_whole_data_set(spacing: Spacing, bins: int) -> None:
    maps = random_maps(50)
    statistics = MapStatistics(maps.shape[1:], bins=bins, spacing=spacing)
    statistics.update(maps)

    exact = maps.astype(np.float64)
    counts = np.stack(
        [np.histogram(entry, bin_edges(bins, spacing))[0] for entry in exact.reshape(50, -1).T], axis=1
    ).reshape(bins, *maps.shape[1:])
    share = counts / 50
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=0)
    row_entropy = -(exact * np.log(np.where(exact > 0, exact, 1))).sum(axis=-1).mean(axis=0)
    np.testing.assert_array_equal(statistics.histogram(), counts)
    np.testing.assert_allclose(statistics.entropy(), entropy, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics.mean(), exact.mean(axis=0), rtol=0, atol=2**-33)
    np.testing.assert_allclose(statistics.variance(), exact.var(axis=0), rtol=0, atol=2**-33)
    np.testing.assert_allclose(statistics.row_entropy(), row_entropy, rtol=1e-6, atol=1e-7)
    assert statistics.mean().dtype == statistics.variance().dtype == statistics.entropy().dtype == np.float64


def test_results_have_the_shape_of_the_pieces_for_windows_too() -> None:
    maps = random_maps(3, (2, 4, 5, 5))
    statistics = MapStatistics((2, 4, 5, 5))
    statistics.update(maps)
    assert statistics.histogram().shape == (16, 2, 4, 5, 5)
    assert statistics.mean().shape == statistics.entropy().shape == statistics.variance().shape == (2, 4, 5, 5)
    assert statistics.row_entropy().shape == (2, 4, 5)


def test_a_constant_map_has_no_entropy_and_no_variance() -> None:
    statistics = MapStatistics((1, 1, 3))
    statistics.update(np.tile(np.array([0.9, 0.1 - 2**-10, 2**-10], np.float32), (1000, 1, 1, 1)))
    assert statistics.entropy().max() == 0
    assert statistics.variance().max() < 2**-40


def test_two_equally_likely_bins_have_entropy_ln_2() -> None:
    statistics = MapStatistics((1, 1, 2))
    statistics.update(np.array([[[[1, 0]]], [[[0, 1]]]], np.float32))
    np.testing.assert_allclose(statistics.entropy(), np.log(2), rtol=1e-15)
    np.testing.assert_array_equal(statistics.variance(), 0.25)
    np.testing.assert_array_equal(statistics.row_entropy(), 0)


def test_the_row_entropy_of_a_uniform_row_is_ln_n() -> None:
    statistics = MapStatistics((1, 1, 197))
    statistics.update(np.full((3, 1, 1, 197), 1 / 197, np.float32))
    np.testing.assert_allclose(statistics.row_entropy(), np.log(197), rtol=1e-6)


def test_squared_bins_resolve_what_uniform_bins_do_not() -> None:
    maps = np.full((2, 1, 1, 100), 0.01, np.float32)
    maps[1] = np.tile(np.array([0.001, 0.019], np.float32), 50)
    entropy = {}
    for spacing in ("uniform", "squared"):
        statistics = MapStatistics((1, 1, 100), spacing=spacing)
        statistics.update(maps)
        entropy[spacing] = statistics.entropy().mean()
    assert entropy["uniform"] == 0
    assert entropy["squared"] > 0.6


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations(range(12)),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    seed=st.integers(0, 1000),
    spacing=st.sampled_from(["uniform", "squared"]),
)
def test_merging_is_exact_in_any_order_and_any_split(
    order: list[int], cuts: list[int], seed: int, spacing: Spacing
) -> None:
    maps = random_maps(12, seed=seed)
    whole = MapStatistics(maps.shape[1:], spacing=spacing)
    whole.update(maps)

    edges = [0, *sorted(cuts), 12]
    parts = []
    for start, stop in itertools.pairwise(edges):
        part = MapStatistics(maps.shape[1:], spacing=spacing)
        for index in order[start:stop]:
            part.update(maps[index : index + 1])
        parts.append(part)
    merged = MapStatistics(maps.shape[1:], spacing=spacing)
    for part in reversed(parts):
        merged.merge(part)
    assert state(merged) == state(whole)


def test_memory_layout_and_float_width_of_a_batch_do_not_matter() -> None:
    maps = random_maps(4)
    plain, strided = MapStatistics(maps.shape[1:]), MapStatistics(maps.shape[1:])
    plain.update(maps)
    strided.update(np.asfortranarray(maps).astype(np.float64))
    assert state(plain) == state(strided)


def test_other_data_gives_other_statistics() -> None:
    first, second = MapStatistics((2, 5, 7)), MapStatistics((2, 5, 7))
    first.update(random_maps(4, seed=1))
    second.update(random_maps(4, seed=2))
    assert all(a != b for a, b in zip(state(first)[1:], state(second)[1:], strict=True))


def test_deit_base_fits_into_1_5_gb_with_all_temporaries() -> None:
    statistics = MapStatistics((12, 197, 197))
    maps = np.full((8, 12, 197, 197), 1 / 197, np.float32)
    tracemalloc.start()
    statistics.update(maps)
    statistics.entropy()
    statistics.variance()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # What update and the results need beside the accumulators must not grow with the batch.
    assert 12 * statistics.nbytes == pytest.approx(425e6, rel=0.01)
    assert peak < 40e6


def test_too_many_samples_are_refused_before_an_accumulator_overflows() -> None:
    statistics = MapStatistics((1, 1, 2))
    statistics.update(np.array([[[[1, 0]]]], np.float32))
    for _ in range(22):
        statistics.merge(copy.deepcopy(statistics))
    assert statistics.n_samples == 2**22
    np.testing.assert_array_equal(statistics.mean(), [[[1, 0]]])
    before = state(statistics)
    with pytest.raises(ConfigError, match=str(MAX_SAMPLES)):
        statistics.merge(copy.deepcopy(statistics))
    assert state(statistics) == before

    almost = copy.deepcopy(statistics)
    part = statistics
    while part.n_samples > 1:  # 2²² + 2²¹ + … + 1 = 2²³ − 1, the limit
        half = MapStatistics((1, 1, 2))
        half.update(np.array([[[[1, 0]]]], np.float32))
        while half.n_samples < part.n_samples // 2:
            half.merge(copy.deepcopy(half))
        almost.merge(half)
        part = half
    assert almost.n_samples == MAX_SAMPLES
    np.testing.assert_array_equal(almost.variance(), 0)
    np.testing.assert_array_equal(almost.histogram()[[0, -1]], [[[[0, MAX_SAMPLES]]], [[[MAX_SAMPLES, 0]]]])
    with pytest.raises(ConfigError, match="too many samples"):
        almost.update(np.array([[[[1, 0]]]], np.float32))


def bad_maps(value: float) -> NDArray[np.float32]:
    maps = np.full((3, 2, 4, 4), 0.25, np.float32)
    maps[2, 1, 3, 0] = value
    return maps


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (bad_maps(np.nan), "not finite.*1 NaN or infinite"),
        (bad_maps(np.inf), "not finite"),
        (bad_maps(-np.inf), "not finite"),
        (np.full((1, 2, 4, 4), 3e38, np.float32), r"leave \[0, 1\] at \[0, 0, 0\].*maximum 3e\+38"),
        (bad_maps(-0.01), r"leave \[0, 1\]"),
        (bad_maps(1.1), r"leave \[0, 1\] at \[1, 3, 0\]"),
        (bad_maps(0.252), r"1 of 8 rows .* do not sum to 1"),
        (bad_maps(0.252).swapaxes(2, 3), r"do not sum to 1.*got 1.002 at \[1, 0\]"),
        (np.zeros((1, 2, 4, 4), np.float32), "do not sum to 1"),
        (np.full((1, 2, 4, 5), 0.2, np.float32), r"wrong shape.*expected \['samples', 2, 4, 4\]"),
        (np.full((2, 4, 4), 0.25, np.float32), "wrong shape"),
        (np.full((1, 2, 4, 4), 1, np.int64), "wrong form"),
    ],
)
def test_bad_maps_are_refused_and_change_nothing(maps: NDArray[np.float32], message: str) -> None:
    statistics = MapStatistics((2, 4, 4), module="blocks.3.attn")
    statistics.update(np.full((1, 2, 4, 4), 0.25, np.float32))
    before = state(statistics)
    with pytest.raises(CheckpointError, match=message) as error:
        statistics.update(maps)
    assert "blocks.3.attn" in str(error.value)
    assert state(statistics) == before


def test_rounding_errors_of_a_softmax_are_accepted() -> None:
    statistics = MapStatistics((1, 1, 2))
    statistics.update(np.array([[[[1 + 9e-6, -9e-6]]], [[[0.5, 0.5009]]]], np.float32))
    assert statistics.n_samples == 2
    assert statistics.mean()[0, 0, 1] == pytest.approx(0.25045)


def test_an_empty_batch_changes_nothing() -> None:
    statistics = MapStatistics((1, 2, 2))
    statistics.update(np.zeros((0, 1, 2, 2), np.float32))
    assert statistics.n_samples == 0


@pytest.mark.parametrize("result", ["mean", "variance", "entropy", "row_entropy"])
def test_results_without_samples_are_an_error(result: str) -> None:
    with pytest.raises(ConfigError, match=r"blocks\.0.*at least one sample"):
        getattr(MapStatistics((1, 2, 2), module="blocks.0"), result)()


@pytest.mark.parametrize(
    "other",
    [MapStatistics((1, 2, 3)), MapStatistics((1, 2, 2), bins=8), MapStatistics((1, 2, 2), spacing="squared")],
    ids=["shape", "bins", "spacing"],
)
def test_statistics_of_another_kind_do_not_merge(other: MapStatistics) -> None:
    with pytest.raises(ConfigError, match="cannot merge"):
        MapStatistics((1, 2, 2)).merge(other)


@pytest.mark.parametrize("bins", [-1, 0, 1, 257])
def test_the_number_of_bins_is_limited(bins: int) -> None:
    with pytest.raises(ConfigError, match="2 to 256 bins"):
        MapStatistics((1, 2, 2), bins=bins)


def test_shape_and_spacing_are_checked() -> None:
    with pytest.raises(ConfigError, match="shape"):
        MapStatistics((4,))
    with pytest.raises(ConfigError, match="shape"):
        MapStatistics((0, 4, 4))
    with pytest.raises(ConfigError, match="spacing"):
        MapStatistics((1, 4, 4), spacing="cubed")  # type: ignore[arg-type]


def test_bin_edges() -> None:
    np.testing.assert_array_equal(bin_edges(4, "uniform"), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_array_equal(bin_edges(4, "squared"), [0, 0.0625, 0.25, 0.5625, 1])
