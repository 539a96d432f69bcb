from __future__ import annotations

from pathlib import Path

import pytest
from fake_jetson import write_files

from eamdeploy.devices.jetpack import find_jetpack, find_l4t


@pytest.mark.parametrize(
    ("release", "l4t", "version", "tensorrt", "python"),
    [
        ("# R32 (release), REVISION: 7.1, GCID: 3, BOARD: t210ref", "32.7.1", "4.6", "8.2", "3.6"),
        ("# R35 (release), REVISION: 4.1, GCID: 3, BOARD: t186ref", "35.4.1", "5.1", "8.5.2", "3.8"),
        ("# R36 (release), REVISION: 3.0, GCID: 3", "36.3.0", "6.0", "8.6.2", "3.10"),
        ("# R36 (release), REVISION: 4.0, GCID: 3", "36.4.0", "6.1", "10.3", "3.10"),
        ("# R36 (release), REVISION: 4.3, GCID: 3", "36.4.3", "6.2", "10.3", "3.10"),
        ("# R36 (release), REVISION: 4.4, GCID: 3", "36.4.4", "6.2.1", "10.3", "3.10"),
        ("# R36 (release), REVISION: 4.7, GCID: 3", "36.4.7", "6.2.1", "10.3", "3.10"),
        ("# R36 (release), REVISION: 5.0, GCID: 3", "36.5.0", "6.2.2", "10.3", "3.10"),
        ("# R36 (release), REVISION: 4.30, GCID: 3", "36.4.30", "6.1/6.2", "10.3", "3.10"),
        ("# R38 (release), REVISION: 2.0, GCID: 3", "38.2.0", "7.0", "10.13", "3.12"),
        ("# R38 (release), REVISION: 4.0, GCID: 3", "38.4.0", "7.1", "10.13", "3.12"),
        ("# R39 (release), REVISION: 2.0, GCID: 3", "39.2.0", "7.2", "10.16", "3.12"),
    ],
)
def test_jetpack_is_told_by_its_release(
    tmp_path: Path, release: str, l4t: str, version: str, tensorrt: str, python: str
) -> None:
    write_files(tmp_path, {"etc/nv_tegra_release": release})
    assert find_l4t(tmp_path) == l4t
    found = find_jetpack(tmp_path)
    assert found is not None
    assert (found.version, found.name) == (version, f"JetPack {version}")
    assert (found.tensorrt, found.python) == (tensorrt, python)


@pytest.mark.parametrize(
    ("content", "l4t"),
    [("# R99 (release), REVISION: 1.0", "99.1.0"), ("# R36 (release), REVISION: 2.0", "36.2.0"), ("something", None)],
)
def test_unknown_release_is_no_jetpack(tmp_path: Path, content: str, l4t: str | None) -> None:
    write_files(tmp_path, {"etc/nv_tegra_release": content})
    assert (find_l4t(tmp_path), find_jetpack(tmp_path)) == (l4t, None)


def test_other_machine_has_none(tmp_path: Path) -> None:
    assert (find_l4t(tmp_path), find_jetpack(tmp_path)) == (None, None)
