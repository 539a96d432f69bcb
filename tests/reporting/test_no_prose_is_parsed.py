"""Whatever a report or a later stage reads stands in a field: our own sentences may be reworded freely."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from report_records import card, device_build, digest, evaluation, manifest, write_all

import eamdeploy
from eamdeploy.artifacts.records import Record
from eamdeploy.engines.manifest import CalibratedProducts, Manifest
from eamdeploy.records.evaluation import EvaluatedImages, EvaluationReport
from eamdeploy.reporting.prose.command_line import Command
from eamdeploy.reporting.prose.reproduce import commands
from eamdeploy.reporting.records.sources import read_sources

ROOT = Path(eamdeploy.__file__).parent

# The rooms that read records.
ROOMS = ("convert", "parity", "pipeline", "records", "reporting", "stages")

# Modules of these rooms that have a regular expression, and the foreign text that it reads.
READ_FOREIGN_TEXT = {
    "reporting.write.markdown": "any text that is written into Markdown, whose special characters are escaped",
}

CHECKPOINT = "x.eam.safetensors"
CALIBRATED = CalibratedProducts(products=24, method="minmax", images=8, folder="photos")
WHAT_MADE_THE_FILE: dict[str, Record] = {
    "against-a-file.json": evaluation("x.plan", "b.plan"),
    "against-itself.json": evaluation("x.plan", "x.plan", reference_digest=digest("x.plan")),
    "live.json": evaluation(
        CHECKPOINT,
        f"{CHECKPOINT} with all attention live",
        used=EvaluatedImages(folder="a (b)", split="all", limit=None, exif_transpose=True),
        reference_digest=digest(CHECKPOINT),
        reference_is_live=True,
    ),
    "x.plan.json": manifest(
        "x.plan",
        card(),
        backend="trt",
        settings={"keep_fp32": "none"},
        device=device_build(
            int8=True,
            calibration=CALIBRATED,
            model_changes=["frozen maps as INT8", CALIBRATED.in_words],
        ),
    ),
}
PLAN = "eamdeploy build-trt MODEL.onnx -o x.plan --fp16 --int8"


def imports_of(source: str) -> set[str]:
    """Every module that `source` imports, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def commands_of(folder: Path, records: dict[str, Record], monkeypatch: pytest.MonkeyPatch) -> dict[str, Command]:
    write_all(folder, records)
    monkeypatch.chdir(folder)
    return {each.file: each for each in commands(read_sources([Path(name) for name in records]))}


def without(record: Record, *keys: str) -> dict[str, Any]:
    """The record as a version wrote it that did not have these keys."""
    document: dict[str, Any] = json.loads(record.model_dump_json())
    for key in keys:
        *outer, last = key.split(".")
        inner = document
        for name in outer:
            inner = inner[name]
        del inner[last]
    return document


def older_command(folder: Path, name: str, kind: type[Record], monkeypatch: pytest.MonkeyPatch, *keys: str) -> Command:
    """What is told of the record when it was written without these keys."""
    old = kind.parse(json.dumps(without(WHAT_MADE_THE_FILE[name], *keys)), name)
    return commands_of(folder, {name: old}, monkeypatch)[name]


def test_regular_expressions_read_foreign_text_only() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    assert len(modules) > 60
    found = {name for name, path in modules.items() if "re" in imports_of(path.read_text())}
    assert found == READ_FOREIGN_TEXT.keys(), "put what is read into a field of the record"


def test_the_scan_sees_every_way_to_import() -> None:
    assert imports_of("import os, re as r") == {"os", "re"}
    assert imports_of("def f():\n    from re import compile") == {"re"}
    assert "re" in sys.stdlib_module_names and imports_of("import rest") == {"rest"}


def test_other_words_in_a_record_do_not_change_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = commands_of(tmp_path, WHAT_MADE_THE_FILE, monkeypatch)
    reworded: dict[str, Record] = {}
    for name, record in WHAT_MADE_THE_FILE.items():
        if isinstance(record, EvaluationReport):
            words: dict[str, Any] = {"images": "every picture in a folder"}
            if record.reference_is_live:
                words["reference"] = "the same checkpoint, unfrozen"
        else:
            assert isinstance(record, Manifest) and record.device is not None
            noted = record.device.model_copy(update={"model_changes": ["a good deal"]})
            words = {"device": noted}
        reworded[name] = record.model_copy(update=words)
    assert commands_of(tmp_path, reworded, monkeypatch) == asked
    assert asked["live.json"].text == (f"eamdeploy evaluate {CHECKPOINT} --data 'a (b)' --exif-transpose -o live.json")
    calibration = "--calib-data photos --calib-images 8 --calib-method minmax"
    assert asked["x.plan.json"].text.startswith(f"{PLAN} {calibration} ")


@pytest.mark.parametrize(
    ("name", "reference", "unknown"),
    [
        ("against-a-file.json", " --reference b.plan", ""),  # its digest is not the model's
        ("against-itself.json", " --reference REFERENCE", "what the reference was, "),
        ("live.json", " --reference REFERENCE", "what the reference was, "),
    ],
)
def test_an_older_report_is_read_and_its_words_are_not(
    name: str, reference: str, unknown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ("image_source", "reference_is_live")
    command = older_command(tmp_path, name, EvaluationReport, monkeypatch, *keys)
    model = CHECKPOINT if name == "live.json" else "x.plan"
    assert command.text == f"eamdeploy evaluate {model}{reference} --data IMAGES -o {name}"
    assert command.unknown == (
        f"{unknown}where the folder of images lies, --split, --images, --exif-transpose, --class-names, --threads"
    )


def test_an_older_report_without_a_reference_names_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = without(evaluation("x.plan", None), "image_source", "reference_is_live")
    record = EvaluationReport.parse(json.dumps(old), "r.json")
    (command,) = commands_of(tmp_path, {"r.json": record}, monkeypatch).values()
    assert command.text == "eamdeploy evaluate x.plan --data IMAGES -o r.json"
    assert "reference" not in command.unknown


def test_an_older_manifest_is_read_and_its_words_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = older_command(tmp_path, "x.plan.json", Manifest, monkeypatch, "device.calibration")
    assert command.text.startswith(f"{PLAN} --keep-fp32 none ")
    assert command.unknown.endswith("; whether --calib-data was given, and other --calib options")
