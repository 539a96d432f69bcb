"""Maps of low rank: what is recovered, what always holds, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eamdeploy.eam.factors import divergence, em_step, factorize
from eamdeploy.errors import CheckpointError, ConfigError

N = 24


def low_rank(rank: int, seed: int = 0) -> NDArray[np.float64]:
    """A map of that rank, of which some rows are those of the pool."""
    rng = np.random.default_rng(seed)
    pool = rng.dirichlet(np.full(N, 0.3), size=rank)
    mix = rng.dirichlet(np.full(rank, 0.5), size=N)
    mix[rng.permutation(N)[:rank]] = np.eye(rank)
    return np.asarray(mix @ pool)


def any_map(seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).dirichlet(np.full(N, 0.4), size=N)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_a_map_of_that_rank_is_recovered(rank: int, seed: int) -> None:
    mix, pool = factorize(low_rank(rank, seed), rank)
    assert divergence(low_rank(rank, seed), mix @ pool) < 1e-4


def test_a_map_of_few_different_rows_is_recovered_exactly() -> None:
    few = any_map()[[0, 1, 2] * (N // 3)]
    for rank in (3, 4):
        mix, pool = factorize(few, rank)
        assert pool.shape == (rank, N)
        np.testing.assert_allclose(mix @ pool, few, atol=1e-14)


def test_as_many_pooled_tokens_as_tokens_give_the_map() -> None:
    mix, pool = factorize(any_map(), N)
    np.testing.assert_allclose(mix @ pool, any_map(), atol=1e-14)


def test_one_pooled_token_is_the_mean_of_the_rows() -> None:
    mix, pool = factorize(any_map(), 1)
    np.testing.assert_allclose(pool[0], any_map().mean(axis=0), atol=1e-12)
    np.testing.assert_array_equal(mix, np.ones((N, 1)))


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_no_step_raises_the_divergence(rank: int, seed: int) -> None:
    rng, rows = np.random.default_rng(seed), any_map(seed)
    mix, pool = rng.dirichlet(np.ones(rank), size=N), rng.dirichlet(np.ones(N), size=rank)
    errors = []
    for _ in range(60):
        errors.append(divergence(rows, mix @ pool))
        mix, pool = em_step(rows, mix, pool)
    assert (np.diff(errors) <= 1e-12).all()
    if rank > 1:
        assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("rank", [1, 2, 5, N - 1, N])
def test_rows_of_both_factors_sum_to_1_and_nothing_is_negative(rank: int) -> None:
    sparse = any_map()
    sparse[:, 3] = 0
    sparse /= sparse.sum(axis=1, keepdims=True)
    for part in factorize(sparse, rank):
        assert (part >= 0).all()
        np.testing.assert_allclose(part.sum(axis=1), 1, atol=1e-12)


def test_more_rank_is_never_worse_by_much() -> None:
    errors = [divergence(any_map(), np.matmul(*factorize(any_map(), r))) for r in (1, 2, 4, 8, 16)]
    assert (np.diff(errors) < 0).all()


def test_it_is_deterministic() -> None:
    for one, other in zip(factorize(any_map(), 4), factorize(any_map(), 4), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rank", [0, -1, N + 1])
def test_ranks_that_a_map_cannot_have_are_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"the rank of blocks.0; expected a number in 1…{N}"):
        factorize(any_map(), rank, "blocks.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (-0.5, r"leave \[0, 1\]"), (0.9, "do not sum to 1")],
)
def test_what_is_no_map_is_refused(change: float, message: str) -> None:
    broken = any_map()
    broken[2, 5] = change
    with pytest.raises(CheckpointError, match=message):
        factorize(broken, 2)
