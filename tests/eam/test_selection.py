"""Selection by sparsity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eamdeploy.eam.selection import select, sparsity_of
from eamdeploy.errors import ConfigError

DEIT_TINY = {f"blocks.{i}.attn": 197 * 197 for i in range(12)}


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


def test_a_head_that_does_not_fit_ends_the_prefix() -> None:
    scores = {"small": np.array([0.0, 2.0]), "large": np.array([1.0])}
    selection = select(scores, {"small": 10, "large": 80}, 0.5)
    assert selection.heads == {"small": (0,)}
    assert selection.sparsity == 0.1


@given(
    modules=st.dictionaries(
        st.text("abc.", min_size=1, max_size=4),
        st.tuples(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5]), min_size=1, max_size=5), st.integers(1, 50)),
        min_size=1,
        max_size=5,
    ),
    sparsity=st.floats(0, 1),
)
def test_properties(modules: dict[str, tuple[list[float], int]], sparsity: float) -> None:
    scores = {path: np.array(values) for path, (values, _) in modules.items()}
    entries = {path: size for path, (_, size) in modules.items()}
    selection = select(scores, entries, sparsity)
    assert selection == select(scores, entries, sparsity)
    assert selection.sparsity <= sparsity + 1e-9
    assert selection.sparsity == sparsity_of(selection.heads, {p: len(s) for p, s in scores.items()}, entries)

    frozen = {(path, head) for path, heads in selection.heads.items() for head in heads}
    live = {(path, head) for path, values in scores.items() for head in range(len(values))} - frozen
    assert all(list(heads) == sorted(heads) for heads in selection.heads.values())
    if frozen and live:
        assert max(scores[p][h] for p, h in frozen) <= min(scores[p][h] for p, h in live)
    if live:  # longest: the next head in the ranking would not have fitted
        order = list(scores)
        path, _ = min(live, key=lambda piece: (scores[piece[0]][piece[1]], order.index(piece[0]), piece[1]))
        total = sum(len(scores[p]) * entries[p] for p in scores)
        assert selection.sparsity + entries[path] / total > sparsity

    for lower in (0.0, sparsity / 2):  # a smaller sparsity freezes a subset
        fewer = select(scores, entries, lower).heads
        assert {(p, h) for p, heads in fewer.items() for h in heads} <= frozen


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
    with pytest.raises(ConfigError, match="one finite number per head"):
        select({"a": np.zeros((2, 2))}, {"a": 1}, 0.5)
    with pytest.raises(ConfigError, match="no attention head"):
        select({}, {}, 0.5)
    with pytest.raises(ConfigError, match="without entries"):
        select({"a": np.zeros(2)}, {"a": 0}, 0.5)
    with pytest.raises(ConfigError, match="unknown modules"):
        sparsity_of({"b": [0]}, {"a": 2}, {"a": 1})
