"""Engines that come from another kind of processor: proved anew, refused, or told of."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import RunCli
from notebook import Notebook

from eamdeploy import build_ort, evaluate
from eamdeploy.artifacts.files import digest_file
from eamdeploy.convert.ort_form import OrtForm
from eamdeploy.devices.instructions import instruction_sets
from eamdeploy.engines import proof
from eamdeploy.engines.manifest import Manifest, ReferenceFile, manifest_path
from eamdeploy.engines.proof import prove_here
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import CheckpointError, ParityError
from eamdeploy.images.source import ImageSource
from eamdeploy.parity.gate import ParityReport
from eamdeploy.parity.reference_set import ReferenceSet, reference_path

VNNI, AVX2, ARM = "x86_64: avx2 avx512_vnni", "x86_64: avx2", "aarch64: dotprod neon"


@pytest.fixture(scope="module")
def built(eam_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, its reference set, an engine in FP32 and one in INT8."""
    folder = tmp_path_factory.mktemp("proof")
    for file in (eam_model, reference_path(eam_model)):
        shutil.copy(file, folder)
    model = folder / eam_model.name
    build_ort(model, folder / "x.ort.onnx", threads=1)
    build_ort(model, folder / "x.int8.ort.onnx", threads=1, forms=[OrtForm(int8="dynamic")], min_agreement=75)
    return folder


class Engine:
    """An engine in a folder of its own, as if it were from somewhere else."""

    def __init__(self, built: Path, folder: Path, name: str, *, reference: bool) -> None:
        self.path = folder / name
        for file in (self.path.name, manifest_path(self.path).name, *(["tiny.reference.npz"] if reference else [])):
            shutil.copy(built / file, folder)

    @property
    def reference(self) -> Path:
        return self.path.with_name("tiny.reference.npz")

    def say(self, **changes: Any) -> None:
        """The manifest says something else."""
        file = manifest_path(self.path)
        file.write_text(Manifest.read(file).model_copy(update=changes).model_dump_json())

    @property
    def parity(self) -> ParityReport | None:
        return Manifest.read(manifest_path(self.path)).parity


def prove(engine: Engine, monkeypatch: pytest.MonkeyPatch, here: str, *, check: bool = True) -> Any:
    """What `prove_here` returns on such a processor, its notes, and whether the engine was run."""
    runs: list[object] = []
    notes: list[str] = []

    def opened(*given: Any) -> Any:
        runs.append(given)
        return open_runner(*given)

    monkeypatch.setattr(proof, "instruction_sets", lambda: here)
    monkeypatch.setattr(proof, "open_runner", opened)
    return prove_here(engine.path, 1, check=check, note=notes.append), notes, bool(runs)


@pytest.mark.parametrize("name", ["x.ort.onnx", "x.int8.ort.onnx"])
def test_a_build_notes_its_processor_and_its_reference_set(name: str, built: Path) -> None:
    manifest = Manifest.read(manifest_path(built / name))
    assert manifest.instructions == instruction_sets()
    reference = built / "tiny.reference.npz"
    assert manifest.reference == ReferenceFile(name=reference.name, digest=digest_file(reference))


def test_an_unchecked_build_names_no_reference_set(built: Path, tmp_path: Path) -> None:
    manifest = build_ort(built / "tiny.onnx", tmp_path / "x.ort.onnx", threads=1, check=False)
    assert manifest.reference is None and manifest.parity is None


@pytest.mark.parametrize("name", ["x.ort.onnx", "x.int8.ort.onnx"])
@pytest.mark.parametrize("here", [VNNI, AVX2, ARM])
def test_where_it_was_proved_nothing_is_run(
    name: str, here: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(built, tmp_path, name, reference=True)
    engine.say(instructions=here)
    assert prove(engine, monkeypatch, here) == (engine.parity, [], False)


@pytest.mark.parametrize("name", ["x.ort.onnx", "x.int8.ort.onnx"])
@pytest.mark.parametrize(("there", "here"), [(VNNI, AVX2), (AVX2, VNNI), (AVX2, ARM)])
def test_on_another_processor_the_reference_set_is_run(
    name: str, there: str, here: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(built, tmp_path, name, reference=True)
    engine.say(instructions=there)
    parity, notes, run = prove(engine, monkeypatch, here)
    assert run and parity is not None and parity.passed and engine.parity is not None
    assert parity.tolerance == engine.parity.tolerance and parity.n == engine.parity.n
    (note,) = notes
    assert there in note and here in note and "proved here too, with tiny.reference.npz" in note


@pytest.mark.parametrize("name", ["x.ort.onnx", "x.int8.ort.onnx"])
def test_what_computes_something_else_here_is_refused(
    name: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(built, tmp_path, name, reference=True)
    loaded = ReferenceSet.load(engine.reference)
    replace(loaded, logits=-loaded.logits).save(engine.reference)
    file = ReferenceFile(name=engine.reference.name, digest=digest_file(engine.reference))
    engine.say(instructions=VNNI, reference=file)
    with pytest.raises(ParityError, match=rf"first class equal for .*was proved on {VNNI}.*build it again here"):
        prove(engine, monkeypatch, AVX2)


@pytest.mark.parametrize("other", [False, True], ids=["absent", "another"])
def test_without_the_reference_set_int8_is_refused_where_products_saturate_and_fp32_is_told_of(
    other: bool, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "there is no tiny.reference.npz"
    engines = [Engine(built, tmp_path, name, reference=False) for name in ("x.ort.onnx", "x.int8.ort.onnx")]
    for engine in engines:
        engine.say(instructions=VNNI)
        if other:
            engine.reference.write_bytes(b"another")
            reason = "tiny.reference.npz is another set than it was proved with"
    fp32, int8 = engines
    parity, (note,), run = prove(fp32, monkeypatch, AVX2)
    assert parity == fp32.parity and not run and reason in note and "FP32 differs by rounding" in note
    with pytest.raises(ParityError, match=rf"can't be proved here.*got {reason}\. Copy the set there.*--no-check"):
        prove(int8, monkeypatch, AVX2)
    for here, check in ((ARM, True), (AVX2, False), (ARM, False)):
        parity, (note,), run = prove(int8, monkeypatch, here, check=check)
        assert parity is None and not run and "not proved here" in note


def test_without_the_check_nothing_is_run(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x.ort.onnx", "x.int8.ort.onnx"):
        engine = Engine(built, tmp_path, name, reference=True)
        engine.say(instructions=VNNI)
        parity, (note,), run = prove(engine, monkeypatch, AVX2, check=False)
        assert not run and parity == (engine.parity if name == "x.ort.onnx" else None)
        assert "the check was left out" in note


def test_an_older_manifest_matters_in_int8_where_products_saturate_alone(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x.ort.onnx", "x.int8.ort.onnx"):
        engine = Engine(built, tmp_path, name, reference=False)
        old = Manifest.read(manifest_path(engine.path)).model_dump_json(exclude={"instructions", "reference"})
        manifest_path(engine.path).write_text(old)
        for here in (VNNI, ARM):
            assert prove(engine, monkeypatch, here) == (engine.parity, [], False)
    with pytest.raises(ParityError, match=r"an unknown processor.*there is no x\.reference\.npz"):
        prove(engine, monkeypatch, AVX2)
    shutil.copy(built / "tiny.reference.npz", tmp_path / "x.int8.reference.npz")
    _, (note,), run = prove(engine, monkeypatch, AVX2)
    assert run and "x.int8.reference.npz" in note


def test_an_older_manifest_that_names_its_tolerance_in_words_only_is_refused(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(built, tmp_path, "x.int8.ort.onnx", reference=True)
    assert engine.parity is not None
    in_words = {"tolerance": "reduced-engine at 90 %", "min_agreement": None}
    engine.say(instructions=VNNI, parity=engine.parity.model_copy(update=in_words))
    said = r"x\.int8\.ort\.onnx was held to is not known.*Build"
    with pytest.raises(CheckpointError, match=said):
        prove(engine, monkeypatch, AVX2)
    assert prove(engine, monkeypatch, AVX2, check=False)[0] is None


def test_what_never_was_checked_or_has_no_manifest_stays_so(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(built, tmp_path, "x.int8.ort.onnx", reference=True)
    engine.say(instructions=VNNI, parity=None)
    assert prove(engine, monkeypatch, AVX2) == (None, [], False)
    manifest_path(engine.path).unlink()
    assert prove(engine, monkeypatch, AVX2) == (None, [], False)


def test_an_engine_on_a_gpu_does_not_depend_on_the_processor(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(built, tmp_path, "x.ort.onnx", reference=True)
    for changes in ({"provider": "cuda"}, {"backend": "trt", "provider": "cpu"}):
        engine.say(instructions=VNNI, **changes)
        assert prove(engine, monkeypatch, AVX2) == (engine.parity, [], False)


@pytest.mark.parametrize("name", ["../x.npz", "a/x.npz", "..", ".", "", "C:\\x.npz"])
def test_a_reference_set_is_named_without_a_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match="name"):
        ReferenceFile.parse(json.dumps({"name": name, "digest": "sha256:0"}), "x")


def test_evaluate_and_profile_prove_first(
    built: Path, tmp_path: Path, pictures: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(built, tmp_path, "x.int8.ort.onnx", reference=False)
    engine.say(instructions=VNNI)
    monkeypatch.setattr(proof, "instruction_sets", lambda: AVX2)
    quick = ["--warmup-ms", 0, "--min-seconds", 0, "--min-runs", 2, "--sittings", 1, "--no-memory", "--threads", 1]
    commands: list[list[object]] = [
        ["evaluate", engine.path, "--data", pictures, "--json"],
        ["evaluate", built / "x.ort.onnx", "--reference", engine.path, "--data", pictures, "--json"],
        ["profile", engine.path, *quick, "--json"],
        ["profile", built / "x.ort.onnx", "--baseline", engine.path, *quick, "--json"],
    ]
    for command in commands:
        refused = run_cli(*command)
        assert (refused.code, refused.out) == (3, "") and "can't be proved here" in refused.err.splitlines()[-1]
        unchecked = run_cli(*command, "--no-check")
        assert unchecked.code == 0 and "the check was left out" in unchecked.err
    profiled = json.loads(unchecked.out)
    assert profiled["baseline"]["parity"] is None and profiled["engines"][0]["parity"]["passed"]
    shutil.copy(built / "tiny.reference.npz", tmp_path)
    for command in commands:
        proved = run_cli(*command)
        assert proved.code == 0 and "x.int8.ort.onnx was proved on" in proved.err and "proved here too" in proved.err
    assert json.loads(proved.out)["baseline"]["parity"]["passed"]


def test_a_note_reaches_the_observer(
    built: Path, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, notes = Engine(built, tmp_path, "x.ort.onnx", reference=True), Notebook()
    monkeypatch.setattr(proof, "instruction_sets", lambda: ARM)
    evaluate(engine.path, ImageSource(pictures), threads=1, observer=notes)
    assert any("proved here too" in line for line in notes.notes)
