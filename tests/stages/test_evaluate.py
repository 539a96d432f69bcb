from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from notebook import Notebook
from numpy.typing import NDArray
from tiny_models import KWARGS, NAME

from eamdeploy import build_ort, evaluate, export, freeze
from eamdeploy.artifacts.card import CARD_KEY, ModelCard
from eamdeploy.artifacts.files import digest_file
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.errors import CheckpointError, ConfigError, EngineError, ParityError
from eamdeploy.host.calibrate import predict
from eamdeploy.host.model import ModelSpec
from eamdeploy.host.reference import load_reference
from eamdeploy.images.preprocess import normalize
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT
from eamdeploy.parity.accuracy import mean_kl
from eamdeploy.records.evaluation import EvaluatedImages, EvaluationReport

WRONG = 6


@pytest.fixture(scope="module")
def logits(eam_checkpoint: Path, pictures: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of the frozen and of the live model, for all pictures in one batch."""
    loaded = checkpoints.load(eam_checkpoint)
    source = ImageSource(pictures)
    (batch,) = source.batches(source.open(), loaded.header.preprocessing, 24, SILENT)
    images = normalize(batch.pixels, loaded.header.preprocessing)
    frozen, live = (predict(load_reference(loaded, frozen=f, where="x").model, images) for f in (True, False))
    return frozen, live


@pytest.fixture(scope="module")
def labels(logits: tuple[NDArray[np.float32], NDArray[np.float32]]) -> NDArray[np.int64]:
    """What the live model says, but for the first `WRONG` pictures."""
    labels: NDArray[np.int64] = logits[1].argmax(axis=1)
    labels[:WRONG] = logits[1][:WRONG].argmin(axis=1)
    return labels


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, pictures: Path, labels: NDArray[np.int64]) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "labelled"
    shutil.copytree(pictures, folder)
    rows = [f"{index:03}.png,{label}" for index, label in enumerate(labels)]
    (folder / "labels.csv").write_text("\n".join(["file,label", *rows]))
    return folder


def edit_card(source: Path, target: Path, **changes: object) -> Path:
    """A copy of an ONNX model with another card, or without one if no change is given."""
    model = onnx.load(source)
    (entry,) = [entry for entry in model.metadata_props if entry.key == CARD_KEY]
    if changes:
        entry.value = ModelCard.parse(entry.value, "card").model_copy(update=changes).model_dump_json()
    else:
        del model.metadata_props[:]
    onnx.save(model, target)
    return target


def test_figures_of_a_checkpoint_are_those_computed_by_hand(
    eam_checkpoint: Path,
    labelled: Path,
    labels: NDArray[np.int64],
    logits: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> None:
    frozen, live = logits
    report = evaluate(eam_checkpoint, ImageSource(labelled))
    assert (report.n_images, report.n_skipped, report.num_classes) == (24, 0, 10)
    assert report.top1 == pytest.approx(100 * np.mean(frozen.argmax(1) == labels))
    top5 = [label in order[-5:] for label, order in zip(labels, frozen.argsort(1), strict=True)]
    assert report.top5 == pytest.approx(100 * np.mean(top5))
    assert report.reference_top1 == pytest.approx(100 * (24 - WRONG) / 24)
    assert report.agreement == pytest.approx(100 * np.mean(frozen.argmax(1) == live.argmax(1)))
    assert report.kl == pytest.approx(mean_kl(live, frozen), rel=1e-4)
    assert report.max_abs_logit_diff == pytest.approx(np.abs(live - frozen).max(), rel=1e-4)
    assert report.agreement is not None
    assert 0 < report.agreement < 100, "the models are too alike for these figures to mean something"
    assert (report.model, report.weights) == (str(eam_checkpoint), "tiny.safetensors")
    assert report.model_digest == report.reference_digest == digest_file(eam_checkpoint)
    assert report.reference == f"{eam_checkpoint} with all attention live"
    assert report.reference_is_live and report.images == "labelled (all)"
    assert EvaluationReport.parse(report.model_dump_json(), "report") == report


def test_engine_against_its_twin_gives_the_checkpoints_figures(
    eam_checkpoint: Path, eam_engine: Path, labelled: Path
) -> None:
    base = eam_engine.with_name("base.ort.onnx")
    engine = evaluate(eam_engine, ImageSource(labelled), reference=base, threads=1)
    checkpoint = evaluate(eam_checkpoint, ImageSource(labelled))
    for figure in ("top1", "top5", "reference_top1", "reference_top5", "agreement", "n_images"):
        assert getattr(engine, figure) == getattr(checkpoint, figure)
    assert engine.kl == pytest.approx(checkpoint.kl, rel=1e-3)
    assert (engine.reference, engine.reference_digest) == (str(base), digest_file(base))
    assert engine.reference_is_live is False


def test_checkpoint_and_engine_of_it_agree(eam_checkpoint: Path, eam_engine: Path, pictures: Path) -> None:
    for model, reference in ((eam_checkpoint, eam_engine), (eam_engine, eam_checkpoint)):
        report = evaluate(model, ImageSource(pictures), reference=reference, threads=1)
        assert report.agreement == 100.0
        assert report.kl is not None and report.kl < 1e-8
        assert report.top1 is None


def test_fixed_batch_on_either_side_changes_nothing(
    eam_checkpoint: Path, eam_engine: Path, labelled: Path, tmp_path: Path
) -> None:
    export(eam_checkpoint, tmp_path / "five.onnx", batch=5, exporter="torchscript")
    build_ort(tmp_path / "five.onnx", tmp_path / "five.ort.onnx", threads=1)
    fixed, base = tmp_path / "five.ort.onnx", eam_engine.with_name("base.ort.onnx")
    for model, reference, dynamic_model, dynamic_reference in (
        (fixed, base, eam_engine, base),
        (base, fixed, base, eam_engine),
    ):
        got = evaluate(model, ImageSource(labelled), reference=reference, threads=1)
        wanted = evaluate(dynamic_model, ImageSource(labelled), reference=dynamic_reference, threads=1)
        assert (got.n_images, got.top1, got.agreement) == (24, wanted.top1, wanted.agreement)
        assert got.kl == pytest.approx(wanted.kl, rel=1e-3)


def test_engine_alone_has_accuracy_only_and_on_unlabelled_pictures_nothing(
    eam_engine: Path, labelled: Path, pictures: Path
) -> None:
    alone = evaluate(eam_engine, ImageSource(labelled), threads=1)
    assert alone.top1 is not None and (alone.agreement, alone.kl, alone.reference) == (None, None, None)
    assert alone.reference_is_live is False
    nothing = evaluate(eam_engine, ImageSource(pictures), threads=1)
    assert nothing.top1 is nothing.top5 is nothing.agreement is None
    assert nothing.n_images == 24


def test_split_and_limit_are_followed_and_told(eam_engine: Path, labelled: Path, labels: NDArray[np.int64]) -> None:
    base = eam_engine.with_name("base.ort.onnx")
    report = evaluate(base, ImageSource(labelled, "odd", 4), threads=1)
    assert (report.n_images, report.images) == (4, "labelled (odd, at most 4)")
    used = EvaluatedImages(folder="labelled", split="odd", limit=4, exif_transpose=False)
    assert report.image_source == used
    assert report.top1 == 100 * (4 - sum(index < WRONG for index in (1, 7, 13, 19))) / 4


def relabelled(labelled: Path, target: Path, labels: NDArray[np.int64]) -> Path:
    shutil.copytree(labelled, target)
    rows = [f"{index:03}.png,{label}" for index, label in enumerate(labels)]
    (target / "labels.csv").write_text("\n".join(["file,label", *rows]))
    return target


def test_labels_that_do_not_belong_to_the_model_are_told(
    eam_checkpoint: Path, eam_engine: Path, labelled: Path, labels: NDArray[np.int64], tmp_path: Path
) -> None:
    """Of another order of classes than the model's; and never where the labels are right, missing or too few."""
    wrong = relabelled(labelled, tmp_path / "wrong", (labels + 1) % 10)
    base = eam_engine.with_name("base.ort.onnx")
    told = evaluate(eam_checkpoint, ImageSource(wrong))
    assert told.labels_in_doubt and told.reference_top1 is not None and told.top1 is not None
    assert told.doubt == (
        f"the reference's top-1, {told.reference_top1:.1f} % of 24 images, is no better than guessing among "
        "10 classes: the labels probably do not belong to the model"
    )
    assert EvaluationReport.parse(told.model_dump_json(), "report") == told
    alone = evaluate(base, ImageSource(wrong), threads=1)
    assert alone.doubt is not None and alone.doubt.startswith(f"the model's top-1, {alone.top1:.1f} % of 24 images")
    for sound in (
        evaluate(eam_checkpoint, ImageSource(labelled)),
        evaluate(base, ImageSource(labelled), threads=1),
        evaluate(base, ImageSource(wrong, limit=2), threads=1),
    ):
        assert not sound.labels_in_doubt and sound.doubt is None


def test_a_bad_model_beside_a_good_reference_is_no_doubt_about_the_labels(
    eam_engine: Path, labelled: Path, labels: NDArray[np.int64], tmp_path: Path
) -> None:
    base = eam_engine.with_name("base.ort.onnx")
    rarest = np.bincount(labels, minlength=10).argmin()
    model = onnx.load(base)
    bias = next(item for item in model.graph.initializer if list(item.dims) == [10])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.float32(1e4) * (np.arange(10) == rarest), bias.name))
    onnx.save(model, tmp_path / "bad.onnx")
    report = evaluate(tmp_path / "bad.onnx", ImageSource(labelled), reference=base, threads=1)
    assert report.top1 is not None and report.top1 <= 10
    assert not report.labels_in_doubt


@pytest.mark.parametrize("which", ["model", "reference"])
def test_random_weights_do_not_cast_doubt_on_labels(
    eam_engine: Path, labelled: Path, labels: NDArray[np.int64], tmp_path: Path, which: str
) -> None:
    base = eam_engine.with_name("base.ort.onnx")
    made_up = edit_card(base, tmp_path / "random.onnx", weights="random")
    wrong = relabelled(labelled, tmp_path / "wrong", (labels + 1) % 10)
    model, reference = (made_up, base) if which == "model" else (base, made_up)
    assert not evaluate(model, ImageSource(wrong), reference=reference, threads=1).labels_in_doubt


def test_reports_of_older_releases_are_read(eam_engine: Path, pictures: Path) -> None:
    report = evaluate(eam_engine, ImageSource(pictures, limit=1), threads=1)
    old = report.model_dump(exclude={"labels_in_doubt", "class_order"})
    assert EvaluationReport.model_validate(old) == report


def in_folders(pictures: Path, target: Path, labels: NDArray[np.int64], names: list[str]) -> Path:
    """The pictures in a folder for each class; a class that has none gets a copy of one, which is wrong."""
    for label, name in enumerate(names):
        (target / name).mkdir(parents=True)
        if label not in labels:
            shutil.copy(pictures / "000.png", target / name / "extra.png")
    for index, label in enumerate(labels):
        shutil.copy(pictures / f"{index:03}.png", target / names[label])
    return target


@pytest.mark.parametrize(
    ("names", "order", "right"),
    [
        ([f"class{n}" for n in range(1, 11)], "natural", True),
        ([f"class{n}" for n in range(1, 11)], "letters", False),
        (sorted(f"class{n}" for n in range(1, 11)), "letters", True),
        (sorted(map(str, range(10, 20))), "natural", True),
        (["0", "1", "10", "2", "3", "4", "5", "6", "7", "8"], "letters", True),
        (["train", "val", *"abcdefgh"], None, False),
    ],
)
def test_folders_in_the_models_order_have_the_accuracy_of_its_labels(
    eam_engine: Path,
    pictures: Path,
    labels: NDArray[np.int64],
    tmp_path: Path,
    names: list[str],
    order: Any,
    right: bool,
) -> None:
    folder = in_folders(pictures, tmp_path / "folders", labels, names)
    base = eam_engine.with_name("base.ort.onnx")
    report = evaluate(base, ImageSource(folder, class_order=order), threads=1)
    extra = sum(label not in labels for label in range(10))
    wanted = 100 * (24 - WRONG) / (24 + extra)
    assert report.top1 is not None and report.class_order == order
    assert (report.top1 == pytest.approx(wanted)) == right
    assert report.top1 <= wanted


def test_class_names_given_are_the_models(
    eam_engine: Path, pictures: Path, labels: NDArray[np.int64], tmp_path: Path
) -> None:
    names = [f"kind {n}" for n in (3, 11, 2, 9, 1, 5, 4, 8, 7, 6)]
    folder = in_folders(pictures, tmp_path / "folders", labels, names)
    base = edit_card(eam_engine.with_name("base.ort.onnx"), tmp_path / "x.onnx", class_names=[*"abcdefghij"])
    with pytest.raises(ConfigError, match="have no class's name; expected names such as a, b, c, …"):
        evaluate(base, ImageSource(folder), threads=1)
    report = evaluate(base, ImageSource(folder, class_names=names), threads=1)
    assert report.top1 == pytest.approx(100 * (24 - WRONG) / (24 + sum(n not in labels for n in range(10))))


def test_turning_by_exif_is_told_and_files_not_read_are_noted(eam_engine: Path, labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    shutil.copytree(labelled, folder)
    (folder / "x.heic").write_bytes(b"")
    notebook = Notebook()
    report = evaluate(eam_engine, ImageSource(folder, exif_transpose=True, limit=3), threads=1, observer=notebook)
    assert report.images == "some (all, at most 3, turned by EXIF)"
    assert report.image_source is not None and report.image_source.exif_transpose
    assert notebook.notes == [f"1 file of {folder} was not read because of its ending: .heic 1"]


def test_bad_picture_is_an_error_or_named_and_counted(eam_engine: Path, labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    shutil.copytree(labelled, folder)
    (folder / "010.png").write_bytes((folder / "010.png").read_bytes()[:70])
    with pytest.raises(ConfigError, match=r"cannot use image \S*some/010\.png.*--skip-bad"):
        evaluate(eam_engine, ImageSource(folder), threads=1)
    notebook = Notebook()
    report = evaluate(eam_engine, ImageSource(folder, skip_bad=True), threads=1, observer=notebook)
    assert (report.n_images, report.n_skipped, report.skipped) == (23, 1, ["010.png"])
    assert notebook.notes == ["skipped 010.png"]


def test_label_out_of_range_is_named(eam_engine: Path, labelled: Path, tmp_path: Path) -> None:
    shutil.copytree(labelled, tmp_path / "some")
    table = tmp_path / "some" / "labels.csv"
    table.write_text(table.read_text().replace("\n004.png,", "\n004.png,1"))
    with pytest.raises(ConfigError, match=r"label of \S*004\.png is out of range; expected 0 to 9.*; got 1\d"):
        evaluate(eam_engine, ImageSource(tmp_path / "some"), threads=1)


def test_models_of_other_preprocessing_are_not_compared(eam_engine: Path, pictures: Path, tmp_path: Path) -> None:
    model = onnx.load(eam_engine)
    card = ModelCard.parse(next(e.value for e in model.metadata_props if e.key == CARD_KEY), "card")
    other = card.preprocessing.model_copy(update={"mean": (0.4, 0.5, 0.5)})
    changed = edit_card(eam_engine, tmp_path / "changed.onnx", preprocessing=other)
    with pytest.raises(ConfigError, match="preprocess images differently"):
        evaluate(eam_engine, ImageSource(pictures), reference=changed, threads=1)


def test_models_of_other_classes_are_not_compared(eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.eam.safetensors"
    spec = ModelSpec(NAME, "random", {**KWARGS, "num_classes": 7})
    freeze(spec, ImageSource(pictures, limit=2), other, FreezeOptions(score="random"))
    with pytest.raises(ConfigError, match="different classes; expected 7; got 10"):
        evaluate(eam_checkpoint, ImageSource(pictures), reference=other)


def test_foreign_model_borrows_preprocessing_and_class_names_from_the_reference(
    eam_engine: Path, pictures: Path, labels: NDArray[np.int64], tmp_path: Path
) -> None:
    base = eam_engine.with_name("base.ort.onnx")
    foreign = edit_card(base, tmp_path / "foreign.onnx")
    with pytest.raises(ConfigError, match=r"foreign\.onnx carries no model card.*Give a --reference"):
        evaluate(foreign, ImageSource(pictures), threads=1)
    named = edit_card(base, tmp_path / "named.onnx", class_names=[f"class {index}" for index in range(10)])
    for index, label in enumerate(labels):
        folder = tmp_path / "folders" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures / f"{index:03}.png", folder)
    report = evaluate(foreign, ImageSource(tmp_path / "folders"), reference=named, threads=1)
    assert report.top1 == report.reference_top1 == 100 * (24 - WRONG) / 24
    assert (report.agreement, report.weights) == (100.0, None)


def test_logits_that_are_no_numbers_fail_the_gate(eam_engine: Path, pictures: Path, tmp_path: Path) -> None:
    model = onnx.load(eam_engine)
    bias = next(item for item in model.graph.initializer if list(item.dims) == [10])
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, np.float32), bias.name))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(ParityError, match=r"the model returned a logit that is no number for \S*000\.png"):
        evaluate(tmp_path / "nan.onnx", ImageSource(pictures), threads=1)


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("x.safetensors", None, ConfigError, r"cannot read \S*x\.safetensors: No such file"),
        ("x.safetensors", b"\x05\0\0\0\0\0\0\0{}", CheckpointError, r"x\.safetensors is damaged"),
        ("x.onnx", None, ConfigError, r"cannot read \S*x\.onnx; expected an engine file; got no such file"),
        ("x.onnx", b"\x05\0{}", EngineError, r"can't load \S*x\.onnx"),
        ("x.pth", b"", ConfigError, r"x\.pth is not an engine by its name; expected one of \.onnx"),
    ],
)
def test_files_that_cannot_be_evaluated_are_named(
    pictures: Path, tmp_path: Path, name: str, content: bytes | None, kind: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message):
        evaluate(tmp_path / name, ImageSource(pictures), threads=1)


def test_engine_that_is_not_the_manifests_is_refused(eam_engine: Path, pictures: Path, tmp_path: Path) -> None:
    shutil.copy(eam_engine.with_name("base.ort.onnx"), tmp_path / "x.onnx")
    shutil.copy(f"{eam_engine}.json", tmp_path / "x.onnx.json")
    with pytest.raises(EngineError, match=r"x\.onnx\.json describes another engine than \S*x\.onnx"):
        evaluate(tmp_path / "x.onnx", ImageSource(pictures))
