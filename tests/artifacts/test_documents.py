from __future__ import annotations

from pathlib import Path

import pytest

from eamdeploy.artifacts.documents import read_document
from eamdeploy.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"engine_digest": 1}', "engine manifest"),
        ('{"engines": []}', "profile"),
        ('{"profiles": {}, "failures": {}}', "profiles of machines"),
        ('{"agreement": null}', "evaluation"),
        ('{"scores": {}, "frozen": {}}', "analysis"),
        ('{"frozen": {}, "baseline": null}', "export"),
        ('{"stages": {}}', "run"),
        ('{"capabilities": []}', "diagnosis"),
        ('{"frozen": {}}', None),
        ("{}", None),
    ],
)
def test_kinds_are_told_by_their_keys(tmp_path: Path, text: str, kind: str | None) -> None:
    (tmp_path / "x.json").write_text(text)
    assert read_document(tmp_path / "x.json")[0] == kind


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{", b"[" * 200_000])
def test_what_is_no_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.json is no JSON: "):
        read_document(tmp_path / "x.json")


def test_what_is_no_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"x\.json is none of our documents; expected a JSON object"):
        read_document(tmp_path / "x.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read \S*x\.json: No such file"):
        read_document(tmp_path / "x.json")
