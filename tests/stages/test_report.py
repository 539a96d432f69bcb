"""The stage and its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import RunCli, only_error
from report_records import analysis, card, engine, evaluation, export, freezing, profile, write_all

from eamdeploy import report as stage
from eamdeploy.errors import ConfigError, MissingDependency
from eamdeploy.stages.report import Report, report


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    measured = profile([engine("x.ort.onnx", card(freezing()), 13.7, 1.071, parity=None)], engine("b", card(), 14.7))
    return write_all(tmp_path / "in", {"profile.json": measured, "evaluation.json": evaluation("x.ort.onnx", "b")})


def test_the_public_function_is_the_stage() -> None:
    assert stage is report


def test_the_command_writes_both_forms_and_tells_the_caveats(
    run_cli: RunCli, files: list[Path], tmp_path: Path
) -> None:
    page, markdown = tmp_path / "report.html", tmp_path / "report.md"
    outcome = run_cli("report", *files, "-o", page, "--markdown", markdown, "--title", "My board")
    assert (outcome.code, outcome.err) == (0, "")
    assert str(page) in outcome.out and str(markdown) in outcome.out
    assert "x.ort.onnx: its parity was not checked" in outcome.out
    assert "<h1>My board</h1>" in page.read_text() and markdown.read_text().startswith("# My board\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "report.html", "report.md"]


def test_json_says_what_was_written(run_cli: RunCli, files: list[Path], tmp_path: Path) -> None:
    outcome = run_cli("report", *files, "-o", tmp_path / "report.html", "--json")
    written = Report.parse(outcome.out, "stdout")
    assert (written.page, written.markdown) == (str(tmp_path / "report.html"), None)
    assert written.models == [written.title] == ["deit_made_up_patch16_224"]
    assert written.files == [*map(str, files)] and written.caveats == ["x.ort.onnx: its parity was not checked"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.json", "{", "bad.json is no JSON"),
        ("bad.json", json.dumps({"a": 1}), "bad.json is nothing that a report can show"),
        ("bad.onnx", "", "bad.onnx is nothing that a report can show"),
    ],
)
def test_a_bad_file_is_named_and_nothing_is_written(
    run_cli: RunCli, files: list[Path], tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / "in" / name).write_text(content)
    outcome = run_cli("report", *files, tmp_path / "in" / name, "-o", tmp_path / "report.html")
    assert message in only_error(outcome, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_outputs_replace_neither_inputs_nor_each_other(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would replace the input"):
        report(files, files[0])
    with pytest.raises(ConfigError, match="would replace the input"):
        report(files, tmp_path / "x.html", markdown=files[1])
    with pytest.raises(ConfigError, match="the Markdown would replace the page"):
        report(files, tmp_path / "x.html", markdown=tmp_path / "in" / ".." / "x.html")
    with pytest.raises(ConfigError, match="expected an existing folder"):
        report(files, tmp_path / "missing" / "x.html")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_missing_jinja2_is_named(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependency, match=r"report needs the package jinja2.*eamdeploy\[host\]"):
        report(files, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_it_needs_no_torch(files: list[Path], eam_checkpoint: Path, tmp_path: Path) -> None:
    more = write_all(tmp_path / "more", {"analysis.json": analysis(), "export.json": export()})
    program = (
        "import sys; from eamdeploy.cli import app as cli; sys.argv[0] = 'eamdeploy'\n"
        "try:\n    cli.main()\nexcept SystemExit as done:\n"
        "    assert not {'torch', 'timm', 'onnx', 'matplotlib'} & sys.modules.keys(), 'too much was imported'\n"
        "    raise\n"
    )
    command = ["report", *files, *more, eam_checkpoint, "-o", tmp_path / "x.html"]
    subprocess.run([sys.executable, "-c", program, *map(str, command)], check=True, capture_output=True)
    assert (tmp_path / "x.html").stat().st_size > 10_000
