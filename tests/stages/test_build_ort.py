from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from command_line import RunCli, only_error

from eamdeploy import build_ort
from eamdeploy.convert.ort_form import OrtForm
from eamdeploy.devices.provenance import usable_cores
from eamdeploy.engines.manifest import Manifest, manifest_path
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import CheckpointError, ConfigError, EngineError, ParityError
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.vocabulary import Int8, ProviderName


@pytest.fixture
def model(eam_model: Path, tmp_path: Path) -> Path:
    """A copy of the exported model with its reference set."""
    for file in (eam_model, reference_path(eam_model)):
        shutil.copy(file, tmp_path)
    return tmp_path / eam_model.name


def test_engine_is_checked_against_the_reference_beside_the_model(model: Path) -> None:
    engine = model.with_name("x.ort.onnx")
    manifest = build_ort(model, engine, threads=1)
    assert Manifest.read(manifest_path(engine)) == manifest
    assert manifest.parity is not None
    assert (manifest.parity.passed, manifest.parity.n, manifest.parity.tolerance) == (True, 16, "f32-engine")
    assert manifest.threads == 1 and manifest.card is not None and manifest.card.freezing is not None
    with open_runner(engine) as runner:
        assert runner.io.batch is None and runner.io.num_classes == 10


def test_threads_are_every_usable_core_unless_told(model: Path) -> None:
    assert build_ort(model, model.with_name("x.ort.onnx")).threads == usable_cores()


@pytest.mark.parametrize(
    ("kind", "provider", "hint"),
    [("dynamic", "openvino", "calibrate"), ("dynamic", "cuda", "out"), ("static", "cuda", "out")],
)
def test_int8_that_a_provider_gains_nothing_from_is_refused(kind: Int8, provider: ProviderName, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"{kind} INT8 is built for provider {provider}.*{hint}"):
        OrtForm(int8=kind, provider=provider)


def test_the_version_is_that_of_the_onnx_runtime_that_is_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.24.1")  # as when onnxruntime-openvino lies over onnxruntime
    manifest = build_ort(model, model.with_name("x.ort.onnx"), threads=1)
    assert (manifest.provider, manifest.versions["onnxruntime"]) == ("cpu", "1.24.1")


def test_reference_of_another_place_is_used(model: Path, tmp_path: Path) -> None:
    moved = reference_path(model).rename(tmp_path / "elsewhere.npz")
    manifest = build_ort(model, tmp_path / "x.ort.onnx", threads=1, reference=moved)
    assert manifest.parity is not None and manifest.parity.passed


def test_missing_reference_is_an_error_that_says_what_to_do_and_can_be_waived(model: Path) -> None:
    reference_path(model).unlink()
    engine = model.with_name("x.ort.onnx")
    with pytest.raises(ConfigError, match=r"no reference set at \S*tiny\.reference\.npz.*--reference.*--no-check"):
        build_ort(model, engine, threads=1)
    assert list(model.parent.iterdir()) == [model]
    assert build_ort(model, engine, threads=1, check=False).parity is None


def test_engine_never_replaces_its_model(model: Path) -> None:
    data = model.read_bytes()
    (model.parent / "link.onnx").symlink_to(model)
    for output in (model, model.parent / "link.onnx"):
        with pytest.raises(ConfigError, match=r"would replace its model"):
            build_ort(model, output, threads=1)
    assert model.read_bytes() == data


def perturb_logits(model: Path) -> None:
    reference = ReferenceSet.load(reference_path(model))
    logits = reference.logits.copy()
    logits[7, 4] += np.float32(0.01)
    dataclasses.replace(reference, logits=logits).save(reference_path(model))


def perturb_weight(model: Path) -> None:
    proto = onnx.load(model)
    bias = next(item for item in proto.graph.initializer if list(item.dims) == [10])
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
    onnx.save(proto, model)


@pytest.mark.parametrize("perturb", [perturb_logits, perturb_weight])
def test_an_engine_that_computes_something_else_is_not_written(model: Path, perturb: Callable[[Path], None]) -> None:
    engine = model.with_name("x.ort.onnx")
    build_ort(model, engine, threads=1)
    old = engine.read_bytes(), manifest_path(engine).read_bytes()
    perturb(model)
    with pytest.raises(ParityError, match=r"parity of \S*tiny\.onnx .*0\.01 > 0\.002"):
        build_ort(model, engine, threads=1, verify=False)
    assert (engine.read_bytes(), manifest_path(engine).read_bytes()) == old
    assert not list(model.parent.glob("*.partial")) and not list(model.parent.glob(".*"))


def flip_low_bit(model: Path) -> None:
    """The lowest bit of a weight is another: no gate can tell."""
    raw = bytearray(model.read_bytes())
    weights = next(item.raw_data for item in onnx.load(model).graph.initializer if list(item.dims) == [10])
    raw[raw.index(weights)] ^= 1
    model.write_bytes(raw)


def test_a_model_with_a_flipped_bit_is_refused_before_it_is_built_or_run(model: Path, run_cli: RunCli) -> None:
    engine = model.with_name("x.ort.onnx")
    flip_low_bit(model)
    altered = r"tiny\.onnx is not the file that its reference set was written with.*--no-verify"
    with pytest.raises(CheckpointError, match=altered):
        build_ort(model, engine, threads=1)
    assert not engine.exists()
    with pytest.raises(CheckpointError, match=altered):
        open_runner(model)
    for words in (["build-ort", model, "-o", engine], ["inspect", model]):
        assert re.search(altered, only_error(run_cli(*words), 2))
        assert run_cli(*words, "--no-verify").code == 0
    manifest = Manifest.read(manifest_path(engine))
    assert manifest.parity is not None and manifest.parity.passed, "the gate alone would have let it pass"


def test_the_twins_reference_is_no_reference_of_the_frozen_model(eam_model: Path, tmp_path: Path) -> None:
    twin = reference_path(eam_model.with_name("base.onnx"))
    with pytest.raises(CheckpointError, match=r"tiny\.onnx is not the file .*set is another model's"):
        build_ort(eam_model, tmp_path / "x.ort.onnx", threads=1, reference=twin)
    assert list(tmp_path.iterdir()) == []


def test_a_reference_set_of_before_does_for_any_model(model: Path) -> None:
    loaded = ReferenceSet.load(reference_path(model))
    dataclasses.replace(loaded, model_digest=None).save(reference_path(model))
    flip_low_bit(model)
    assert build_ort(model, model.with_name("x.ort.onnx"), threads=1).parity is not None


def test_the_twins_reference_does_not_pass_for_the_frozen_model(eam_model: Path, tmp_path: Path) -> None:
    twin = reference_path(eam_model.with_name("base.onnx"))
    with pytest.raises(ParityError, match=r"16 images of pictures"):
        build_ort(eam_model, tmp_path / "x.ort.onnx", threads=1, reference=twin, verify=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda model: model.write_bytes(model.read_bytes()[:5000]), EngineError, r"can't load \S*tiny\.onnx"),
        (lambda model: model.write_text("<html>"), EngineError, r"can't load \S*tiny\.onnx"),
        (lambda model: model.unlink(), ConfigError, r"cannot read \S*tiny\.onnx: No such file"),
        (
            lambda model: reference_path(model).write_bytes(b"PK"),
            CheckpointError,
            r"reference\.npz is damaged or no ref",
        ),
    ],
    ids=["truncated model", "foreign model", "no model", "damaged reference"],
)
def test_damaged_input_is_named_and_nothing_is_written(
    model: Path, damage: Callable[[Path], object], kind: type[Exception], message: str
) -> None:
    damage(model)
    with pytest.raises(kind, match=message):
        build_ort(model, model.with_name("x.ort.onnx"), threads=1, verify=False)
    assert not list(model.parent.glob("x*"))


def test_foreign_model_has_nothing_to_be_checked_by(model: Path) -> None:
    proto = onnx.load(model)
    del proto.metadata_props[:]
    onnx.save(proto, model)
    engine = model.with_name("x.ort.onnx")
    with pytest.raises(ConfigError, match=r"tiny\.onnx carries no model card"):
        build_ort(model, engine, threads=1, verify=False)
    assert build_ort(model, engine, threads=1, check=False).card is None
