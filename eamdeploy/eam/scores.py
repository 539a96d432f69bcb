"""One number per piece that says how much freezing it would lose: the lowest are frozen first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from eamdeploy.eam.statistics import MapStatistics
from eamdeploy.errors import ConfigError
from eamdeploy.vocabulary import GRANULARITIES, MAP_SCORES, SCORES, Granularity, MapScore, Score

_AXES: dict[Granularity, int] = {"head": 1, "row": 2, "entry": 3}  # of a piece's index: head, query, key


def score_pieces(
    statistics: Mapping[str, Sequence[MapStatistics]], score: MapScore, granularity: Granularity, *, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """The score of every piece by attention module path, in the order of `statistics`.

    A piece is a head, float64 [H]; a row, [H, N]; or an entry, [H, N, N]. Several statistics of a module count by
    their number of samples.

    - `entropy`: entropy of the histogram of each entry in nats (the paper's), mean over the piece's entries
    - `row-entropy`: −Σ A ln A of each row in nats, mean over rows and samples; not for entries
    - `variance`: variance of each entry over the samples, mean over the piece's entries
    - `random`: uniform in [0, 1), a function of seed, module path and piece alone, so that neither the order of the
      modules nor NumPy's version changes it

    Args:
        statistics: for every module, of every frozen map that its heads would keep (one without windows), all of
            shape (H, N, N).
        seed: for `random`.

    Raises:
        ConfigError: an unknown score or granularity, entries by `row-entropy`, or statistics without samples. With
            empty `statistics`, score and granularity are still checked.
    Source: docs/design.md, Scores; entropy after arXiv 2508.16311.
    """
    if score not in MAP_SCORES:
        raise ConfigError("unknown score", expected=f"one of {', '.join(MAP_SCORES)}", got=score)
    check_score(score, granularity)
    if score == "random":
        return {path: _random(seed, path, granularity, maps[0].shape) for path, maps in statistics.items()}
    return {path: _score_module(maps, score, granularity) for path, maps in statistics.items()}


def check_score(score: Score, granularity: Granularity) -> None:
    """Pieces of that granularity can be ranked by that score.

    Raises:
        ConfigError: they can't, or one of the two is unknown.
    """
    if score not in SCORES:
        raise ConfigError("unknown score", expected=f"one of {', '.join(SCORES)}", got=score)
    if granularity not in GRANULARITIES:
        raise ConfigError("unknown granularity", expected=f"one of {', '.join(GRANULARITIES)}", got=granularity)
    if (score, granularity) == ("row-entropy", "entry"):
        raise ConfigError(
            "score row-entropy cannot rank entries",
            expected="sensitivity, entropy, variance or random",
            got=score,
            hint="The entropy of a row belongs to all of it; freeze by granularity row or head to use it.",
        )


def _score_module(maps: Sequence[MapStatistics], score: MapScore, granularity: Granularity) -> NDArray[np.float64]:
    n_samples = sum(one.n_samples for one in maps)
    mean = np.zeros(maps[0].shape[: _AXES[granularity]])
    for one in maps:
        values = one.entropy() if score == "entropy" else one.variance() if score == "variance" else one.row_entropy()
        mean += _over_pieces(values, granularity) * (one.n_samples / n_samples)
    return mean


def _over_pieces(values: NDArray[np.float64], granularity: Granularity) -> NDArray[np.float64]:
    """Mean of `values` [H, N, N], or of rows [H, N], over every piece."""
    shape = values.shape[: _AXES[granularity]]
    return np.asarray(values.reshape(*shape, -1).mean(axis=-1))


def _random(seed: int, path: str, granularity: Granularity, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """53 random bits per piece: always below 1."""
    if granularity == "head":
        words = np.array([_digest(f"{seed}:{path}:{head}") for head in range(shape[0])], np.uint64)
    else:
        pieces = shape[: _AXES[granularity]]
        words = _splitmix64(_digest(f"{seed}:{path}:{granularity}"), math.prod(pieces)).reshape(pieces)
    return np.asarray((words >> np.uint64(11)) / 2.0**53, np.float64)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def _splitmix64(state: int, count: int) -> NDArray[np.uint64]:
    """The first `count` numbers of the generator SplitMix64 from `state`; arithmetic modulo 2^64.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    words = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(state)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(words ^ (words >> np.uint64(31)), np.uint64)
