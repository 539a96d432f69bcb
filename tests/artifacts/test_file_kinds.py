from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_models import make_frozen_model
from foreign_files import FOREIGN, LFS, write_foreign, zip_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eamdeploy.artifacts.file_kinds import in_words, npz_in_words, recognize, text_in_words

TINY = nn.Linear(2, 2)


def saved(write: object) -> bytes:
    file = io.BytesIO()
    write(file)  # type: ignore[operator]
    return file.getvalue()


REAL: dict[str, bytes] = {
    "torch": saved(lambda file: torch.save(TINY.state_dict(), file)),
    "pickle": saved(lambda file: torch.save(TINY.state_dict(), file, _use_new_zipfile_serialization=False)),
    "torchscript": saved(lambda file: torch.jit.save(torch.jit.trace(TINY, torch.zeros(1, 2)), file)),
    "torch.export": saved(lambda file: torch.export.save(torch.export.export(TINY, (torch.zeros(1, 2),)), file)),
    "onnx": make_frozen_model().to_onnx().SerializeToString(),
    "npz": saved(lambda file: np.savez_compressed(file, a=np.ones(2))),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_every_kind_is_told_from_its_bytes_and_from_its_file(tmp_path: Path, kind: str) -> None:
    path, words = write_foreign(tmp_path, kind, "x.bin")
    for source in (path, path.read_bytes()):
        found = recognize(source)
        assert found is not None and found.words.startswith(words)


@pytest.mark.parametrize("key", REAL)
def test_what_libraries_really_write_is_told(tmp_path: Path, key: str) -> None:
    (tmp_path / "x").write_bytes(REAL[key])
    for source in (tmp_path / "x", REAL[key]):
        found = recognize(source)
        assert found is not None and found.key == key


def test_a_state_dict_is_no_script_whatever_its_file_is_called(tmp_path: Path) -> None:
    for name in ("code.pth", "constants.pkl", "archive_format"):
        torch.save({"code/x": torch.ones(1), "constants.pkl": torch.ones(1)}, tmp_path / name)
        found = recognize(tmp_path / name)
        assert found is not None and found.key == "torch"


@pytest.mark.parametrize("content", [b"\x08", b"\x80", b"\x81", b"\0", b"\xff\xfe", b"\x05\0{}", bytes(1000)])
def test_bytes_of_no_known_kind(content: bytes) -> None:
    assert recognize(content) is None


def test_what_can_not_be_read_is_of_no_kind(tmp_path: Path) -> None:
    assert recognize(tmp_path) is None and recognize(tmp_path / "absent") is None


@given(st.binary(max_size=64), st.sampled_from([b"", b"PK\x03\x04", b"PK\x05\x06", b"\x80\x02", b"\x08\x08", b"\x81"]))
def test_no_bytes_raise(data: bytes, begin: bytes) -> None:
    recognize(begin + data)


@given(st.sampled_from([zip_of("a.npy"), REAL["torch"], REAL["torchscript"]]), st.integers(0, 10**6))
def test_cut_archives_are_archives_that_were_cut(data: bytes, length: int) -> None:
    cut = data[: 4 + length % (len(data) - 26)]  # the last 22 bytes are the end's record
    found = recognize(cut)
    assert found is not None and found.key == "cut zip"


def test_words_of_a_wanted_or_unknown_kind_are_the_readers(tmp_path: Path) -> None:
    assert in_words(LFS, "onnx") == "a Git LFS pointer: a short text in place of the file itself"
    assert in_words(REAL["onnx"], "onnx") is None
    assert in_words(REAL["onnx"], "onnx", otherwise="a reason") == "a reason"
    assert in_words(b"\xff\xfe", otherwise=ValueError("a reason")) == "a reason"
    assert in_words(b"\xff\xfe", otherwise=EOFError()) == "EOFError"


@pytest.mark.parametrize("kind", ["npz of objects", "npy", "html", "git-lfs", "empty", "cut zip", "text", "pickle"])
def test_numpys_advice_to_unpickle_is_left_out(tmp_path: Path, kind: str) -> None:
    path, words = write_foreign(tmp_path, kind, "x.npz")
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError("no archive")
        dict(archive)
    except Exception as err:  # noqa: BLE001 - whatever numpy and zipfile raise
        said = npz_in_words(path, err)
    assert "allow_pickle" not in said
    assert said.startswith("an array of Python objects" if kind == "npz of objects" else words)


def test_texts_that_can_not_be_read_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    assert text_in_words(path, FileNotFoundError(2, "No such file or directory", "x.toml")) == os.strerror(2)
    path.write_bytes(LFS)
    assert text_in_words(path, ValueError("Invalid statement")).startswith("it is a Git LFS pointer")
    path.write_bytes(b"caf\xe9 = 1")
    error = UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid continuation byte")
    assert text_in_words(path, error) == "it is no text in UTF-8"
    path.write_bytes(b"[profile")
    assert text_in_words(path, ValueError("Expected ']' (at line 1, column 9)")) == "Expected ']' (at line 1, column 9)"
