from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_models import draw_pictures

from eamdeploy.artifact import Preprocessing
from eamdeploy.errors import ConfigError
from eamdeploy.source import ImageSource, read_class_names

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
