"""What to freeze and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from eamdeploy.eam import scores as map_scores
from eamdeploy.eam.quantizers import Bits, Quantizer, quantize_rows
from eamdeploy.eam.selection import GRANULARITIES, Granularity, check_sparsity
from eamdeploy.eam.statistics import Spacing
from eamdeploy.errors import ConfigError
from eamdeploy.host.sites import WINDOW_MAPS, WindowMaps

Score = Literal["sensitivity", "entropy", "row-entropy", "variance", "random"]
SCORES: tuple[Score, ...] = get_args(Score)


@dataclass(frozen=True)
class FreezeOptions:
    """What to freeze and how.

    Attributes:
        sparsity: frozen ÷ all attention entries, in [0, 1].
        granularity: what is frozen as one piece.
        window_maps: which windows share a frozen map, see `sites.window_maps`; ignored for models without windows.
        score: what freezing is chosen by; see `eam.selection`.
        bits, quantizer: how a frozen map is stored.
        bins, spacing: of the histograms behind `entropy`.
        seed: for the score `random`, and for the labels that `sensitivity` of rows and entries draws.
        score_images: at most that many images for `sensitivity`. None: 48 for heads, all for rows and entries. For
            heads they are drawn by `eam.telling_images`, for rows and entries spread evenly over all of them.
    """

    sparsity: float = 0.2
    granularity: Granularity = "head"
    window_maps: WindowMaps = "shared"
    score: Score = "sensitivity"
    bits: Bits = 4
    quantizer: Quantizer = "squared"
    bins: int = 16
    spacing: Spacing = "uniform"
    seed: int = 0
    score_images: int | None = None


DEFAULT_OPTIONS = FreezeOptions()


def check_options(options: FreezeOptions) -> None:
    """`options` can be used; so that bad ones fail before minutes of work, not after.

    Raises:
        ConfigError: they can't.
    """
    check_sparsity(options.sparsity)
    for name, value, allowed in (
        ("score", options.score, SCORES),
        ("granularity", options.granularity, GRANULARITIES),
        ("window maps", options.window_maps, WINDOW_MAPS),
    ):
        if value not in allowed:
            raise ConfigError(f"unknown {name}", expected=f"one of {', '.join(allowed)}", got=value)
    if options.score != "sensitivity":
        map_scores.score_pieces({}, options.score, options.granularity)
    quantize_rows(np.ones((1, 1)), options.bits, options.quantizer)
    if options.score_images is not None and options.score_images < 1:
        raise ConfigError("cannot score on that number of images", expected="at least 1", got=options.score_images)
