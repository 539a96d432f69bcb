"""Every score ranks heads, rows and entries as its definition says."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from eamdeploy.eam.scores import score_pieces
from eamdeploy.eam.statistics import MapStatistics
from eamdeploy.errors import ConfigError
from eamdeploy.vocabulary import GRANULARITIES, MAP_SCORES, Granularity, MapScore

RESULTS: dict[MapScore, str] = {"entropy": "entropy", "variance": "variance", "row-entropy": "row_entropy"}
AXES: dict[Granularity, tuple[int, ...]] = {"head": (1, 2), "row": (2,), "entry": ()}


def collect(n_samples: int, seed: int = 0, path: str = "a") -> MapStatistics:
    made = MapStatistics((3, 4, 4), module=path)
    made.update(np.random.default_rng(seed).dirichlet(np.ones(4), size=(n_samples, 3, 4)).astype(np.float32))
    return made


def statistics() -> dict[str, list[MapStatistics]]:
    return {path: [collect(20, seed, path)] for seed, path in enumerate(("blocks.0.attn", "blocks.1.attn"))}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("score", ["entropy", "variance"])
def test_a_score_is_the_mean_over_the_piece(score: MapScore, granularity: Granularity) -> None:
    modules = statistics()
    scores = score_pieces(modules, score, granularity)
    assert list(scores) == list(modules)
    for path, (module,) in modules.items():
        expected = getattr(module, RESULTS[score])().mean(axis=AXES[granularity])
        assert scores[path].dtype == np.float64
        np.testing.assert_allclose(scores[path], expected, rtol=1e-12, strict=True)


def test_row_entropy_is_of_heads_and_rows() -> None:
    module = collect(20)
    rows = module.row_entropy()
    np.testing.assert_array_equal(score_pieces({"a": [module]}, "row-entropy", "row")["a"], rows, strict=True)
    heads = score_pieces({"a": [module]}, "row-entropy", "head")["a"]
    np.testing.assert_allclose(heads, rows.mean(axis=1), rtol=1e-12, strict=True)
    with pytest.raises(ConfigError, match=r"row-entropy cannot rank entries; expected sensitivity, entropy, variance"):
        score_pieces({}, "row-entropy", "entry")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("score", RESULTS)
def test_several_window_maps_count_by_their_samples(score: MapScore, granularity: Granularity) -> None:
    if (score, granularity) == ("row-entropy", "entry"):
        return
    often, seldom = collect(30, 1), collect(10, 2)
    together = score_pieces({"a": [often, seldom]}, score, granularity)["a"]
    one, other = (score_pieces({"a": [each]}, score, granularity)["a"] for each in (often, seldom))
    np.testing.assert_allclose(together, (3 * one + other) / 4, rtol=1e-12)
    assert not np.allclose(together, (one + other) / 2, rtol=1e-6)


def test_the_three_scores_disagree_where_they_should() -> None:
    """Head 0: the same sharp map always. Head 1: the same flat map always. Head 2: sharp, but elsewhere each time."""
    eye = np.eye(4, dtype=np.float32)
    maps = np.stack([np.stack([eye, np.full((4, 4), 0.25, np.float32), np.roll(eye, i, axis=1)]) for i in range(4)])
    module = MapStatistics((3, 4, 4))
    module.update(maps)
    entropy, row_entropy, variance = (
        score_pieces({"a": [module]}, score, "head")["a"] for score in ("entropy", "row-entropy", "variance")
    )
    assert entropy[0] == entropy[1] == 0 < entropy[2]
    assert row_entropy[0] == row_entropy[2] == 0 < row_entropy[1]
    assert variance[0] == variance[1] == 0 < variance[2]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_random_depends_on_seed_path_and_piece_but_not_on_the_order_of_modules(granularity: Granularity) -> None:
    modules = statistics()
    first = score_pieces(modules, "random", granularity, seed=1)
    again = score_pieces(dict(reversed(modules.items())), "random", granularity, seed=1)
    alone = score_pieces({"blocks.1.attn": modules["blocks.1.attn"]}, "random", granularity, seed=1)
    other = score_pieces(modules, "random", granularity, seed=2)
    for path, (module,) in modules.items():
        assert first[path].shape == module.shape[: 3 - len(AXES[granularity])]
        np.testing.assert_array_equal(first[path], again[path])
        assert not np.any(first[path] == other[path])
    np.testing.assert_array_equal(first["blocks.1.attn"], alone["blocks.1.attn"])
    values = np.concatenate([module.reshape(-1) for module in first.values()])
    assert len(set(values.tolist())) == values.size
    assert ((values >= 0) & (values < 1)).all()


def test_random_is_the_same_on_every_machine() -> None:
    module = {"blocks.0.attn": [MapStatistics((2, 2, 2))]}
    assert score_pieces(module, "random", "head")["blocks.0.attn"].tolist() == [0.5883335638478382, 0.28843932185541965]
    rows, entries = (score_pieces(module, "random", each)["blocks.0.attn"] for each in ("row", "entry"))
    assert rows.tolist() == [[0.7245789262505027, 0.5405558206436977], [0.9953607005502201, 0.8567534237866361]]
    assert entries.reshape(-1)[[0, 7]].tolist() == [0.8471347732429506, 0.9922581275051214]


def test_random_of_rows_is_splitmix64_from_a_digest() -> None:
    state = int.from_bytes(hashlib.sha256(b"3:a:row").digest()[:8], "little")
    expected = []
    for _ in range(6):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = state
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            word = (word ^ word >> shift) * factor % 2**64
        expected.append(((word ^ word >> 31) >> 11) / 2**53)
    scores = score_pieces({"a": [MapStatistics((2, 3, 3))]}, "random", "row", seed=3)
    assert scores["a"].reshape(-1).tolist() == expected


@pytest.mark.parametrize(
    ("granularity", "shape"), [("head", (2000, 1, 1)), ("row", (2, 1000, 1)), ("entry", (1, 45, 45))]
)
def test_random_is_uniform(granularity: Granularity, shape: tuple[int, ...]) -> None:
    values = score_pieces({"a": [MapStatistics(shape)]}, "random", granularity)["a"]
    assert values.mean() == pytest.approx(0.5, abs=0.03)
    assert values.std() == pytest.approx(12**-0.5, abs=0.02)


def test_unknown_scores_and_granularities_and_missing_samples_are_errors() -> None:
    with pytest.raises(ConfigError, match=f"{', '.join(MAP_SCORES)}.*got magic"):
        score_pieces({}, "magic", "head")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown granularity; expected one of head, row, entry; got cell"):
        score_pieces({}, "entropy", "cell")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one sample"):
        score_pieces({"a": [collect(2), MapStatistics((3, 4, 4))]}, "entropy", "head")
