"""Every stage on ONNX models that keep their data in other files: torch's default export, and others' layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_line import RunCli, only_error
from numpy.typing import NDArray
from onnx import numpy_helper
from split_models import LAYOUTS, constants, copy_reference, split, three_files
from tiny_models import make_model

from eamdeploy import build_ort, export
from eamdeploy.artifacts import onnx_files, onnx_output
from eamdeploy.artifacts.files import digest_file
from eamdeploy.artifacts.onnx_files import data_path, digest_model, model_bytes, model_files
from eamdeploy.convert.ort_form import AS_EXPORTED, OrtForm, candidates
from eamdeploy.convert.ranges import Calibration
from eamdeploy.convert.trt import prepare
from eamdeploy.engines.manifest import manifest_path, read_manifest
from eamdeploy.engines.registry import open_runner
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import EngineError, ParityError, UnsupportedGraph
from eamdeploy.graph.weights import Slim, serialize
from eamdeploy.images.source import ImageSource
from eamdeploy.lint.linter import lint_file
from eamdeploy.observer import SILENT
from eamdeploy.parity.gate import reduced_tolerance
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.profiling.timing import Schedule
from eamdeploy.stages.inspect import inspect
from eamdeploy.stages.ort_forms import Request, build

FORMS = {
    "as exported": AS_EXPORTED,
    "fused": OrtForm(fused_attention=True),
    "dynamic INT8": OrtForm(int8="dynamic"),
    "static INT8": OrtForm(int8="static"),
    "fused static INT8": OrtForm(fused_attention=True, int8="static"),
}
LIMITS = {"our output one file": onnx_files.ONE_FILE_BYTES, "our output two files": 10_000}
IMAGES = np.random.default_rng(0).uniform(-2, 2, (3, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def one(eam_model: Path, tmp_path: Path) -> Path:
    """The exported model in one file, with its reference set."""
    folder = tmp_path / "one"
    folder.mkdir()
    for file in (eam_model, reference_path(eam_model)):
        shutil.copy(file, folder)
    return folder / eam_model.name


@pytest.fixture
def several(one: Path, tmp_path: Path) -> Path:
    """The same in several files, some in sub-folders."""
    folder = tmp_path / "several"
    folder.mkdir()
    copy_reference(one, folder)
    return split(onnx.load(one), folder / one.name, three_files, gap=13)


@pytest.fixture
def calibration(pictures: Path) -> Calibration:
    return Calibration(ImageSource(pictures, limit=8))


@pytest.fixture(params=LIMITS.values(), ids=list(LIMITS))
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Above so many bytes a model of ours is two files."""
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", request.param)
    return int(request.param)


@pytest.fixture
def two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", LIMITS["our output two files"])


def logits(engine: Path) -> NDArray[np.float32]:
    with open_runner(engine, threads=1) as runner:
        return runner.infer(IMAGES)


def values(path: Path) -> dict[str, NDArray[Any]]:
    return {item.name: numpy_helper.to_array(item) for item in constants(onnx.load(path))}


def build_of(model: Path, form: OrtForm, calibration: Calibration, name: str = "x.ort.onnx") -> Path:
    engine = model.with_name(name)
    images = calibration if form.int8 == "static" else None
    minimum = 0 if form.int8 else None
    build_ort(model, engine, threads=1, forms=[form], calibration=images, min_agreement=minimum)
    return engine


def flip_a_bit(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


# --- engines of ONNX Runtime ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_an_engine_of_several_files_is_that_of_one(
    form: OrtForm, limit: int, one: Path, several: Path, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_of(several, form, calibration)
    manifest = read_manifest(engine)
    assert manifest is not None and manifest.parity is not None and manifest.parity.passed
    assert manifest.model_digest == digest_model(several) != digest_file(several)
    assert (manifest.engine_digest, manifest.engine_bytes) == (digest_model(engine), model_bytes(engine))
    files = [engine] if limit == LIMITS["our output one file"] else [engine, data_path(engine)]
    assert list(model_files(engine)) == files
    left = {file.name for file in several.parent.iterdir()} - {"a.bin", "sub", several.name, "tiny.reference.npz"}
    assert left - {"x.ort.onnx.ranges.json"} == {*(file.name for file in files), manifest_path(engine).name}
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", LIMITS["our output one file"])
    same = build_of(one, form, calibration)
    if form == AS_EXPORTED:
        assert same.read_bytes() == one.read_bytes(), "one file stays byte for byte"
    stock, ours = onnx.load(same), onnx.load(engine)
    assert [node.SerializeToString() for node in stock.graph.node] == [
        node.SerializeToString() for node in ours.graph.node
    ]
    for name, value in values(same).items():
        np.testing.assert_array_equal(values(engine)[name], value)
    np.testing.assert_array_equal(logits(engine), logits(same))


def test_the_fastest_of_all_forms(limit: int, several: Path, calibration: Calibration) -> None:
    engine = several.with_name("x.ort.onnx")
    asked = Request(several, engine, 1, calibration, ReferenceSet.load(reference_path(several)), reduced_tolerance(0))
    forms = candidates(["cpu"], int8=True, calibrated=True)
    manifest = build(asked, forms, SILENT, Schedule(warmup_ms=0, min_seconds=0, min_runs=4, sittings=2))
    assert manifest.tried is not None and not [tried.refused for tried in manifest.tried if tried.refused]
    assert len(manifest.tried) == len(forms) == 6 and read_manifest(engine) == manifest
    assert not [file.name for file in several.parent.iterdir() if file.name.startswith(".")]


def test_what_the_gate_refuses_leaves_the_old_engine(two_files: None, one: Path, several: Path) -> None:
    engine = several.with_name("x.ort.onnx")
    build_ort(several, engine, threads=1)
    before = {file: file.read_bytes() for file in several.parent.rglob("*") if file.is_file()}
    references = ReferenceSet.load(reference_path(several))
    replace(references, logits=-references.logits).save(one.with_name("wrong.npz"))
    with pytest.raises(ParityError, match="parity of"):
        build_ort(several, engine, threads=1, reference=one.with_name("wrong.npz"))
    assert {file: file.read_bytes() for file in several.parent.rglob("*") if file.is_file()} == before


def test_torchs_default_export(limit: int, one: Path, tmp_path: Path, pictures: Path, run_cli: RunCli) -> None:
    model, path = make_model(), tmp_path / "x.onnx"
    torch.onnx.export(model, (torch.zeros(1, 3, 32, 32),), path, dynamo=True, external_data=True, verbose=False)
    assert [file.name for file in model_files(path)] == ["x.onnx", "x.onnx.data"]
    engine = tmp_path / "x.ort.onnx"
    built = run_cli("build-ort", path, "-o", engine, "--no-check", "--threads", 1)
    assert built.code == 0, built.err
    with torch.no_grad():
        expected = model(torch.from_numpy(IMAGES[:1])).numpy()
    with open_runner(engine) as runner:
        np.testing.assert_allclose(runner.infer(IMAGES[:1]), expected, atol=2e-4)
    assert lint_file(path, TrtVersion.parse("8.6")).errors == lint_file(engine, TrtVersion.parse("8.6")).errors
    evaluated = run_cli("evaluate", path, "--reference", one, "--data", pictures, "--json")
    assert evaluated.code == 0, evaluated.err
    assert json.loads(evaluated.out)["model_digest"] == digest_model(path)


# --- what is changed, missing or elsewhere ----------------------------------------------------------------------------


def test_changed_data_is_another_engine(two_files: None, several: Path) -> None:
    engine = several.with_name("x.ort.onnx")
    build_ort(several, engine, threads=1)
    flip_a_bit(data_path(engine))
    for use in (read_manifest, open_runner):
        with pytest.raises(EngineError, match=r"x\.ort\.onnx\.json describes another engine than .*x\.ort\.onnx"):
            use(engine)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["build-ort", "MODEL", "-o", "OUT"], 2),
        (["build-ort", "MODEL", "-o", "OUT", "--fused-attention"], 2),
        (["build-trt", "MODEL", "--dry-run", "--trt", "10.3"], 2),
        (["lint", "MODEL", "--trt", "10.3"], 2),
        (["evaluate", "MODEL", "--data", "PICTURES"], 2),
        (["evaluate", "OTHER", "--reference", "MODEL", "--data", "PICTURES"], 2),
        (["profile", "MODEL"], 2),
        (["profile", "OTHER", "--baseline", "MODEL"], 2),
        (["profile", "MODEL", "--device", "ssh://nowhere.invalid"], 2),
        (["inspect", "MODEL"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_every_command_names_the_file_that_is_missing_short_or_elsewhere(
    command: list[str], code: int, one: Path, several: Path, pictures: Path, run_cli: RunCli
) -> None:
    words = {"MODEL": several, "OTHER": one, "PICTURES": pictures, "OUT": several.with_name("o.onnx")}
    file = several.parent / "sub" / "b.bin"
    data = file.read_bytes()

    def lead_elsewhere() -> None:
        file.unlink()
        file.symlink_to(reference_path(one))

    damages: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: file.write_bytes(data[:-1]), "b.bin is too short for tiny.onnx"),
        (lead_elsewhere, "a model may not"),
        (file.unlink, "tiny.onnx keeps its weights in sub/b.bin, which is not beside it"),
    )
    for damage, message in damages:
        damage()
        error = only_error(run_cli("-q", *(words.get(word, word) for word in command)), code)
        assert message in error
    assert not words["OUT"].exists()


# --- other stages -----------------------------------------------------------------------------------------------------


def test_evaluate_profile_and_inspect_count_all_files(
    two_files: None, one: Path, several: Path, pictures: Path, run_cli: RunCli
) -> None:
    engine = several.with_name("x.ort.onnx")
    build_ort(several, engine, threads=1)
    for path in (several, engine):
        evaluated = run_cli("evaluate", path, "--reference", one, "--data", pictures, "--json")
        document = json.loads(evaluated.out)
        assert (document["agreement"], document["model_digest"]) == (100, digest_model(path))
        assert document["kl"] < 1e-9 and document["reference_digest"] == digest_file(one)
    quick = ["--warmup-ms", 0, "--min-seconds", 0, "--min-runs", 2, "--sittings", 1, "--no-power", "--threads", 1]
    profiled = run_cli("profile", engine, several, "--baseline", one, *quick, "--json")
    assert profiled.code == 0, profiled.err
    profile = json.loads(profiled.out)
    measured = [profile["baseline"], *profile["engines"]]
    bytes_of = [sum(file.stat().st_size for file in model_files(path)) for path in (one, engine, several)]
    assert [item["memory"]["engine_bytes"] for item in measured] == bytes_of
    assert all(abs(size / bytes_of[0] - 1) < 0.4 for size in bytes_of), "the weights are counted"
    assert [item["digest"] for item in measured] == [digest_model(path) for path in (one, engine, several)]
    whole, parts = inspect(one), inspect(several)
    assert (parts.bytes, parts.digest) == (bytes_of[2], digest_model(several))
    assert parts.details.pop("weights in") == ["a.bin", "sub/b.bin", "sub/deeper/c.bin"]
    assert parts.details == whole.details and parts.kind == whole.kind
    assert inspect(engine).details["weights in"] == ["x.ort.onnx.data"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_lint_finds_what_it_finds_in_one_file(layout: Any, limit: int, one: Path, tmp_path: Path) -> None:
    path = split(onnx.load(one), tmp_path / "x.onnx", layout, at_least=1)
    findings = lint_file(path, TrtVersion.parse("10.3")).findings
    assert findings == lint_file(one, TrtVersion.parse("10.3")).findings and findings


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ("8.6", TrtOptions()),
        ("10.3", TrtOptions(precision="fp16", int8=True)),
        ("11.4", TrtOptions(precision="fp16")),
    ],
    ids=["8.6", "10.3 int8", "11.4 fp16"],
)
def test_tensorrt_gets_the_model_of_one_file(
    version: str, options: TrtOptions, limit: int, one: Path, several: Path, calibration: Calibration
) -> None:
    images = calibration if options.int8 else None
    made, stock = (prepare(path, TrtVersion.parse(version), options, images) for path in (several, one))
    assert made.digest == digest_model(several)
    assert made.data.is_one_file is (limit == LIMITS["our output one file"])
    assert made.facts == stock.facts and made.changes == stock.changes
    for name, data in (("made.onnx", made.data), ("stock.onnx", stock.data)):
        onnx_output.write_model(one.with_name(name), data)
    first, second = values(one.with_name("made.onnx")), values(one.with_name("stock.onnx"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


def test_a_large_model_in_int8_for_tensorrt_11_is_refused_with_the_way_out(
    two_files: None, several: Path, calibration: Calibration
) -> None:
    with pytest.raises(UnsupportedGraph, match=r"more than 2 GB can't be brought to operator set 19.*--opset 19"):
        prepare(several, TrtVersion.parse("11.4"), TrtOptions(precision="fp16", int8=True), calibration)


def test_what_tensorrts_parser_gets_is_written_whole(
    limit: int, one: Path, several: Path, pictures: Path, run_cli: RunCli
) -> None:
    saved = several.with_name("parsed.onnx")
    done = run_cli("build-trt", several, "--dry-run", "--trt", "10.3", "--save-onnx", saved)
    assert done.code == 0, done.err
    assert len(model_files(saved)) == (1 if limit == LIMITS["our output one file"] else 2)
    np.testing.assert_allclose(logits(saved), logits(one), atol=2e-2)
    refused = run_cli("build-trt", several, "--dry-run", "--trt", "10.3", "--save-onnx", several)
    assert "would replace the input" in only_error(refused, 2)


def test_export_of_a_large_model_is_two_files(
    two_files: None, eam_checkpoint: Path, eam_model: Path, tmp_path: Path, pictures: Path
) -> None:
    output, baseline = tmp_path / "tiny.onnx", tmp_path / "base.onnx"
    made = export(eam_checkpoint, output, baseline=baseline, images=ImageSource(pictures))
    assert made.baseline is not None
    names = {output.name, baseline.name, f"{output.name}.data", f"{baseline.name}.data"}
    assert {file.name for file in tmp_path.iterdir()} == names | {"tiny.reference.npz", "base.reference.npz"}
    for path, record in ((output, made.frozen), (baseline, made.baseline)):
        assert (record.digest, record.bytes) == (digest_model(path), model_bytes(path)) and record.parity.passed
        stock = eam_model.with_name(path.name)
        for name, value in values(stock).items():
            np.testing.assert_array_equal(values(path)[name], value)
        np.testing.assert_array_equal(logits(path), logits(stock))
    manifest = build_ort(output, tmp_path / "x.ort.onnx", threads=1)
    assert manifest.model_digest == made.frozen.digest and manifest.parity is not None


def test_a_large_constant_outside_the_initializers_is_told(two_files: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from eamdeploy.errors import UnsupportedGraph

    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) {y = Identity (x)}'
    )
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(9000, np.float32), "w"))
    assert not serialize(model).is_one_file
    monkeypatch.setattr("eamdeploy.graph.weights.without_weights", lambda _: Slim(TooLarge(), {}, 0))
    with pytest.raises(UnsupportedGraph, match="more than 2 GB can't be written"):
        serialize(model)


class TooLarge:
    """Stands in for a model that protobuf can't write."""

    def SerializeToString(self, deterministic: bool) -> bytes:  # noqa: N802
        raise ValueError("Failed to serialize proto")
