"""Selection by sparsity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from eamdeploy.eam.records import AttentionShape, FrozenMaps
from eamdeploy.eam.selection import Selection, cost_of, select, select_together, sparsity_of
from eamdeploy.errors import ConfigError

DEIT_TINY = {f"blocks.{i}.attn": 197 * 197 for i in range(12)}


def assert_same(first: Selection, second: Selection) -> None:
    assert (first.sparsity, first.sparsity_asked) == (second.sparsity, second.sparsity_asked)
    assert list(first.pieces) == list(second.pieces)
    for path, frozen in first.pieces.items():
        np.testing.assert_array_equal(frozen, second.pieces[path], strict=True)


def count(heads: dict[str, tuple[int, ...]]) -> int:
    return sum(len(module) for module in heads.values())


@pytest.mark.parametrize(
    ("sparsity", "heads"),
    [(0, 0), (0.02, 0), (1 / 36, 1), (0.1, 3), (0.2, 7), (0.25, 9), (0.5, 18), (0.99, 35), (1, 36)],
)
def test_equal_heads(sparsity: float, heads: int) -> None:
    rng = np.random.default_rng(0)
    selection = select({path: rng.random(3) for path in DEIT_TINY}, DEIT_TINY, sparsity)
    assert count(selection.heads) == heads
    assert selection.sparsity == heads / 36
    assert selection.sparsity_asked == sparsity


def test_every_exact_share_is_reached_despite_rounding() -> None:
    for n in range(1, 145):
        scores = {"a": np.arange(n, dtype=np.float64)}
        for k in range(n + 1):
            assert count(select(scores, {"a": 197 * 197}, k / n).heads) == k


def test_the_lowest_scores_are_frozen_and_paths_come_sorted() -> None:
    scores = {"z": np.array([0.1, 0.9, 0.3]), "a": np.array([0.2, 0.8, 0.05])}
    selection = select(scores, {"z": 4, "a": 4}, 4 / 6)
    assert selection.heads == {"a": (0, 2), "z": (0, 2)}
    assert list(selection.heads) == ["a", "z"]


def test_modules_without_frozen_heads_are_left_out() -> None:
    assert select({"a": np.array([0.1, 0.2]), "b": np.array([0.3, 0.4])}, {"a": 4, "b": 4}, 0.5).heads == {"a": (0, 1)}


def test_ties_go_by_module_order_then_head() -> None:
    scores = {"b": np.zeros(3), "a": np.zeros(3)}
    assert select(scores, {"a": 1, "b": 1}, 2 / 6).heads == {"b": (0, 1)}
    assert select(scores, {"a": 1, "b": 1}, 4 / 6).heads == {"a": (0,), "b": (0, 1, 2)}


def test_smaller_heads_fill_up_where_the_next_one_does_not_fit() -> None:
    scores = {"small": np.array([0.0, 2.0]), "large": np.array([1.0])}
    selection = select(scores, {"small": 10, "large": 80}, 0.5)
    assert selection.heads == {"small": (0, 1)}
    assert selection.sparsity == 0.2
    assert select(scores, {"small": 10, "large": 80}, 0.15).heads == {"small": (0,)}
    assert select(scores, {"small": 10, "large": 80}, 0.9).heads == {"small": (0,), "large": (0,)}


def test_rows_and_entries() -> None:
    rows = {"a": np.array([[3.0, 0.0], [5.0, 4.0]]), "b": np.array([[1.0, 2.0]])}
    selection = select(rows, {"a": 2, "b": 2}, 4 / 6)
    assert {path: frozen.tolist() for path, frozen in selection.pieces.items()} == {
        "a": [[True, True], [False, False]],
        "b": [[True, True]],
    }
    assert selection.heads == {"a": (0,), "b": (0,)}
    assert selection.sparsity == 4 / 6
    entries = {"a": np.arange(8.0).reshape(2, 2, 2)[::-1]}
    selection = select(entries, {"a": 1}, 5 / 8)
    assert selection.pieces["a"].tolist() == [[[True, False], [False, False]], [[True, True], [True, True]]]
    assert selection.heads == {"a": (0, 1)}


def test_a_piece_counts_in_every_window() -> None:
    selection = select({"wide": np.array([[0.0, 9.0]]), "deep": np.array([[1.0, 2.0]])}, {"wide": 8, "deep": 2}, 0.5)
    assert {path: frozen.tolist() for path, frozen in selection.pieces.items()} == {
        "deep": [[True, False]],
        "wide": [[True, False]],
    }
    assert selection.sparsity == 10 / 20


def test_millions_of_entries_are_selected_exactly() -> None:
    """DeiT-Base has 5.6 million; here one module of it, with many ties."""
    scores = np.random.default_rng(0).integers(0, 1000, size=(12, 197, 197)) / 7
    selection = select({"a": scores}, {"a": 1}, 0.2)
    frozen = selection.pieces["a"]
    assert frozen.sum() == int(0.2 * scores.size) == round(selection.sparsity * scores.size)
    edge = scores[frozen].max()
    assert (scores[~frozen] >= edge).all()
    tied = np.flatnonzero(scores == edge)
    taken = frozen.reshape(-1)[tied]
    assert taken.any() and not taken.all() and (np.diff(taken.astype(int)) <= 0).all(), "ties go in C order"


def one_by_one(
    scores: dict[str, NDArray[np.float64]], entries: dict[str, int], sparsity: float
) -> tuple[set[tuple[str, int]], float]:
    """What `select` promises, spelled out: (path, flat index) of every frozen piece, and the share."""
    total = sum(values.size * entries[path] for path, values in scores.items())
    ranked = sorted(
        (float(value), order, index, path)
        for order, (path, values) in enumerate(scores.items())
        for index, value in enumerate(values.reshape(-1))
    )
    frozen, count = set(), 0
    for _, _, index, path in ranked:
        if (count + entries[path]) / total > sparsity + 1e-9:
            continue
        count += entries[path]
        frozen.add((path, index))
    return frozen, count / total


@given(
    modules=st.dictionaries(
        st.text("abc.", min_size=1, max_size=4),
        st.tuples(
            hnp.arrays(
                np.float64,
                hnp.array_shapes(max_dims=3, max_side=4),
                elements=st.sampled_from([-1.0, -0.0, 0.0, 0.5, 1.0, 2.5]),
            ),
            st.integers(1, 50),
        ),
        min_size=1,
        max_size=5,
    ),
    sparsity=st.floats(0, 1),
)
def test_properties(modules: dict[str, tuple[NDArray[np.float64], int]], sparsity: float) -> None:
    scores = {path: values for path, (values, _) in modules.items()}
    entries = {path: size for path, (_, size) in modules.items()}
    selection = select(scores, entries, sparsity)
    assert_same(selection, select(scores, entries, sparsity))
    frozen = {
        (path, int(index)) for path, pieces in selection.pieces.items() for index in np.flatnonzero(pieces.reshape(-1))
    }
    assert (frozen, selection.sparsity) == one_by_one(scores, entries, sparsity)
    assert selection.sparsity <= sparsity + 1e-9
    assert list(selection.pieces) == sorted(selection.pieces) == list(selection.heads)
    for path, pieces in selection.pieces.items():
        assert (pieces.shape, pieces.dtype) == (scores[path].shape, np.dtype(np.bool_)) and pieces.any()
        assert selection.heads[path] == tuple(head for head in range(len(pieces)) if pieces[head].any())


SWIN = {"first": 16, "second": 4, "third": 1}
"""Entries of a head of three stages with 16, 4 and 1 windows, in maps of a window."""


def cheapest(costs: NDArray[np.float64], sizes: list[int], budget: int) -> float:
    """The least cost of any set that no further head fits into, by trying all."""
    n, best = len(sizes), np.inf
    for number in range(2**n):
        chosen = np.array([bool(number >> i & 1) for i in range(n)])
        left = budget - sum(size for size, taken in zip(sizes, chosen, strict=True) if taken)
        if left < 0 or any(size <= left for size, taken in zip(sizes, chosen, strict=True) if not taken):
            continue
        best = min(best, cost_of(costs, chosen))
    return float(best)


def chosen_of(selection: Selection, heads: dict[str, int]) -> NDArray[np.bool_]:
    return np.concatenate([selection.pieces.get(path, np.zeros(count, np.bool_)) for path, count in heads.items()])


def test_together_without_interaction_is_the_ranking_by_cost_for_each_entry() -> None:
    """A head of the last stage costs little, and a head of the first little for its size."""
    heads = {"first": 2, "second": 4, "third": 8}
    alone = np.array([0.05, 0.3, *([0.02, 0.1, 0.2, 0.3]), *np.linspace(0.011, 0.018, 8)])
    together = select_together(np.diag(alone), heads, SWIN, 0.4)
    each = np.split(alone, [2, 6])
    separate = select({path: values / SWIN[path] for path, values in zip(heads, each, strict=True)}, SWIN, 0.4)
    assert_same(together, separate)
    # per entry 0.003 and 0.019; 0.005, 0.025 …; 0.011 …: of 56, 22 may be frozen
    assert together.heads == {"first": (0,), "second": (0,), "third": (0, 1)}
    assert together.sparsity == 22 / 56


def test_heads_that_pull_against_each_other_are_frozen_together() -> None:
    costs = np.array([[1.0, 0.0, 0.9], [0.0, 1.1, -1.0], [0.9, -1.0, 1.2]])
    assert select_together(costs, {"a": 3}, {"a": 1}, 2 / 3).heads == {"a": (1, 2)}  # 0.3; 0 and 1 cost 2.1
    assert select_together(costs, {"a": 3}, {"a": 1}, 1 / 3).heads == {"a": (0,)}
    assert select_together(costs, {"a": 3}, {"a": 1}, 1).heads == {"a": (0, 1, 2)}
    assert select_together(costs, {"a": 3}, {"a": 1}, 0).heads == {}


def test_an_exchange_takes_back_what_greed_chose_first() -> None:
    """Head 0 is the cheapest alone, and costs most beside the two that go well together."""
    costs = np.array([[1.0, 0.5, 0.5, 0.4], [0.5, 1.1, -0.9, 0.0], [0.5, -0.9, 1.1, 0.0], [0.4, 0.0, 0.0, 9.0]])
    assert select_together(costs, {"a": 4}, {"a": 1}, 0.5).heads == {"a": (1, 2)}


@given(
    factors=hnp.arrays(np.float64, (7, 3), elements=st.floats(-1, 1).map(lambda x: round(x, 3))),
    sparsity=st.floats(0, 1),
)
def test_together_fits_fills_up_and_comes_near_the_best_set(factors: NDArray[np.float64], sparsity: float) -> None:
    heads = {"first": 2, "second": 2, "third": 3}
    costs = factors @ factors.T + np.diag(np.full(7, 0.1))
    selection = select_together(costs, heads, SWIN, sparsity)
    frozen = chosen_of(selection, heads)
    sizes = [SWIN[path] for path, count in heads.items() for _ in range(count)]
    budget = int((sparsity + 1e-9) * sum(sizes))
    used = sum(size for size, taken in zip(sizes, frozen, strict=True) if taken)
    assert used <= budget and selection.sparsity == used / sum(sizes)
    assert all(size > budget - used for size, taken in zip(sizes, frozen, strict=True) if not taken)
    assert cost_of(costs, frozen) >= cheapest(costs, sizes, budget) - 1e-9
    # no exchange for one of at least the size makes it cheaper
    for out in np.flatnonzero(frozen):
        for into in np.flatnonzero(~frozen):
            if sizes[out] <= sizes[into] <= sizes[out] + budget - used:
                other = frozen.copy()
                other[[out, into]] = False, True
                assert cost_of(costs, other) >= cost_of(costs, frozen) - 1e-6


@pytest.mark.parametrize("sparsity", [-0.1, 1.01, 20, float("nan"), float("inf")])
def test_sparsity_outside_its_range(sparsity: float) -> None:
    with pytest.raises(ConfigError, match=r"number in \[0, 1\]; got"):
        select({"a": np.zeros(2)}, {"a": 1}, sparsity)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_cannot_be_ranked(bad: float) -> None:
    with pytest.raises(ConfigError, match=r"scores of blocks\.1"):
        select({"blocks.0": np.zeros(2), "blocks.1": np.array([0, bad])}, {"blocks.0": 1, "blocks.1": 1}, 0.5)


def test_other_contradictions() -> None:
    with pytest.raises(ConfigError, match="different modules"):
        select({"a": np.zeros(2)}, {"b": 1}, 0.5)
    with pytest.raises(ConfigError, match="one finite number per piece, heads first"):
        select({"a": np.array(1.0)}, {"a": 1}, 0.5)
    for nothing in ({}, {"a": np.zeros((0, 3))}):
        with pytest.raises(ConfigError, match="no attention to freeze"):
            select(nothing, dict.fromkeys(nothing, 1), 0.5)
    with pytest.raises(ConfigError, match="without entries"):
        select({"a": np.zeros(2)}, {"a": 0}, 0.5)
    with pytest.raises(ConfigError, match="costs of pairs of heads"):
        select_together(np.array([[1.0, np.nan], [np.nan, 1.0]]), {"a": 2}, {"a": 1}, 0.5)
    with pytest.raises(ConfigError, match="scores of a"):
        select_together(np.diag([1.0, np.inf]), {"a": 2}, {"a": 1}, 0.5)


def whole_heads(heads: int, tokens: int, mask: NDArray[np.bool_] | None = None) -> FrozenMaps:
    return FrozenMaps(
        np.arange(heads), np.zeros((heads, tokens, tokens), np.uint8), np.zeros((heads, tokens), np.float32), mask
    )


def test_sparsity_counts_frozen_entries_of_all_windows() -> None:
    attention = {
        "a": AttentionShape(heads=2, tokens=2, windows=[0, 0, 0, 0]),  # 32 entries
        "b": AttentionShape(heads=1, tokens=4, windows=[0]),  # 16 entries
    }
    rows = np.array([[True, False, False, True]])
    entries = np.zeros((1, 4, 4), np.bool_)
    entries[0, 1, :3] = True
    for frozen, count in (
        ({}, 0),
        ({"a": whole_heads(1, 2)}, 16),
        ({"a": whole_heads(2, 2), "b": whole_heads(1, 4)}, 48),
        ({"b": whole_heads(1, 4, rows)}, 8),
        ({"a": whole_heads(1, 2, np.array([[True, False]])), "b": whole_heads(1, 4, rows)}, 16),
        ({"b": whole_heads(1, 4, entries)}, 3),
    ):
        assert sparsity_of(frozen, attention) == count / 48


def test_sparsity_of_what_does_not_belong_to_the_model() -> None:
    with pytest.raises(ConfigError, match=r"unknown modules; expected \['a'\]; got \['b'\]"):
        sparsity_of({"b": whole_heads(1, 2)}, {"a": AttentionShape(heads=2, tokens=2)})
    with pytest.raises(ConfigError, match="no attention to freeze"):
        sparsity_of({}, {})
