"""How right a model is on labelled images, and how far it is from a reference model on any images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.records import Record
from eamdeploy.errors import ConfigError, EngineError, ParityError
from eamdeploy.images.folder import ImageFolder
from eamdeploy.images.preprocess import ImageBatch, iter_batches, network_input

Predict: TypeAlias = Callable[[NDArray[Any]], NDArray[np.float32]]
"""Images [B, 3, H, W], normalized float32 or uint8 pixels as the model takes them, to logits float32 [B, classes]."""

Logits: TypeAlias = NDArray[np.floating]
_TOP = 5
_SIGNIFICANCE = 0.05


class Evaluation(Record):
    """What `measure_accuracy` found; a measure that needs labels or a reference is None without.

    Attributes:
        n_images: images the figures are about; `n_skipped` more were unreadable, and `skipped` names them.
        top1, top5: percent of images whose label is the first, or among the first five (or all, if fewer) classes.
        reference_top1, reference_top5: the same for the reference.
        agreement: percent of images for which both have the same first class.
        kl: mean KL divergence of the softmax, from the reference to the model, in nats.
        max_abs_logit_diff: largest difference of any logit of any image.
    """

    n_images: int
    n_skipped: int
    skipped: list[str]
    num_classes: int
    top1: float | None
    top5: float | None
    reference_top1: float | None
    reference_top5: float | None
    agreement: float | None
    kl: float | None
    max_abs_logit_diff: float | None


def measure_accuracy(
    predict: Predict,
    folder: ImageFolder,
    how: Preprocessing,
    *,
    batch_size: int,
    reference: Predict | None = None,
    fixed_batch: int | None = None,
    reference_fixed_batch: int | None = None,
    takes_pixels: bool = False,
    reference_takes_pixels: bool = False,
    skip_bad: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """The model's accuracy on the folder's images and its distance from `reference` on the same images.

    Args:
        batch_size: images decoded and given to the models at a time.
        reference: a model of the same classes and preprocessing.
        fixed_batch, reference_fixed_batch: the one batch size that the model, or the reference, accepts.
        takes_pixels, reference_takes_pixels: whether the model, or the reference, normalizes its input itself.
        skip_bad: leave out and name files that can't be decoded.
        on_progress: is called with the images done and the images of the folder, after each batch and at the end.

    Raises:
        ConfigError: an image can't be used, the class counts differ, or a label is no class of the model.
        EngineError: a model returns something else than one row of logits for each image.
        ParityError: a model returns a logit that is NaN or infinite.
    """
    if fixed_batch is not None:
        predict = with_fixed_batch(predict, fixed_batch)
    if reference is not None and reference_fixed_batch is not None:
        reference = with_fixed_batch(reference, reference_fixed_batch)
    skipped: list[str] = []

    def note_skip(file: Path, _reason: str) -> None:
        skipped.append(folder.name_of(file))

    measured: list[dict[str, NDArray[np.float64]]] = []
    n_images = num_classes = 0
    for batch in iter_batches(folder, how, batch_size, skip_bad, note_skip):
        images = network_input(batch.pixels, how, takes_pixels=takes_pixels)
        logits = _logits("the model", predict, images, batch)
        expected = None
        if reference is not None:
            if reference_takes_pixels != takes_pixels:
                images = network_input(batch.pixels, how, takes_pixels=reference_takes_pixels)
            expected = _logits("the reference model", reference, images, batch)
        num_classes = logits.shape[1]
        _check_classes(num_classes, expected, batch)
        measured.append(_measures(logits, expected, batch.labels))
        n_images += len(batch.files)
        if on_progress is not None:
            on_progress(n_images + len(skipped), len(folder.files))
    if on_progress is not None:
        on_progress(len(folder.files), len(folder.files))  # bad files may follow the last batch
    columns = {name: np.concatenate([part[name] for part in measured]) for name in measured[0]}
    means = {name: float(column.mean()) for name, column in columns.items()}
    largest = columns.get("abs_logit_diff")
    return Evaluation(
        n_images=n_images,
        n_skipped=len(skipped),
        skipped=skipped,
        num_classes=num_classes,
        top1=means.get("top1"),
        top5=means.get("top5"),
        reference_top1=means.get("reference_top1"),
        reference_top5=means.get("reference_top5"),
        agreement=means.get("agreement"),
        kl=means.get("kl"),
        max_abs_logit_diff=None if largest is None else float(largest.max()),
    )


def with_fixed_batch(predict: Predict, batch: int) -> Predict:
    """`predict` for any number of images, calling it with exactly `batch`: the last image fills up, its copies are cut.

    Raises:
        ConfigError: `batch` is below 1.
    """
    if batch < 1:
        raise ConfigError("the fixed batch size can't be used", expected="at least 1", got=batch)

    def predict_any(images: NDArray[Any]) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(images), batch):
            part = images[start : start + batch]
            missing = batch - len(part)
            filled = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
            parts.append(predict(filled)[: len(part)])
        return np.concatenate(parts)

    return predict_any


def top_k_hits(logits: Logits, labels: NDArray[np.int64], k: int) -> NDArray[np.bool_]:
    """bool [B]: whether the label is among the k largest logits; of equal logits the lower class comes first.

    Args:
        logits: [B, classes], finite.
        labels: int64 [B] in [0, classes).
        k: at least 1; all classes count when there are fewer.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)  # [B,1]
    earlier = np.arange(logits.shape[1])[None, :] < labels[:, None]  # [B,classes]
    ahead = (logits > own) | ((logits == own) & earlier)
    return np.asarray(ahead.sum(axis=1) < k)


def same_top1(logits: Logits, other: Logits) -> NDArray[np.bool_]:
    """bool [B]: whether both have the same first class; of equal logits the lower class comes first."""
    return np.asarray(logits.argmax(axis=1) == other.argmax(axis=1))


def kl_divergence(reference: Logits, candidate: Logits) -> NDArray[np.float64]:
    """float64 [B]: Σ p (log p − log q) in nats, p and q the softmax of the two [B, classes] of finite logits.

    In logarithms throughout, so that no probability underflows into 0 · ∞.
    """
    log_p, log_q = _log_softmax(reference), _log_softmax(candidate)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return np.asarray(np.maximum(kl, 0.0))  # never negative but for rounding


def mean_kl(reference: Logits, candidate: Logits) -> float:
    """Mean of `kl_divergence` over the images, in nats."""
    return float(kl_divergence(reference, candidate).mean())


def is_no_better_than_guessing(hits: int, images: int, num_classes: int) -> bool:
    """Whether so few labels are first classes that they seem to have nothing to do with them.

    Two one-sided binomial tests must say so at 5 %: guessing evenly among the classes is not refuted by so many hits,
    but a model halfway between guessing and being always right is refuted by so few. Thus a few images of a fair model
    raise no doubt.
    """
    if num_classes < 2:
        return False
    guess = 1 / num_classes
    by_guessing = 1 - _at_most(hits - 1, images, guess)
    by_halfway = _at_most(hits, images, (1 + guess) / 2)
    return by_guessing > _SIGNIFICANCE and by_halfway <= _SIGNIFICANCE


def _at_most(hits: int, trials: int, probability: float) -> float:
    """P(X ≤ hits) of the binomial distribution; 0 below no hits."""
    log_p, log_q = math.log(probability), math.log1p(-probability)
    ways = math.lgamma(trials + 1)
    return math.fsum(
        math.exp(ways - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * log_p + (trials - k) * log_q)
        for k in range(hits + 1)
    )


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _logits(model: str, predict: Predict, images: NDArray[Any], batch: ImageBatch) -> NDArray[np.float32]:
    logits = np.asarray(predict(images))
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] == 0:
        raise EngineError(
            f"{model} returned no logits", expected=f"shape [{len(images)}, classes]", got=list(logits.shape)
        )
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        first = int(bad.argmax())
        value = logits[first][~np.isfinite(logits[first])][0]
        raise ParityError(
            f"{model} returned a logit that is no number for {batch.files[first]}", expected="finite logits", got=value
        )
    return logits


def _check_classes(num_classes: int, expected: Logits | None, batch: ImageBatch) -> None:
    if expected is not None and expected.shape[1] != num_classes:
        raise ConfigError(
            "the model and the reference have different classes", expected=expected.shape[1], got=num_classes
        )
    if batch.labels is not None and batch.labels.max() >= num_classes:
        worst = int(batch.labels.argmax())
        raise ConfigError(
            f"the label of {batch.files[worst]} is out of range",
            expected=f"0 to {num_classes - 1}, as the model returns {num_classes} classes",
            got=int(batch.labels[worst]),
        )


def _measures(
    logits: Logits, expected: Logits | None, labels: NDArray[np.int64] | None
) -> dict[str, NDArray[np.float64]]:
    """Each measure of each image, float64 [B]; shares are 0 or 100, so that their mean is a percentage."""
    found: dict[str, NDArray[np.float64]] = {}
    if labels is not None:
        found["top1"] = _percent(top_k_hits(logits, labels, 1))
        found["top5"] = _percent(top_k_hits(logits, labels, _TOP))
    if expected is not None:
        found["agreement"] = _percent(same_top1(expected, logits))
        found["kl"] = kl_divergence(expected, logits)
        found["abs_logit_diff"] = np.abs(logits.astype(np.float64) - expected).max(axis=1)
        if labels is not None:
            found["reference_top1"] = _percent(top_k_hits(expected, labels, 1))
            found["reference_top5"] = _percent(top_k_hits(expected, labels, _TOP))
    return found


def _percent(hits: NDArray[np.bool_]) -> NDArray[np.float64]:
    return hits.astype(np.float64) * 100
