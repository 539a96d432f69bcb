"""Every score ranks heads as its definition says."""

from __future__ import annotations

import numpy as np
import pytest

from eamdeploy.eam.scores import SCORES, score_heads
from eamdeploy.eam.statistics import MapStatistics
from eamdeploy.errors import ConfigError


def statistics() -> dict[str, MapStatistics]:
    rng = np.random.default_rng(0)
    made = {}
    for path in ("blocks.0.attn", "blocks.1.attn"):
        made[path] = MapStatistics((3, 4, 4), module=path)
        made[path].update(rng.dirichlet(np.ones(4), size=(20, 3, 4)).astype(np.float32))
    return made


@pytest.mark.parametrize(
    ("score", "result"), [("entropy", "entropy"), ("variance", "variance"), ("row-entropy", "row_entropy")]
)
def test_a_score_is_the_mean_over_the_head(score: str, result: str) -> None:
    modules = statistics()
    scores = score_heads(modules, score)  # type: ignore[arg-type]
    assert list(scores) == list(modules)
    for path, module in modules.items():
        pieces = getattr(module, result)()
        expected = [pieces[head].mean() for head in range(3)]
        np.testing.assert_allclose(scores[path], expected, rtol=1e-12)
        assert len(set(scores[path])) == 3


def test_windows_are_averaged_within_their_head() -> None:
    module = MapStatistics((2, 3, 4, 4))
    module.update(np.random.default_rng(0).dirichlet(np.ones(4), size=(5, 2, 3, 4)).astype(np.float32))
    scores = score_heads({"a": module}, "row-entropy")
    np.testing.assert_allclose(scores["a"], module.row_entropy().mean(axis=(1, 2)))


def test_the_three_scores_disagree_where_they_should() -> None:
    """Head 0: the same sharp map always. Head 1: the same flat map always. Head 2: sharp, but elsewhere each time."""
    eye = np.eye(4, dtype=np.float32)
    maps = np.stack([np.stack([eye, np.full((4, 4), 0.25, np.float32), np.roll(eye, i, axis=1)]) for i in range(4)])
    module = MapStatistics((3, 4, 4))
    module.update(maps)
    entropy, row_entropy, variance = (
        score_heads({"a": module}, score)["a"] for score in ("entropy", "row-entropy", "variance")
    )
    assert entropy[0] == entropy[1] == 0 < entropy[2]
    assert row_entropy[0] == row_entropy[2] == 0 < row_entropy[1]
    assert variance[0] == variance[1] == 0 < variance[2]


def test_random_depends_on_seed_path_and_head_but_not_on_the_order_of_modules() -> None:
    modules = statistics()
    first = score_heads(modules, "random", seed=1)
    again = score_heads(dict(reversed(modules.items())), "random", seed=1)
    alone = score_heads({"blocks.1.attn": modules["blocks.1.attn"]}, "random", seed=1)
    other = score_heads(modules, "random", seed=2)
    for path in modules:
        np.testing.assert_array_equal(first[path], again[path])
        assert not np.any(first[path] == other[path])
    np.testing.assert_array_equal(first["blocks.1.attn"], alone["blocks.1.attn"])
    values = np.concatenate(list(first.values()))
    assert len(set(values)) == 6
    assert ((values >= 0) & (values < 1)).all()


def test_random_is_the_same_on_every_machine() -> None:
    module = MapStatistics((2, 2, 2))
    assert score_heads({"blocks.0.attn": module}, "random")["blocks.0.attn"].tolist() == [
        0.5883335638478382,
        0.28843932185541965,
    ]


def test_random_is_uniform() -> None:
    values = score_heads({"a": MapStatistics((2000, 1, 1))}, "random")["a"]
    assert values.mean() == pytest.approx(0.5, abs=0.03)
    assert values.std() == pytest.approx(12**-0.5, abs=0.02)


def test_unknown_scores_and_missing_samples_are_errors() -> None:
    with pytest.raises(ConfigError, match=f"{', '.join(SCORES)}.*got magic"):
        score_heads({}, "magic")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least one sample"):
        score_heads({"a": MapStatistics((1, 2, 2))}, "entropy")
