"""One number per head that says how much freezing it would lose: the lowest are frozen first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from eamdeploy.eam.statistics import MapStatistics
from eamdeploy.errors import ConfigError

Score = Literal["entropy", "row-entropy", "variance", "random"]

SCORES: tuple[Score, ...] = get_args(Score)


def score_heads(
    statistics: Mapping[str, MapStatistics], score: Score, *, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """The score of every head: float64 [H] by attention module path, in the order of `statistics`.

    - `entropy`: entropy of the histogram of each entry in nats, mean over the head's entries (the paper's)
    - `row-entropy`: −Σ A ln A of each row in nats, mean over rows and images
    - `variance`: variance of each entry over the images, mean over the head's entries
    - `random`: uniform in [0, 1), a function of seed, module path and head alone, so that neither the order of the
      modules nor NumPy's version changes it

    Raises:
        ConfigError: an unknown score, or a module without samples.
    Source: DESIGN §1; entropy after arXiv 2508.16311.
    """
    if score not in SCORES:
        raise ConfigError("unknown score", expected=f"one of {', '.join(SCORES)}", got=score)
    return {path: _score_module(path, module, score, seed) for path, module in statistics.items()}


def _score_module(path: str, module: MapStatistics, score: Score, seed: int) -> NDArray[np.float64]:
    if score == "random":
        return np.array([_random(seed, path, head) for head in range(module.shape[0])])
    if score == "entropy":
        pieces = module.entropy()
    elif score == "variance":
        pieces = module.variance()
    else:
        pieces = module.row_entropy()
    return np.asarray(pieces.reshape(module.shape[0], -1).mean(axis=1))


def _random(seed: int, path: str, head: int) -> float:
    digest = hashlib.sha256(f"{seed}:{path}:{head}".encode()).digest()
    return (int.from_bytes(digest[:8], "little") >> 11) / 2**53  # 53 bits: always below 1
