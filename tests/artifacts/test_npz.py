"""Archives of arrays that are damaged in every way that numpy and zipfile answer with errors of their own."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eamdeploy.artifacts.npz import read_npz
from eamdeploy.errors import CheckpointError, ConfigError


def archive(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


GOOD = archive(a=np.arange(3), b=np.asarray("text"), c=np.array([True]))


def with_member(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr(name, content)
    return file.getvalue()


def npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


def in_directory(at: int, value: int) -> bytes:
    """A number of 2 bytes in the entry of the first member in the archive's directory is another."""
    data = bytearray(GOOD)
    place = data.index(b"PK\x01\x02") + at
    data[place : place + 2] = value.to_bytes(2, "little")
    return bytes(data)


def before_the_start() -> bytes:
    """The directory says that it is larger than the file."""
    data = bytearray(GOOD)
    place = data.rindex(b"PK\x05\x06")
    data[place + 16 : place + 20] = b"\xff\xff\xff\x7f"
    return bytes(data)


BAD: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"hello",
    "truncated": lambda: GOOD[:300],
    "one array": lambda: GOOD[GOOD.index(b"\x93NUMPY") :],
    "member that is no array": lambda: with_member("a.txt", b"hello"),
    "array of objects": lambda: archive(a=np.array([{}], dtype=object)),
    "dates": lambda: archive(a=np.array(["2026-01-01"], "M8[D]")),
    "records": lambda: archive(a=np.zeros(2, [("x", "f4")])),
    "raw bytes": lambda: archive(a=np.zeros(2, "V3")),
    "complex": lambda: archive(a=np.zeros(2, complex)),
    "encrypted": lambda: in_directory(8, 1),
    "unknown method": lambda: in_directory(10, 99),
    "unknown version": lambda: in_directory(6, 999),
    "place before the start": before_the_start,
    "header that is no literal": lambda: with_member("a.npy", npy("__import__('os')\n")),
    "header that ends early": lambda: with_member("a.npy", npy("{'descr': (\n")),
    "header with an endless indent": lambda: with_member("a.npy", npy("{" * 3000 + "\n")),
    "shape that is none": lambda: with_member("a.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': 7}\n")),
    "shape without end": lambda: with_member(
        "a.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999, 9999999)}\n")
    ),
    "negative shape": lambda: with_member("a.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}\n")),
    "type that is none": lambda: with_member("a.npy", npy("{'descr': [], 'fortran_order': 0, 'shape': (1,)}\n")),
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_damaged_or_foreign_archives_are_refused_by_name(make: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(make())
    with pytest.raises(CheckpointError, match=r"x\.npz is damaged or no file of maps; got .*\. Make it again\."):
        read_npz(path, "file of maps", "Make it again.")


def test_numbers_and_texts_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(GOOD)
    arrays = read_npz(tmp_path / "x.npz", "file of maps")
    assert arrays["a"].tolist() == [0, 1, 2] and str(arrays["b"]) == "text" and arrays["c"].tolist() == [True]


@pytest.mark.parametrize("name", ["missing.npz", ""], ids=["missing", "folder"])
def test_what_cannot_be_opened_is_a_config_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_npz(tmp_path / name, "file of maps")
