from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import RunCli, only_error
from notebook import Notebook
from tiny_models import KWARGS, NAME

from eamdeploy import build_ort, evaluate, export, freeze, recover, report
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.records import CheckpointHeader
from eamdeploy.eam.recovery import RecoverOptions, held_back_images
from eamdeploy.errors import ConfigError, ExitCode
from eamdeploy.host.calibrate import predict
from eamdeploy.host.model import ModelSpec
from eamdeploy.host.reference import load_reference
from eamdeploy.images.preprocess import normalize
from eamdeploy.images.source import ImageSource
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.recovery import solving
from eamdeploy.stages.inspect import inspect


@pytest.fixture(scope="module")
def recovered(tmp_path_factory: pytest.TempPathFactory, eam_checkpoint: Path, pictures: Path) -> Path:
    output = tmp_path_factory.mktemp("recovered") / "y.eam.safetensors"
    recover(eam_checkpoint, ImageSource(pictures), output)
    return output


def test_the_result_is_a_checkpoint_that_differs_in_what_it_says(
    recovered: Path, eam_checkpoint: Path, pictures: Path
) -> None:
    before, after = checkpoints.load(eam_checkpoint), checkpoints.load(recovered)
    found = after.header.recovery
    assert found is not None and found.teacher == before.header.content_digest
    assert (found.n_images, found.n_held_back, found.source) == (24, 5, pictures.name)
    assert before.header.calibration is not None and found.digest == before.header.calibration.digest
    assert found.after.kl < found.before.kl and found.after.n_images == 5
    assert list(found.layers) == [f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn.proj", "mlp.fc2")]
    changed = {name for name, layer in found.layers.items() if layer.changed}
    assert 0 < found.n_changed == len(changed)
    for name, weight in before.weights.items():
        assert np.array_equal(weight, after.weights[name]) == (name.rpartition(".")[0] not in changed), name
        assert weight.dtype == after.weights[name].dtype
    unlike = {"content_digest", "recovery"}
    assert before.header.model_dump(exclude=unlike) == after.header.model_dump(exclude=unlike)
    for path, maps in before.frozen.items():
        assert np.array_equal(maps.codes, after.frozen[path].codes)


def test_the_record_is_what_evaluation_finds(recovered: Path, eam_checkpoint: Path, pictures: Path) -> None:
    header = checkpoints.load(recovered).header
    source = ImageSource(pictures)
    held = sorted(held_back_images(24, RecoverOptions()))
    folder = source.open()
    chosen = replace(folder, files=tuple(folder.files[number] for number in held))
    (batch,) = source.batches(chosen, header.preprocessing, 24, Notebook())
    pixels = normalize(batch.pixels, header.preprocessing)
    teacher = load_reference(checkpoints.load(eam_checkpoint), frozen=False, where="x")
    student = load_reference(checkpoints.load(recovered), frozen=True, where="y")
    expected, got = (
        torch.from_numpy(predict(each.model, pixels)).double().log_softmax(1) for each in (teacher, student)
    )
    kl = (expected.exp() * (expected - got)).sum(1).mean().item()
    assert header.recovery is not None and header.recovery.after.kl == pytest.approx(kl, rel=1e-3)


def test_the_seed_decides(recovered: Path, eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again.eam.safetensors", tmp_path / "other.eam.safetensors"
    recover(eam_checkpoint, ImageSource(pictures), again)
    assert again.read_bytes() == recovered.read_bytes()
    recover(eam_checkpoint, ImageSource(pictures), other, RecoverOptions(seed=1))
    assert other.read_bytes() != recovered.read_bytes()


@pytest.mark.parametrize(("count", "share", "expected"), [(2, 0.2, 1), (10, 0.2, 2), (10, 0.99, 9), (500, 0.2, 100)])
def test_some_images_are_held_back_and_never_all(count: int, share: float, expected: int) -> None:
    held = held_back_images(count, RecoverOptions(held_back=share))
    assert len(held) == expected and held <= set(range(count))


def test_rows_and_entries_recover_too(tiny_weights: Path, pictures: Path, tmp_path: Path) -> None:
    source, checkpoint = ImageSource(pictures), tmp_path / "x.eam.safetensors"
    for granularity in ("row", "entry"):
        options = FreezeOptions(sparsity=0.6, score="random", granularity=granularity)
        freeze(ModelSpec(NAME, str(tiny_weights), KWARGS), source, checkpoint, options)
        header = recover(checkpoint, source, tmp_path / "y.eam.safetensors")
        assert header.recovery is not None and header.recovery.after.kl <= header.recovery.before.kl


# --- what is refused ------------------------------------------------------------------------------------------------


def test_nothing_frozen_is_said(tiny_weights: Path, pictures: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "x.eam.safetensors"
    options = FreezeOptions(sparsity=0, score="random")
    freeze(ModelSpec(NAME, str(tiny_weights), KWARGS), ImageSource(pictures), checkpoint, options)
    with pytest.raises(ConfigError, match="nothing to recover from"):
        recover(checkpoint, ImageSource(pictures), tmp_path / "y.eam.safetensors")


def test_what_has_recovered_does_not_recover_again(recovered: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has recovered already"):
        recover(recovered, ImageSource(pictures), tmp_path / "z.eam.safetensors")


@pytest.mark.parametrize("limit", [1, 0])
def test_one_image_is_too_few(eam_checkpoint: Path, pictures: Path, tmp_path: Path, limit: int) -> None:
    with pytest.raises(ConfigError, match="at least"):
        recover(eam_checkpoint, ImageSource(pictures, limit=limit), tmp_path / "y.eam.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_two_images_do(eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    header = recover(eam_checkpoint, ImageSource(pictures, limit=2), tmp_path / "y.eam.safetensors")
    assert header.recovery is not None and header.recovery.after.kl <= header.recovery.before.kl


def test_bad_images_may_leave_too_few(eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(4):
        (photos / f"{index}.png").write_bytes(b"no picture")
    (photos / "0.png").write_bytes((pictures / "000.png").read_bytes())
    with pytest.raises(ConfigError, match="too few images"):
        recover(eam_checkpoint, ImageSource(photos, skip_bad=True), tmp_path / "y.eam.safetensors")
    with pytest.raises(ConfigError, match="cannot use image"):
        recover(eam_checkpoint, ImageSource(photos), tmp_path / "y.eam.safetensors")


@pytest.mark.parametrize("share", [0.0, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(eam_checkpoint: Path, pictures: Path, tmp_path: Path, share: float) -> None:
    with pytest.raises(ConfigError, match="held back"):
        recover(eam_checkpoint, ImageSource(pictures), tmp_path / "y", RecoverOptions(held_back=share))


def test_the_input_is_not_replaced(eam_checkpoint: Path, pictures: Path) -> None:
    with pytest.raises(ConfigError, match="would replace the input"):
        recover(eam_checkpoint, ImageSource(pictures), eam_checkpoint)


def test_an_interruption_leaves_what_was_there(
    eam_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "y.eam.safetensors"
    output.write_text("of before")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(solving, "best_correction", interrupt)
    with pytest.raises(KeyboardInterrupt):
        recover(eam_checkpoint, ImageSource(pictures), output)
    assert [file.name for file in tmp_path.iterdir()] == [output.name] and output.read_text() == "of before"


# --- what a recovered model is compared with --------------------------------------------------------------------------


def test_evaluation_never_takes_changed_weights_for_the_teacher(
    recovered: Path, eam_checkpoint: Path, pictures: Path
) -> None:
    source = ImageSource(pictures)
    with pytest.raises(ConfigError, match=r"no reference.*--live"):
        evaluate(recovered, source)
    with pytest.raises(ConfigError, match="no reference"):
        evaluate(eam_checkpoint, source, reference=recovered, live=True)
    before, after = (
        evaluate(each, source, reference=eam_checkpoint, live=True) for each in (eam_checkpoint, recovered)
    )
    assert before.kl is not None and after.kl is not None and after.kl < before.kl
    assert before.kl == evaluate(eam_checkpoint, source).kl
    assert after.reference_all_live and not after.reference_is_live and after.reference == str(eam_checkpoint)
    frozen = evaluate(recovered, source, reference=eam_checkpoint)
    assert not frozen.reference_all_live and frozen.kl != after.kl


def test_live_is_about_a_checkpoint(recovered: Path, eam_model: Path, pictures: Path) -> None:
    for reference in (None, eam_model):
        with pytest.raises(ConfigError, match="--live is about a checkpoint"):
            evaluate(recovered, ImageSource(pictures), reference=reference, live=True)


def test_the_twin_is_the_teacher_where_it_is_given(
    recovered: Path, eam_checkpoint: Path, eam_model: Path, pictures: Path, tmp_path: Path
) -> None:
    source, notebook = ImageSource(pictures), Notebook()
    model, twin, stock = (tmp_path / f"{name}.onnx" for name in ("y", "twin", "stock"))
    export(recovered, model, baseline=twin, stock=stock, teacher=eam_checkpoint, images=source, observer=notebook)
    teachers = ReferenceSet.load(reference_path(eam_model.with_name("base.onnx"))).logits
    for path in (twin, stock):
        np.testing.assert_allclose(ReferenceSet.load(reference_path(path)).logits, teachers, atol=1e-6)
    assert not any("recovered weights" in note for note in notebook.notes)
    found = evaluate(engine(model), source, reference=engine(twin))
    ours = evaluate(recovered, source, reference=eam_checkpoint, live=True)
    assert found.kl == pytest.approx(ours.kl, rel=1e-3) and found.agreement == ours.agreement


def test_a_twin_with_recovered_weights_is_for_timing_only(recovered: Path, pictures: Path, tmp_path: Path) -> None:
    source, notebook = ImageSource(pictures), Notebook()
    model, twin = tmp_path / "y.onnx", tmp_path / "twin.onnx"
    export(recovered, model, baseline=twin, images=source, observer=notebook)
    assert any("give --teacher" in note for note in notebook.notes)
    with pytest.raises(ConfigError, match="no reference"):
        evaluate(engine(model), source, reference=engine(twin))


def engine(model: Path) -> Path:
    output = model.with_suffix(".ort.onnx")
    build_ort(model, output)
    return output


def test_another_checkpoint_is_no_teacher(
    recovered: Path, eam_checkpoint: Path, tiny_weights: Path, pictures: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.eam.safetensors"
    freeze(
        ModelSpec(NAME, str(tiny_weights), KWARGS), ImageSource(pictures), other, FreezeOptions(score="random", seed=9)
    )
    with pytest.raises(ConfigError, match="was not made of"):
        export(recovered, tmp_path / "y.onnx", teacher=other)
    with pytest.raises(ConfigError, match="its own teacher"):
        export(eam_checkpoint, tmp_path / "x.onnx", teacher=other)


# --- where it is shown ----------------------------------------------------------------------------------------------


def test_the_command_line_shows_what_changed(
    run_cli: RunCli, eam_checkpoint: Path, recovered: Path, pictures: Path, tmp_path: Path
) -> None:
    output = tmp_path / "y.eam.safetensors"
    done = run_cli("recover", eam_checkpoint, "--data", pictures, "-o", output, "--json")
    header = CheckpointHeader.model_validate_json(done.out)
    assert header.recovery == checkpoints.load(recovered).header.recovery
    assert "blocks.0.attn.proj" in done.err and "against the unfrozen model on 5 other images" in done.err
    refused = run_cli("recover", output, "--data", pictures, "-o", tmp_path / "z")
    assert "has recovered already" in only_error(refused, ExitCode.BAD_INPUT)


def test_inspect_and_report_say_that_it_recovered(recovered: Path, eam_checkpoint: Path, tmp_path: Path) -> None:
    assert "have new weights" in str(inspect(recovered).details["recovery"])
    page = tmp_path / "report.html"
    written = report([eam_checkpoint, recovered], page)
    assert len(written.models) == 1, "the teacher's checkpoint is no model of its own"
    text = page.read_text()
    assert "recovered (solve): agreement" in text
    assert "eamdeploy recover" in text and "eamdeploy freeze" in text


def test_heads_of_low_rank_recover_too_and_keep_their_factors(
    tiny_weights: Path, pictures: Path, tmp_path: Path
) -> None:
    frozen, output = tmp_path / "x.eam.safetensors", tmp_path / "y.eam.safetensors"
    options = FreezeOptions(sparsity=0.5, score="random", seed=3, rank="1")
    freeze(ModelSpec(NAME, str(tiny_weights), KWARGS), ImageSource(pictures), frozen, options)
    header = recover(frozen, ImageSource(pictures), output)
    before, after = checkpoints.load(frozen), checkpoints.load(output)
    assert before.frozen == {} and before.factors.keys() == after.factors.keys() != set()
    for path, groups in before.factors.items():
        for old, new in zip(groups, after.factors[path], strict=True):
            assert np.array_equal(old.mix_codes, new.mix_codes)
            assert np.array_equal(old.pool_codes, new.pool_codes)
    assert header.recovery is not None and header.recovery.n_changed > 0
    assert header.recovery.after.kl < header.recovery.before.kl
    export(output, tmp_path / "y.onnx", teacher=frozen, exporter="torchscript")
