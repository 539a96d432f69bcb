from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from PIL import Image

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.errors import ConfigError, EngineError, ParityError
from eamdeploy.images.preprocess import ImageFolder, open_folder
from eamdeploy.parity.accuracy import (
    Evaluation,
    Predict,
    is_no_better_than_guessing,
    kl_divergence,
    mean_kl,
    measure_accuracy,
    same_top1,
    top_k_hits,
    with_fixed_batch,
)

Floats = NDArray[np.float32]

# mean and std such that the model sees the pixel values 0…255 again
AS_BYTES = Preprocessing(size=(4, 4), mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255), crop_pct=1.0)

logits_of_a_batch = npst.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 7)), elements=st.floats(-1e4, 1e4, width=32)
)


@st.composite
def two_batches(draw: st.DrawFn) -> tuple[Floats, Floats]:
    first = draw(logits_of_a_batch)
    return first, draw(npst.arrays(np.float32, first.shape, elements=st.floats(-1e4, 1e4, width=32)))


# top_k_hits and same_top1


def test_top_k_hits_by_hand() -> None:
    logits = np.array([[0.1, 3.0, 2.0, 1.0]] * 4, np.float32)  # order of classes: 1, 2, 3, 0
    labels = np.array([0, 1, 2, 3])
    assert top_k_hits(logits, labels, 1).tolist() == [False, True, False, False]
    assert top_k_hits(logits, labels, 2).tolist() == [False, True, True, False]
    assert top_k_hits(logits, labels, 3).tolist() == [False, True, True, True]


def test_more_places_than_classes_hit_always() -> None:
    assert top_k_hits(np.array([[1.0, 5.0, 3.0]]), np.array([0]), 5).tolist() == [True]
    assert top_k_hits(np.array([[1.0, 5.0, 3.0]]), np.array([0]), 2).tolist() == [False]


def test_equal_logits_do_not_make_every_class_a_hit() -> None:
    constant = np.zeros((3, 10), np.float32)
    assert top_k_hits(constant, np.array([0, 4, 5]), 5).tolist() == [True, True, False]
    assert top_k_hits(constant, np.array([0, 1, 9]), 1).tolist() == [True, False, False]


@given(logits_of_a_batch, st.data())
def test_one_place_is_the_argmax(logits: Floats, data: st.DataObject) -> None:
    labels = data.draw(npst.arrays(np.int64, len(logits), elements=st.integers(0, logits.shape[1] - 1)))
    np.testing.assert_array_equal(top_k_hits(logits, labels, 1), logits.argmax(axis=1) == labels)


@given(logits_of_a_batch, st.integers(1, 7))
def test_exactly_k_classes_are_hits(logits: Floats, k: int) -> None:
    classes = logits.shape[1]
    hits = sum(top_k_hits(logits, np.full(len(logits), c), k).astype(int) for c in range(classes))
    np.testing.assert_array_equal(hits, min(k, classes))


def test_same_top1_by_hand() -> None:
    first = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]])
    other = np.array([[0.0, 9.0], [0.0, 9.0], [5.0, 0.0]])
    assert same_top1(first, other).tolist() == [True, False, True]


# KL


def test_kl_by_hand() -> None:
    p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # 0.1438…
    backward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)  # 0.1308…
    assert kl_divergence(p, q)[0] == pytest.approx(forward, rel=1e-12)
    assert kl_divergence(q, p)[0] == pytest.approx(backward, rel=1e-12)
    assert forward == pytest.approx(0.1438, abs=1e-4)
    assert mean_kl(np.concatenate([p, p]), np.concatenate([q, p])) == pytest.approx(forward / 2, rel=1e-12)


def test_kl_of_logits_beyond_the_range_of_exp() -> None:
    sure, opposite = np.array([[1e4, -1e4]], np.float32), np.array([[-1e4, 1e4]], np.float32)
    assert kl_divergence(sure, opposite)[0] == pytest.approx(2e4, rel=1e-12)
    assert kl_divergence(sure, sure)[0] == 0


@given(two_batches())
def test_kl_is_never_negative(pair: tuple[Floats, Floats]) -> None:
    kl = kl_divergence(*pair)
    assert kl.shape == (len(pair[0]),)
    assert kl.dtype == np.float64
    assert np.isfinite(kl).all()
    assert (kl >= 0).all()


def test_kl_of_almost_equal_logits_does_not_round_below_zero() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2000, 5))
    almost = logits + 1e-9 * rng.normal(size=logits.shape)
    assert (kl_divergence(logits, almost) >= 0).all()


@given(logits_of_a_batch)
def test_kl_to_oneself_is_exactly_zero(logits: Floats) -> None:
    np.testing.assert_array_equal(kl_divergence(logits, logits), 0)


@given(two_batches(), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_kl_ignores_what_softmax_ignores(pair: tuple[Floats, Floats], shift: float, other: float) -> None:
    reference, candidate = (logits.astype(np.float64) for logits in pair)
    shifted = kl_divergence(reference + shift, candidate + other)
    # the shifts themselves round logits of up to 2e4 to about 4e-12
    np.testing.assert_allclose(shifted, kl_divergence(reference, candidate), rtol=1e-9, atol=1e-9)


# with_fixed_batch


def sums(images: Floats) -> Floats:
    return images.sum(axis=(2, 3))


@pytest.mark.parametrize(("count", "calls"), [(1, 1), (3, 1), (4, 2), (6, 2), (7, 3)])
def test_a_fixed_batch_is_filled_up_and_cut(count: int, calls: int) -> None:
    images = np.random.default_rng(0).normal(size=(count, 3, 2, 2)).astype(np.float32)
    seen: list[Floats] = []

    def only_three(batch: Floats) -> Floats:
        seen.append(batch)
        return sums(batch)

    np.testing.assert_array_equal(with_fixed_batch(only_three, 3)(images), sums(images))
    assert [len(batch) for batch in seen] == [3] * calls
    fill = calls * 3 - count
    np.testing.assert_array_equal(seen[-1][3 - fill :], np.repeat(images[-1:], fill, axis=0))


def test_a_fixed_batch_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1; got 0"):
        with_fixed_batch(sums, 0)


# guessing


def at_least(hits: int, trials: int, probability: Fraction) -> Fraction:
    """Exact, by counting."""
    return sum(
        (math.comb(trials, k) * probability**k * (1 - probability) ** (trials - k) for k in range(hits, trials + 1)),
        Fraction(0),
    )


@pytest.mark.parametrize("classes", [2, 3, 12, 1000])
@pytest.mark.parametrize("images", [1, 2, 4, 5, 12, 24, 100])
def test_labels_are_doubted_where_guessing_does_as_well_and_half_as_good_a_model_would_not(
    images: int, classes: int
) -> None:
    guess = Fraction(1, classes)
    for hits in range(images + 1):
        possible = at_least(hits, images, guess) > Fraction(5, 100)
        far_off = 1 - at_least(hits + 1, images, (1 + guess) / 2) <= Fraction(5, 100)
        assert is_no_better_than_guessing(hits, images, classes) == (possible and far_off)


@pytest.mark.parametrize(
    ("hits", "images", "classes", "doubted"),
    [
        (1, 12, 12, True),  # of a good model, whose folders were sorted otherwise
        (83, 1000, 12, True),
        (10, 12, 12, False),
        (0, 1, 1000, False),  # one picture tells nothing
        (0, 5, 1000, True),
        (1, 5, 1000, False),  # guessing would not have found it
        (50, 100, 2, True),
        (14, 20, 2, False),
        (2, 20, 2, True),  # worse than guessing: the two classes are swapped
        (3, 3, 2, False),  # guessing would often do it; that is no reason to doubt a model that is always right
        (50_000 // 1000, 50_000, 1000, True),
        (36_000, 50_000, 1000, False),
        (0, 7, 1, False),
        (0, 7, 0, False),
    ],
)
def test_doubt_by_example(hits: int, images: int, classes: int, doubted: bool) -> None:
    assert is_no_better_than_guessing(hits, images, classes) == doubted


# measure_accuracy


def put_images(root: Path, labels: list[int] | None) -> None:
    """Image i is filled with the value i, which the models below read again."""
    for i in range(6):
        Image.new("RGB", (4, 4), (i, i, i)).save(root / f"{i}.png")
    if labels is not None:
        rows = "".join(f"{i}.png,{label}\n" for i, label in enumerate(labels))
        (root / "labels.csv").write_text(f"file,label\n{rows}")


def folder_of(root: Path, labels: list[int] | None = None, classes: int = 6) -> ImageFolder:
    put_images(root, labels)
    return open_folder(root, classes)


def numbers(images: Floats) -> list[int]:
    return [round(float(value)) for value in images[:, 0, 0, 0]]


def model(ranking: dict[int, list[int]], classes: int = 6) -> Predict:
    """Image i gets logit 10, 9, 8, … for the classes in `ranking[i]`, 0 for the others."""

    def predict(images: Floats) -> Floats:
        logits = np.zeros((len(images), classes), np.float32)
        for row, number in zip(logits, numbers(images), strict=True):
            for place, chosen in enumerate(ranking[number]):
                row[chosen] = 10 - place
        return logits

    return predict


IDENTITY = {i: [i, (i + 1) % 6, (i + 2) % 6, (i + 3) % 6, (i + 4) % 6] for i in range(6)}


def test_accuracy_by_hand(tmp_path: Path) -> None:
    # images 0, 1, 2 right; image 3 has its label second, image 4 fifth, image 5 last
    folder = folder_of(tmp_path, [0, 1, 2, 4, 2, 4])
    result = measure_accuracy(model(IDENTITY), folder, AS_BYTES, batch_size=4)
    assert result.n_images == 6
    assert result.num_classes == 6
    assert result.top1 == 50.0
    assert result.top5 == pytest.approx(100 * 5 / 6)
    assert (result.n_skipped, result.skipped) == (0, [])
    assert (result.agreement, result.kl, result.max_abs_logit_diff) == (None, None, None)
    assert (result.reference_top1, result.reference_top5) == (None, None)


def test_unlabelled_images_give_distances_but_no_accuracy(tmp_path: Path) -> None:
    result = measure_accuracy(
        model(IDENTITY), folder_of(tmp_path), AS_BYTES, batch_size=4, reference=model(IDENTITY | {5: [0]})
    )
    assert (result.top1, result.top5, result.reference_top1, result.reference_top5) == (None, None, None, None)
    assert result.agreement == pytest.approx(100 * 5 / 6)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 100])
def test_the_figures_do_not_depend_on_the_batch_size(tmp_path: Path, batch_size: int) -> None:
    def two_logits(high: float) -> Predict:
        return lambda images: np.array([[high * (n == 5), 0.0] for n in numbers(images)], np.float32)

    folder = folder_of(tmp_path, [0, 0, 1, 1, 1, 1], classes=2)
    result = measure_accuracy(two_logits(2.0), folder, AS_BYTES, batch_size=batch_size, reference=two_logits(-1.0))
    # only image 5 differs: reference logits (−1, 0), candidate's (2, 0)
    p, q = 1 / (1 + math.e), math.e**2 / (1 + math.e**2)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert result.kl == pytest.approx(kl / 6, rel=1e-9)
    assert result.agreement == pytest.approx(100 * 5 / 6)
    assert result.max_abs_logit_diff == 3.0
    assert result.top1 == pytest.approx(100 * 2 / 6)
    assert result.reference_top1 == pytest.approx(100 * 3 / 6)
    assert result.top5 == result.reference_top5 == 100.0  # both of the two classes


def test_fixed_batches_of_both_models_are_respected(tmp_path: Path) -> None:
    def only(count: int) -> Predict:
        def predict(images: Floats) -> Floats:
            assert len(images) == count
            return model(IDENTITY)(images)

        return predict

    result = measure_accuracy(
        only(4),
        folder_of(tmp_path, [0, 1, 2, 3, 4, 5]),
        AS_BYTES,
        batch_size=5,
        reference=only(2),
        fixed_batch=4,
        reference_fixed_batch=2,
    )
    assert (result.n_images, result.top1, result.reference_top1, result.agreement) == (6, 100.0, 100.0, 100.0)
    assert (result.kl, result.max_abs_logit_diff) == (0.0, 0.0)


def test_skipped_files_are_counted_and_named_and_leave_labels_aligned(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [0, 1, 2, 3, 4, 5])
    for bad in (1, 5):
        (tmp_path / f"{bad}.png").write_bytes(b"")
    calls: list[tuple[int, int]] = []
    result = measure_accuracy(
        model(IDENTITY),
        folder,
        AS_BYTES,
        batch_size=2,
        skip_bad=True,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert (result.n_images, result.n_skipped, result.skipped) == (4, 2, ["1.png", "5.png"])
    assert result.top1 == 100.0
    assert calls == [(3, 6), (5, 6), (6, 6)]


def test_a_bad_file_is_an_error_unless_skipped(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"3\.png"):
        measure_accuracy(model(IDENTITY), folder, AS_BYTES, batch_size=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("culprit", ["the model", "the reference model"])
def test_a_logit_that_is_no_number_names_the_model_and_the_image(tmp_path: Path, value: float, culprit: str) -> None:
    def broken(images: Floats) -> Floats:
        logits = model(IDENTITY)(images)
        logits[[n == 4 for n in numbers(images)], 2] = value
        return logits

    predict, reference = (broken, model(IDENTITY)) if culprit == "the model" else (model(IDENTITY), broken)
    with pytest.raises(ParityError, match=rf"^{culprit} returned .*4\.png; expected finite logits; got {value}"):
        measure_accuracy(predict, folder_of(tmp_path), AS_BYTES, batch_size=3, reference=reference)


@pytest.mark.parametrize("shape", [(5,), (1, 6), (6, 0), (6, 6, 1)])
def test_anything_but_a_row_of_logits_for_each_image_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match=r"shape \[6, classes\]"):
        measure_accuracy(lambda _: np.zeros(shape, np.float32), folder_of(tmp_path), AS_BYTES, batch_size=6)


def test_models_of_different_class_counts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected 7; got 6"):
        measure_accuracy(
            model(IDENTITY), folder_of(tmp_path), AS_BYTES, batch_size=3, reference=model(IDENTITY, classes=7)
        )


def test_a_label_beyond_the_models_classes_names_the_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, [0, 1, 2, 3, 6, 5], classes=7)
    with pytest.raises(ConfigError, match=r"4\.png is out of range; expected 0 to 5.*got 6"):
        measure_accuracy(model(IDENTITY), folder, AS_BYTES, batch_size=6)


def test_an_evaluation_survives_its_file(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    folder = folder_of(images, [0] * 6)
    result = measure_accuracy(model(IDENTITY), folder, AS_BYTES, batch_size=4, reference=model(IDENTITY))
    result.write(tmp_path / "evaluation.json")
    assert Evaluation.read(tmp_path / "evaluation.json") == result
