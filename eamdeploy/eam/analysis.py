"""What `analyze` finds about a model's attention maps; readable without torch."""

from __future__ import annotations

from typing import Literal

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.records import Record
from eamdeploy.eam.records import AttentionShape, Calibration
from eamdeploy.vocabulary import Granularity, Spacing


class Analysis(Record):
    """What the attention maps of a model look like over a set of images; the output of `analyze`.

    Attributes:
        granularity, window_maps: what would be frozen as one piece, and which windows would share a map (None: the
            model has no windows).
        scores: by score, by attention module path, one value per head; the mean over its pieces.
        frozen: the heads of which `freeze` would take something at `sparsity_asked` by `score`.
        shares: for each of these heads, which share of its entries would be frozen, in (0, 1].
    """

    timm_model: str
    weights: str
    preprocessing: Preprocessing
    attention: dict[str, AttentionShape]
    calibration: Calibration
    granularity: Granularity
    window_maps: Literal["shared", "class", "window"] | None
    bins: int
    spacing: Spacing
    score: Literal["sensitivity", "entropy", "row-entropy", "variance", "random"]
    scores: dict[str, dict[str, list[float]]]
    sparsity_asked: float
    sparsity: float
    frozen: dict[str, list[int]]
    shares: dict[str, list[float]]
    versions: dict[str, str]
