from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import draw_pictures

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.errors import ConfigError
from eamdeploy.images.source import ImageSource, read_class_names

HOW = Preprocessing(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))


class Notes:
    """An observer that keeps notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def progress(self, what: str, done: int, total: int) -> None:
        raise AssertionError("nobody asked for progress")

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw_pictures(tmp_path / "some", 7)
    return tmp_path / "some"


def names(source: ImageSource) -> list[str]:
    return [file.stem for file in source.open().files]


def test_split_and_limit_choose_the_files(folder: Path) -> None:
    assert names(ImageSource(folder)) == [f"{i:03}" for i in range(7)]
    assert names(ImageSource(folder, "even")) == ["000", "002", "004", "006"]
    assert names(ImageSource(folder, "odd")) == ["001", "003", "005"]
    assert names(ImageSource(folder, "even", 2)) == ["000", "004"]


def test_labels_are_read_only_where_they_are_asked_for(folder: Path) -> None:
    rows = "\n".join(f"{i:03}.png,{'cat' if i % 2 else 'dog'}" for i in range(7))
    (folder / "labels.csv").write_text(f"file,label\n{rows}\n")
    source = ImageSource(folder, limit=3)
    assert source.open().labels is None
    assert source.open_labelled(2, ["dog", "cat"]).labels == (0, 0, 0)
    with pytest.raises(ConfigError, match="cannot tell the classes"):
        source.open_labelled(2, None)


def test_bad_file_is_an_error_or_noted_and_left_out(folder: Path) -> None:
    (folder / "003.png").write_bytes(b"no picture")
    strict, lenient = ImageSource(folder), ImageSource(folder, skip_bad=True)
    notes = Notes()
    with pytest.raises(ConfigError, match=r"003\.png"):
        list(strict.batches(strict.open(), HOW, 2, notes))
    batches = list(lenient.batches(lenient.open(), HOW, 4, notes))
    assert [len(batch.files) for batch in batches] == [4, 2]
    assert np.concatenate([batch.pixels for batch in batches]).shape == (6, 8, 8, 3)
    assert notes.texts == ["skipped 003.png: not an image that Pillow can read"]


def test_files_that_are_not_read_are_noted_when_the_folder_is_opened(folder: Path) -> None:
    notes = Notes()
    ImageSource(folder).open(notes)
    assert notes.texts == []
    for name in ("a.tif", "b.TIF"):
        (folder / name).write_bytes(b"")
    ImageSource(folder, "odd", 1).open(notes)
    ImageSource(folder).open_labelled(3, None, notes)
    assert notes.texts == [f"2 files of {folder} were not read because of their ending: .tif 2"] * 2


def test_pictures_of_one_colour_are_counted(folder: Path) -> None:
    notes = Notes()
    source = ImageSource(folder)
    list(source.batches(source.open(), HOW, 2, notes))
    assert notes.texts == []
    for name, colour in (("001", "black"), ("004", "#123456")):
        Image.new("RGB", (20, 20), colour).save(folder / f"{name}.png")
    list(source.batches(source.open(), HOW, 2, notes))
    assert notes.texts == ["2 of 7 images of some are of one colour throughout"]


def test_class_names_given_go_before_those_of_the_model_and_must_be_as_many(folder: Path) -> None:
    rows = "\n".join(f"{i:03}.png,{'cat' if i % 2 else 'dog'}" for i in range(7))
    (folder / "labels.csv").write_text(f"file,label\n{rows}\n")
    given = ImageSource(folder, class_names=["cat", "dog"])
    for num_classes in (2, None):
        assert given.open_labelled(num_classes, ["dog", "cat"]).labels == (1, 0, 1, 0, 1, 0, 1)
    with pytest.raises(ConfigError, match=r"class names given are not the model's; expected 3 names; got 2"):
        given.open_labelled(3, None)


@pytest.mark.parametrize(("order", "labels"), [("natural", (0, 1, 2)), ("letters", (0, 2, 1)), (None, None)])
def test_the_order_of_classes_reaches_the_labels(tmp_path: Path, order: Any, labels: tuple[int, ...] | None) -> None:
    for name in ("1", "2", "10"):
        draw_pictures(tmp_path / name, 1)
    source = ImageSource(tmp_path, class_order=order)
    assert source.open().labels is None
    if labels is None:
        with pytest.raises(ConfigError, match="can be read in several ways"):
            source.open_labelled(3, None)
    else:
        found = source.open_labelled(3, None)
        named = {file.parent.name: label for file, label in zip(found.files, found.labels or (), strict=True)}
        assert named == dict(zip(("1", "2", "10"), labels, strict=True))


def test_turning_by_exif_reaches_the_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    rows = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(rows).save(tmp_path / "a.png", exif=exif)
    for turned, wanted in ((False, rows), (True, rows[::-1, ::-1])):
        source = ImageSource(tmp_path, exif_transpose=turned)
        (batch,) = source.batches(source.open(), HOW.model_copy(update={"crop_pct": 1.0}), 1, Notes())
        np.testing.assert_array_equal(batch.pixels[0, :, :, 0], wanted)


@pytest.mark.parametrize(
    ("name", "text", "classes"),
    [("c.json", '["cat", "dög"]', ["cat", "dög"]), ("c.txt", "cat\ndög\n", ["cat", "dög"]), ("c.txt", "", [])],
)
def test_class_names_come_from_a_list_or_from_lines(tmp_path: Path, name: str, text: str, classes: list[str]) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_class_names(tmp_path / name) == classes


def test_no_file_means_no_class_names() -> None:
    assert read_class_names(None) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.json", b'{"0": "cat"}', "expected a list of texts"),
        ("c.json", b"[1, 2]", "expected a list of texts"),
        ("c.json", b"[", r"Expecting value: line 1 column 2.*expected a JSON list of texts, or a text file"),
        ("c.json", b"<!DOCTYPE html>", r"c\.json: it is a web page \(HTML\); expected a JSON list"),
        ("c.txt", b"\x89PNG\r\n\x1a\n\xff", r"c\.txt: it is an image \(PNG\); expected a JSON list"),
        ("c.txt", b"caf\xe9", r"c\.txt: it is no text in UTF-8; expected a JSON list"),
        ("c.json", b"[" * 100_000, r"cannot read class names from \S*c\.json"),
        ("c.json", b"[", r"cannot read class names from \S*c\.json"),
        ("c.txt", b"\xff\xfe", r"cannot read class names from \S*c\.txt"),
        ("c.txt", None, r"cannot read class names from \S*c\.txt: .*No such file"),
    ],
)
def test_other_files_of_class_names_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_class_names(tmp_path / name)
