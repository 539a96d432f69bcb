"""The card that every model carries: preprocessing, classes, and what is frozen.

A board reads the card without torch and without onnx.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator

from eamdeploy.artifacts.records import Record
from eamdeploy.vocabulary import Bits, Granularity, Quantizer, RecoveryMethod, WindowMaps


class Preprocessing(Record):
    """How a photograph becomes the model's input; the field names are timm's data-config names.

    Attributes:
        size: height and width of the input in pixels.
        mean, std: per channel (RGB), on a 0…1 scale.
        interpolation: Pillow's filter for the resize.
        crop_pct: share of the resized shorter side that the centre crop keeps, in (0, 1].
        crop_mode: `center` resizes the shorter side and crops; `squash` resizes both sides and ignores aspect.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    crop_pct: float = Field(default=0.875, gt=0, le=1)
    crop_mode: Literal["center", "squash"] = "center"

    @field_validator("size")
    @classmethod
    def _positive(cls, size: tuple[int, int]) -> tuple[int, int]:
        if min(size) < 1:
            raise ValueError(f"size must be positive, got {size}")
        return size

    @field_validator("mean", "std")
    @classmethod
    def _finite(cls, values: tuple[float, float, float]) -> tuple[float, float, float]:
        if not all(map(math.isfinite, values)):
            raise ValueError(f"must be finite, got {values}")
        return values

    @field_validator("std")
    @classmethod
    def _nonzero(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError(f"std must be positive, got {std}")
        return std


class FreezingCost(Record):
    """What freezing a whole set of pieces costs, measured on the calibration images.

    Attributes:
        n_images: how many images.
        kl: mean KL divergence of the softmax, from the unfrozen model to the frozen one, in nats.
        agreement: percent of images for which both have the same first class.
    """

    n_images: int = Field(ge=1)
    kl: float = Field(ge=0, allow_inf_nan=False)
    agreement: float = Field(ge=0, le=100)


class Freezing(Record):
    """What is frozen in a model and how it was chosen.

    Attributes:
        granularity: what is frozen as one piece: a head's map, a row of it, or an entry of it.
        window_maps: which windows share a frozen map: all (`shared`), those with the same shift mask (`class`), or
            none (`window`); None for a model without windows.
        heads: heads with at least one frozen piece by attention module path, e.g. `{"blocks.3.attn": [0, 2]}`.
        ranks: what these heads are frozen to, e.g. `{"blocks.3.attn": [None, 4]}`: factors of that rank, or None for a
            whole map; modules without heads of low rank are left out.
        sparsity: frozen entries ÷ all attention entries, in [0, 1]; `sparsity_asked` is what the user wanted.
        score: what the choice went by, and `scores` its value for every head of every attention module: for rows and
            entries the mean over the head's.
        cost: what the frozen set costs as a whole; None for maps that were not chosen here, and in files made before
            it was measured.
    """

    granularity: Granularity = "head"
    window_maps: WindowMaps | None = None
    bits: Bits
    quantizer: Quantizer
    score: str
    scores: dict[str, list[float]] = Field(default_factory=dict)
    sparsity_asked: float | None
    sparsity: float
    heads: dict[str, list[int]]
    ranks: dict[str, list[int | None]] = Field(default_factory=dict)
    cost: FreezingCost | None = None

    @property
    def low_rank(self) -> dict[int, int]:
        """How many heads are frozen with which rank, ranks ascending."""
        ranks = [rank for each in self.ranks.values() for rank in each if rank is not None]
        return {rank: ranks.count(rank) for rank in sorted(set(ranks))}

    def rank_of(self, path: str, head: int) -> int | None:
        """The rank of a head; None for one that is frozen to a map, and for a live one."""
        heads = self.heads.get(path, [])
        ranks = self.ranks.get(path, [None] * len(heads))
        return dict(zip(heads, ranks, strict=True)).get(head)


class RecoveredLayer(Record):
    """What recovery did to one linear layer.

    Attributes:
        strength: of the ridge, in units of the mean eigenvalue of the inputs' covariance; None where no strength
            lessened the error on the images held back.
        changed: whether the layer has new weights; otherwise it kept its own.
        kl: of the whole model on the images held back once this layer was done with.
    """

    strength: float | None
    changed: bool
    kl: float = Field(ge=0, allow_inf_nan=False)


class TrainedEpoch(Record):
    """What one epoch of training did.

    Attributes:
        loss: mean over the epoch's steps of what training lowers.
        kl, agreement: against the teacher on the images held back, as in `FreezingCost`.
    """

    loss: float = Field(allow_inf_nan=False)
    kl: float = Field(ge=0, allow_inf_nan=False)
    agreement: float = Field(ge=0, le=100)


class Training(Record):
    """How a frozen model was trained.

    Attributes:
        epochs_asked: how often every image was to be seen.
        batch: images of one step.
        learning_rate, maps_rate: Adam's largest step of a weight, and of the logarithm of a frozen entry.
        steps: how many there were.
        epochs: what each did that came to its end.
        kept_epoch: the one whose model was kept, from 1; 0 where none was better than the model of before.
        stopped: why training ended early; None where it did not.
    """

    epochs_asked: int = Field(ge=1)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    maps_rate: float = Field(gt=0, allow_inf_nan=False)
    steps: int = Field(ge=0)
    epochs: list[TrainedEpoch]
    kept_epoch: int = Field(ge=0)
    stopped: str | None = None


class Recovery(Record):
    """How a model recovered from freezing. Its weights are no longer those of the unfrozen model, its teacher.

    Attributes:
        teacher: the seal of the checkpoint that has the teacher's weights; None for one of format 1.
        n_images: how many images, of which `n_held_back` only checked what was learnt from the others.
        digest, source, exif_transpose: of the images, as in the header's `calibration`.
        layers: every layer that was solved or tried, by its path, in the order of the work.
        training: what came then; None for a method that does not train.
        before, after: what freezing costs against the teacher on the images held back.
    """

    method: RecoveryMethod
    teacher: str | None
    n_images: int = Field(ge=2)
    n_held_back: int = Field(ge=1)
    digest: str
    source: str
    exif_transpose: bool = False
    seed: int
    layers: dict[str, RecoveredLayer] = Field(default_factory=dict)
    training: Training | None = None
    before: FreezingCost
    after: FreezingCost

    @property
    def n_changed(self) -> int:
        """How many layers have new weights."""
        return sum(layer.changed for layer in self.layers.values())

    @property
    def what_changed(self) -> str:
        """In words, for a person."""
        solved = f"{self.n_changed} of {len(self.layers)} layers have new weights"
        if self.training is None:
            return solved
        epochs = f"{len(self.training.epochs)} epochs of {self.training.batch} images a step"
        kept = f"that of epoch {self.training.kept_epoch}" if self.training.kept_epoch else "the one before them"
        early = "" if self.training.stopped is None else f", stopped early: {self.training.stopped}"
        return f"{solved}, then {epochs}{early}; the best model is {kept}"


class ModelCard(Record):
    """What a board must know about an ONNX model without torch; stored under `CARD_KEY` in its metadata.

    Attributes:
        weights: where the weights came from; `random` marks a model that is good for latency only.
        freezing: None for an unfrozen model.
        recovery: how the weights were changed after freezing; None where they were not. A model with `recovery` and
            without `freezing` is no reference for accuracy.
        checkpoint_digest: SHA-256 of the EAM checkpoint this was exported from.
        rewrites: names of the passes applied, in order.
        takes_pixels: the input is uint8 [B, 3, H, W], and the graph normalizes it as `preprocessing` says; otherwise
            it is float32, normalized already.
    """

    timm_model: str
    weights: str
    num_classes: int
    class_names: list[str] | None = None
    preprocessing: Preprocessing
    freezing: Freezing | None = None
    recovery: Recovery | None = None
    checkpoint_digest: str | None = None
    rewrites: list[str] = Field(default_factory=list)
    takes_pixels: bool = False
    exporter: str = ""
    versions: dict[str, str] = Field(default_factory=dict)


CARD_KEY = "eamdeploy"

RANDOM_WARNING = "The weights are random: latency and size mean something, accuracy and frozen heads do not."
