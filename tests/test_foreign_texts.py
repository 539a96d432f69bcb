"""Texts that are no UTF-8, wherever one may be: a clear error or the right result, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import RunCli, only_error
from engine_models import make_frozen_model
from tiny_models import KWARGS, NAME

from eamdeploy.artifacts.records import Record, printable
from eamdeploy.convert.ort_form import OrtForm
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.engines.manifest import manifest_path
from eamdeploy.engines.registry import open_runner
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import CheckpointError, EngineError
from eamdeploy.graph.texts import has_only_text
from eamdeploy.lint.linter import lint_file
from eamdeploy.parity.reference_set import reference_path
from eamdeploy.stages.build_ort import build_ort
from eamdeploy.stages.build_trt import plan_trt_build
from eamdeploy.stages.inspect import inspect

STRANGE = "\udcff\udcfe"
"""What Python makes of the bytes FF FE in a file's name."""

TEXTS = {
    "metadata": b"timm_model",
    "key of metadata": b"eamdeploy",
    "input": b"image",
    "output": b"logits",
    "constant": b"patch",
    "value": b"merged",
    "graph": b"frozen",
    "axis": b"batch",
    "operator": b"MatMul",
    "attribute": b"strides",
}


@pytest.fixture(params=TEXTS.values(), ids=list(TEXTS))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An ONNX model in which one text begins with the bytes FF FE, wherever it stands."""
    good = make_frozen_model().to_onnx().SerializeToString()
    text: bytes = request.param
    assert text in good
    path = tmp_path / "x.onnx"
    path.write_bytes(good.replace(text, b"\xff\xfe" + text[2:]))
    return path


def test_models_with_such_a_text_are_told_from_others(model: Path) -> None:
    assert not has_only_text(onnx.load(model))
    assert has_only_text(make_frozen_model().to_onnx())


def test_model_with_such_a_text_is_read_or_refused(model: Path) -> None:
    readers: dict[str, Callable[[], object]] = {
        "run": lambda: open_runner(model, threads=1).close(),
        "inspect": lambda: inspect(model).model_dump_json(),
        "build": lambda: build_ort(model, model.with_name("a.ort.onnx"), threads=1, check=False),
    }
    for name, read in readers.items():
        try:
            read()
        except (CheckpointError, EngineError) as err:
            assert "x.onnx" in str(err), name


def test_model_with_such_a_text_is_no_model_to_convert_or_to_lint(model: Path) -> None:
    readers: dict[str, Callable[[], object]] = {
        "lint": lambda: lint_file(model, TrtVersion.parse("8.6")),
        "INT8": lambda: build_ort(
            model, model.with_name("b.ort.onnx"), threads=1, check=False, forms=[OrtForm(int8="dynamic")]
        ),
        "TensorRT": lambda: plan_trt_build(model, TrtOptions(), TrtVersion.parse("8.6")),
    }
    for read in readers.values():
        with pytest.raises((CheckpointError, EngineError), match=r"x\.onnx.* that are no UTF-8"):
            read()


# --- names of files --------------------------------------------------------------------------------------------------


def strange_copy(file: Path, folder: Path) -> Path:
    copy = folder / f"{STRANGE}{''.join(file.suffixes)}"
    shutil.copy(file, copy)
    return copy


def test_checkpoint_of_a_strange_name(run_cli: RunCli, eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    checkpoint = strange_copy(eam_checkpoint, tmp_path)
    for words in (
        ["inspect", checkpoint, "--json"],
        ["evaluate", checkpoint, "--data", pictures, "--images", 2, "-o", tmp_path / f"{STRANGE}.json", "--json"],
        ["report", checkpoint, "-o", tmp_path / f"{STRANGE}.html", "--json"],
        ["export", checkpoint, "-o", tmp_path / f"{STRANGE}.npz.onnx", "--no-measure", "--exporter", "torchscript"],
    ):
        done = run_cli(*words)
        assert done.code == 0, (words[0], done.err)
    assert inspect(checkpoint).file == str(tmp_path / "\\udcff\\udcfe.eam.safetensors")


def test_model_of_a_strange_name_is_built_from_but_not_opened(
    run_cli: RunCli, eam_model: Path, pictures: Path, tmp_path: Path
) -> None:
    model = strange_copy(eam_model, tmp_path)
    shutil.copy(reference_path(eam_model), reference_path(model))
    assert run_cli("build-ort", model, "-o", tmp_path / "x.ort.onnx", "--json").code == 0
    assert run_cli("lint", model, "--trt", "10.3", "--json").code in (0, 3)
    for words in (["evaluate", model, "--data", pictures], ["inspect", model], ["profile", model, "--no-memory"]):
        assert "a name that is UTF-8. Rename the file." in only_error(run_cli(*words), 2)


def test_images_and_folders_of_strange_names(run_cli: RunCli, eam_engine: Path, pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / STRANGE
    shutil.copytree(pictures, folder)
    next(folder.iterdir()).rename(folder / f"{STRANGE}.png")
    done = run_cli("evaluate", eam_engine, "--data", folder, "--json")
    assert done.code == 0 and json.loads(done.out)["images"] == "\\udcff\\udcfe (all)"
    (folder / f"{STRANGE}.png").write_bytes(b"")
    done = run_cli("evaluate", eam_engine, "--data", folder, "--skip-bad", "--json")
    assert done.code == 0 and json.loads(done.out)["n_skipped"] == 1
    assert "cannot use image" in only_error(run_cli("evaluate", eam_engine, "--data", folder), 2)


def test_documents_of_strange_names(run_cli: RunCli, eam_engine: Path, tmp_path: Path) -> None:
    document = strange_copy(manifest_path(eam_engine), tmp_path)
    assert run_cli("inspect", document, "--json").code == 0
    assert run_cli("report", document, "-o", tmp_path / "x.html", "--json").code == 0


# --- texts in other files --------------------------------------------------------------------------------------------


def test_class_names_with_half_a_character(run_cli: RunCli, tiny_weights: Path, pictures: Path, tmp_path: Path) -> None:
    """JSON can spell it, UTF-8 can't."""
    names = tmp_path / "names.json"
    names.write_text(json.dumps(["\ud800", *"bcdefghij"]))
    output = tmp_path / "x.eam.safetensors"
    kwargs = [f"{key}={value}" for key, value in KWARGS.items()]
    words = ["--weights", tiny_weights, "--data", pictures, "--class-names", names, "--score", "variance"]
    done = run_cli("freeze", "--model", NAME, *words, "-o", output, "--model-kwargs", *kwargs)
    assert done.code == 0, done.err
    assert checkpoints.load(output).header.class_names == ["\\ud800", *"bcdefghij"]


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"engine_digest": "\\udfff", "\\ud800": 1}'])
def test_json_with_half_a_character(run_cli: RunCli, tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert run_cli("inspect", tmp_path / "x.json", "--json").code in (0, 2)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "latin1"])
def test_json_in_another_encoding_is_no_document(
    run_cli: RunCli, eam_engine: Path, tmp_path: Path, encoding: str
) -> None:
    """Python's parser would take some; then a seal in it would not be looked at."""
    text = manifest_path(eam_engine).read_text().replace('"machine": "', '"machine": "é')
    (tmp_path / "x.json").write_bytes(text.encode(encoding))
    for words in (["inspect", tmp_path / "x.json"], ["report", tmp_path / "x.json", "-o", tmp_path / "x.html"]):
        assert "x.json" in only_error(run_cli(*words), 2)


class Names(Record):
    """For tests."""

    one: str
    more: list[str]
    by_name: dict[str, tuple[str, ...]]


def test_every_text_of_a_record_can_be_written(tmp_path: Path) -> None:
    names = Names(one=f"a{STRANGE}", more=["é", STRANGE], by_name={STRANGE: ("\ud800", "plain")})
    names.write(tmp_path / "x.json")
    assert Names.read(tmp_path / "x.json") == names
    assert names.one == "a\\udcff\\udcfe" and names.more[0] == "é"


def test_printable_changes_nothing_else() -> None:
    value = {"a": [1, 2.5, None, ("é", b"\xff")], "b": np.float32(1)}
    assert printable(value) == value
