from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import FOREIGN, assert_plain, write_foreign
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from eamdeploy.errors import CheckpointError, ConfigError, ExitCode, ParityError
from eamdeploy.parity.gate import (
    TOLERANCES,
    ParityReport,
    Tolerance,
    compare,
    reduced_tolerance,
    require,
    tolerance_of,
)
from eamdeploy.parity.reference_set import ReferenceSet, reference_path

ENGINE = TOLERANCES["f32-engine"]


def logits(n: int = 4, classes: int = 6) -> NDArray[np.float32]:
    """Span about 10, the largest logit of each image ahead by at least 1."""
    values = np.random.default_rng(0).uniform(-5, 4, (n, classes)).astype(np.float32)
    values[np.arange(n), np.arange(n) % classes] = 5
    return values


def test_a_report_names_the_tolerance_that_it_was_judged_by() -> None:
    for tolerance in (*TOLERANCES.values(), *map(reduced_tolerance, (0, 75, 99.5, 100))):
        report = compare(logits(), logits(), tolerance)
        assert tolerance_of(report, "x") == tolerance
        read = ParityReport.parse(report.model_dump_json(), "report")
        assert tolerance_of(read, "x") == tolerance


def test_the_name_of_a_tolerance_is_never_taken_apart() -> None:
    asked = compare(logits(), logits(), reduced_tolerance(75))
    reworded = asked.model_copy(update={"tolerance": "reworded"})
    assert tolerance_of(reworded, "x").top1_agreement == 75
    older = json.loads(asked.model_dump_json(exclude={"min_agreement"}))
    assert older["tolerance"] == "reduced-engine at 75 %"
    for name in ("", "exact", older["tolerance"]):
        report = ParityReport.parse(json.dumps({**older, "tolerance": name}), "older report")
        said = r"tolerance that x\.plan was held to .* one of f32-reassoc.*Build the engine again"
        with pytest.raises(CheckpointError, match=said):
            tolerance_of(report, "x.plan")


@pytest.mark.parametrize("percent", [101, -1, math.nan])
def test_an_agreement_that_is_no_percentage_is_refused(percent: float) -> None:
    report = compare(logits(), logits(), reduced_tolerance(75))
    with pytest.raises(CheckpointError, match="tolerance that x was held to is not known"):
        tolerance_of(report.model_copy(update={"min_agreement": percent}), "x")


def test_equal_logits_pass_with_no_difference() -> None:
    report = compare(logits(), logits(), ENGINE)
    assert report.passed and report.reason is None
    assert (report.n, report.max_abs, report.max_rel, report.top1_agreement) == (4, 0.0, 0.0, 100.0)
    require(report, "anything")


@pytest.mark.parametrize(("delta", "passes"), [(1.9e-3, True), (2.1e-3, False)])
def test_absolute_limit_decides_and_names_the_place(delta: float, passes: bool) -> None:
    got = logits()
    got[2, 4] += np.float32(delta)
    report = compare(logits(), got, ENGINE)
    assert report.passed is passes
    assert report.where == (2, 4)
    assert report.max_abs == pytest.approx(delta, rel=1e-3)
    assert report.max_rel == pytest.approx(delta / float(np.ptp(logits())), rel=1e-3)


@pytest.mark.parametrize(("delta", "passes"), [(0.9e-4, True), (1.1e-4, False)])
def test_span_limit_decides_when_logits_are_small(delta: float, passes: bool) -> None:
    reference = np.array([[0.0, 0.05, 0.1]], np.float32)
    got = reference + np.array([[0, 0, delta]], np.float32)
    report = compare(reference, got, ENGINE)
    assert report.passed is passes
    assert passes or (report.reason is not None and "span" in report.reason)


def test_flipped_first_class_fails_although_the_difference_is_tiny() -> None:
    reference = np.array([[1.0, 1.00001, -9.0], [3, 0, 0]], np.float32)
    got = np.array([[1.00001, 1.0, -9.0], [3, 0, 0]], np.float32)
    report = compare(reference, got, ENGINE)
    assert not report.passed
    assert report.top1_agreement == 50.0
    assert report.reason is not None and "first class" in report.reason and "|Δ" not in report.reason


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["reference", "result", "both"])
def test_not_finite_fails_on_either_side(value: float, side: str) -> None:
    sides = {"reference": logits(), "result": logits()}
    for name in sides if side == "both" else [side]:
        sides[name][1, 3] = value
    report = compare(sides["reference"], sides["result"], ENGINE)
    assert not report.passed
    assert report.where == (1, 3) and report.max_abs is None and report.max_rel is None
    assert report.reason is not None and "not finite" in report.reason
    assert ParityReport.parse(report.model_dump_json(), "report") == report


def test_constant_reference_needs_equality() -> None:
    reference = np.zeros((2, 3), np.float32)
    assert compare(reference, reference.copy(), ENGINE).passed
    report = compare(reference, reference + np.float32(1e-6), ENGINE)
    assert not report.passed and report.max_rel is None


@pytest.mark.parametrize(
    ("reference", "got"),
    [
        (logits(4), logits(3)),
        (logits(classes=6), logits(classes=5)),
        (logits(), logits().astype(np.float64)),
        (logits().astype(np.float64), logits().astype(np.float64)),
        (logits()[0], logits()[0]),
        (logits()[:0], logits()[:0]),
    ],
)
def test_what_cannot_be_compared_is_an_error_not_a_pass(reference: Any, got: Any) -> None:
    with pytest.raises(ParityError):
        compare(reference, got, ENGINE)


def test_require_raises_with_the_numbers() -> None:
    got = logits()
    got[3, 1] += 1
    with pytest.raises(ParityError, match=r"x\.onnx.*f32-engine.*0\.002.*image 3, class 1") as caught:
        require(compare(logits(), got, ENGINE), "x.onnx")
    assert caught.value.exit_code == ExitCode.GATE_FAILED


@given(scale=st.floats(1e-6, 1e-1), seed=st.integers(0, 99))
def test_verdict_is_the_three_limits(scale: float, seed: int) -> None:
    got = logits() + np.random.default_rng(seed).uniform(-scale, scale, (4, 6)).astype(np.float32)
    largest = np.abs(got.astype(np.float64) - logits()).max()
    within = largest <= ENGINE.max_abs and largest <= ENGINE.span_fraction * np.ptp(logits())
    assert compare(logits(), got, ENGINE).passed == within  # noise of 0.1 can't flip a lead of 1


def test_table_is_keyed_by_name_read_only_and_strict_about_the_first_class() -> None:
    assert all(name == tolerance.name for name, tolerance in TOLERANCES.items())
    exact = [tolerance for name, tolerance in TOLERANCES.items() if name != "reduced-engine"]
    assert len(exact) == len(TOLERANCES) - 1 and all(tolerance.top1_agreement == 100.0 for tolerance in exact)
    assert TOLERANCES["f32-reassoc"].max_abs < ENGINE.max_abs
    with pytest.raises(TypeError):
        TOLERANCES["mine"] = Tolerance("mine", 1, 1, 0)  # type: ignore[index]


@pytest.mark.parametrize(("wrong", "passed"), [(0, True), (1, True), (2, False)])
def test_reduced_precision_is_held_to_99_percent_of_the_first_classes_and_to_finite_logits(
    wrong: int, passed: bool
) -> None:
    reference = np.random.default_rng(3).standard_normal((100, 7)).astype(np.float32)
    got = reference * np.float32(1.5)  # far off, but in the same order
    got[:wrong] *= -1
    report = compare(reference, got, TOLERANCES["reduced-engine"])
    assert (report.passed, report.top1_agreement) == (passed, 100 - wrong)
    assert report.max_abs is not None and report.max_abs > 1
    got[50, 3] = np.nan
    assert not compare(reference, got, TOLERANCES["reduced-engine"]).passed


@pytest.mark.parametrize(("gap", "ties"), [(0.04, 2), (0.06, 0)])
def test_reduced_precision_may_choose_between_classes_that_the_reference_has_tied(gap: float, ties: int) -> None:
    reference = np.zeros((32, 5), np.float32)
    reference[:, 0], reference[:, 4] = 5, -5  # a span of 10, of which half a percent is a tie
    reference[:3, 1] = 5 - gap
    got = reference.copy()
    got[:2, 1] += 0.1
    report = compare(reference, got, TOLERANCES["reduced-engine"])
    assert (report.passed, report.ties, report.top1_agreement) == (ties == 2, ties, 100 * 30 / 32)
    assert not compare(reference, got, ENGINE).passed
    got[9, 2] = 7  # far behind in the reference
    report = compare(reference, got, TOLERANCES["reduced-engine"])
    assert not report.passed and report.reason is not None
    or_tied = " or tied" if ties else ""
    assert report.reason == f"first class equal{or_tied} for {100 * (29 + ties) / 32:.4g} % of the images < 99 %"


def test_a_report_from_before_ties_were_told_has_none() -> None:
    old = compare(logits(), logits(), ENGINE).model_dump(exclude={"ties"})
    assert ParityReport(**old).ties == 0


def reference_set() -> ReferenceSet:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    return ReferenceSet(pixels, logits(), "4 images of calibration folder digits")


def test_reference_set_comes_back_as_saved_and_saves_the_same_bytes(tmp_path: Path) -> None:
    reference_set().save(tmp_path / "a.npz")
    reference_set().save(tmp_path / "b.npz")
    loaded = ReferenceSet.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded.pixels, reference_set().pixels)
    np.testing.assert_array_equal(loaded.logits, reference_set().logits)
    assert loaded.source == reference_set().source
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_flipped_bit_anywhere_in_a_reference_set_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Zip files have places that nobody reads, and a checksum that is read only where the reader gets to."""
    path = tmp_path / "x.reference.npz"
    good = ReferenceSet(reference_set().pixels, reference_set().logits, "synthetic", "sha256:ab")
    good.save(path)
    raw, refused = path.read_bytes(), 0
    for bit in range(0, 8 * len(raw), 29):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            loaded = ReferenceSet.load(path)
        except CheckpointError as err:
            assert str(path) in str(err)
            refused += 1
            continue
        np.testing.assert_array_equal(loaded.pixels, good.pixels, strict=True)
        np.testing.assert_array_equal(loaded.logits, good.logits, strict=True)
        assert (loaded.source, loaded.model_digest) == (good.source, good.model_digest)
    assert refused > 0.7 * 8 * len(raw) / 29


@pytest.mark.parametrize("key", ["pixels", "logits", "source", "model_digest", "content_digest"])
def test_an_array_that_was_exchanged_is_refused_unless_that_is_asked_for(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.npz"
    reference_set().save(path)
    arrays = dict(np.load(path))
    arrays[key] = arrays[key][::-1].copy() if arrays[key].ndim else np.array("another")
    np.savez(path, **arrays)
    with pytest.raises(CheckpointError, match=r"x\.npz was damaged or altered.*--no-verify"):
        ReferenceSet.load(path)
    assert len(ReferenceSet.load(path, verify=False).logits) == 4


def test_a_set_of_before_belongs_to_any_model_and_a_newer_one_to_its_own(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(npz())
    old = ReferenceSet.load(tmp_path / "x.npz")
    assert old.model_digest is None
    old.require_model(Path("x.onnx"), "sha256:ab")
    new = ReferenceSet(old.pixels, old.logits, old.source, "sha256:ab")
    new.require_model(Path("x.onnx"), "sha256:ab")
    with pytest.raises(CheckpointError, match=r"x\.onnx is not the file .*expected sha256:ab; got sha256:cd.*--no-ver"):
        new.require_model(Path("x.onnx"), "sha256:cd")


def test_reference_lies_beside_its_model() -> None:
    assert reference_path(Path("out/eam.onnx")) == Path("out/eam.reference.npz")
    assert reference_path(Path("out/v1.2.onnx")) == Path("out/v1.2.reference.npz")


@pytest.mark.parametrize(
    ("pixels", "values", "word"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 5), np.float32), "pixels"),
        (np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 5), np.float32), "pixels"),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((0, 5), np.float32), "pixels"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 5), np.float64), "logits"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((3, 5), np.float32), "logits"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 5), np.nan, np.float32), "logits"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_when_made_and_when_loaded(
    pixels: Any, values: Any, word: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=word):
        ReferenceSet(pixels, values, "synthetic")
    path = tmp_path / "x.npz"
    np.savez(path, format=np.int64(1), pixels=pixels, logits=values, source="synthetic")
    with pytest.raises(CheckpointError, match=rf"x\.npz.*{word}"):
        ReferenceSet.load(path)


def npz(**changes: Any) -> bytes:
    """A good reference file with some arrays replaced, or left out where None."""
    good: dict[str, Any] = {"format": np.int64(1), "source": "synthetic"}
    good |= {"pixels": reference_set().pixels, "logits": reference_set().logits}
    file = io.BytesIO()
    np.savez_compressed(file, **{key: value for key, value in (good | changes).items() if value is not None})
    return file.getvalue()


def single_array() -> bytes:
    file = io.BytesIO()
    np.save(file, logits())
    return file.getvalue()


def foreign_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return file.getvalue()


def damaged_in_the_middle() -> bytes:
    data = bytearray(npz())
    data[200:220] = bytes(20)
    return bytes(data)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a zip",
        npz()[:300],
        damaged_in_the_middle(),
        foreign_zip(),
        single_array(),
        npz(logits=None),
        npz(extra=np.zeros(1)),
        npz(format=np.int64(2)),
        npz(format=np.int64(2), model_digest="", content_digest="sha256:00"),
        npz(format=np.int64(1), model_digest="", content_digest="sha256:00"),
        npz(model_digest=""),
        npz(format=np.float64(1)),
        npz(source=np.array([0x7FFFFFFF], np.uint32).view("U1")[0:1].reshape(())),
        npz(format=np.array([1, 1])),
        npz(source=np.array(["a", "b"])),
        npz(source=np.array({"a": 1}, dtype=object)),
    ],
    ids=range(17),
)
def test_damaged_or_foreign_files_are_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.reference.npz"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.reference\.npz"):
        ReferenceSet.load(path)


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if kind not in ("npz", "empty zip")])
def test_file_of_another_kind_is_named(kind: str, tmp_path: Path) -> None:
    path, words = write_foreign(tmp_path, kind, "x.reference.npz")
    with pytest.raises(CheckpointError) as caught:
        ReferenceSet.load(path)
    if kind == "npz of objects":
        words = "an array of Python objects"
    assert_plain(
        str(caught.value), "x.reference.npz is damaged or no reference set; got ", words, "Export the model again"
    )


def test_arrays_of_objects_are_not_unpickled_and_nobody_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(npz(source=np.array({"a": 1}, dtype=object)))
    with pytest.raises(CheckpointError) as caught:
        ReferenceSet.load(tmp_path / "x.npz")
    assert_plain(str(caught.value), "an array of Python objects", "never read here", "Export the model again")


def test_good_bytes_load(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(npz())
    assert len(ReferenceSet.load(tmp_path / "x.npz").pixels) == 4


def test_missing_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.npz"):
        ReferenceSet.load(tmp_path / "absent.npz")


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    reference_set().save(path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(ConfigError, match="No space left"):
        reference_set().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
