"""`recover --method distill`: from photographs without labels to a checkpoint that was trained."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import RunCli, only_error
from notebook import Notebook
from tiny_models import KWARGS, NAME, SWIN_KWARGS, SWIN_NAME, make_model, save_weights

from eamdeploy import evaluate, export, freeze, recover, report
from eamdeploy.artifacts.files import atomic_output
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.records import CheckpointHeader
from eamdeploy.eam.recovery import RecoverOptions
from eamdeploy.errors import CheckpointError, ConfigError, ExitCode
from eamdeploy.host.model import ModelSpec
from eamdeploy.images.source import ImageSource
from eamdeploy.recovery import solving, training_state
from eamdeploy.recovery.solving import Solved
from eamdeploy.recovery.student import Student
from eamdeploy.stages.inspect import inspect

OPTIONS = RecoverOptions(method="distill", epochs=3, batch=8, learning_rate=3e-4, maps_rate=0.05)
WORDS = ("--method", "distill", "--epochs", 3, "--batch", 8, "--learning-rate", 3e-4, "--maps-rate", 0.05)


@pytest.fixture(scope="module", autouse=True)
def without_solving() -> Iterator[pytest.MonkeyPatch]:
    """Training begins with the frozen model: once layers of a tiny random model are solved, little is left to learn."""

    def nothing(*words: Any, **named: Any) -> Solved:
        found = solving.solve(*words, **named)
        return Solved({}, {}, found.before, found.before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eamdeploy.stages.recover.solve", nothing)
        yield patch


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, eam_checkpoint: Path, pictures: Path) -> Path:
    output = tmp_path_factory.mktemp("distilled") / "y.eam.safetensors"
    recover(eam_checkpoint, ImageSource(pictures), output, OPTIONS)
    return output


def test_weights_and_maps_have_learnt(distilled: Path, eam_checkpoint: Path) -> None:
    before, after = checkpoints.load(eam_checkpoint), checkpoints.load(distilled)
    found = after.header.recovery
    assert found is not None and found.method == "distill" and found.teacher == before.header.content_digest
    assert (found.n_images, found.n_held_back) == (24, 5)
    training = found.training
    assert training is not None and (training.steps, training.batch, training.epochs_asked) == (6, 8, 3)
    assert len(training.epochs) == 3 and training.stopped is None
    assert training.kept_epoch > 0
    kept = training.epochs[training.kept_epoch - 1]
    assert (found.after.kl, found.after.agreement) == (kept.kl, kept.agreement)
    assert found.after.kl < 0.8 * found.before.kl
    changed = [name for name, weight in before.weights.items() if not np.array_equal(weight, after.weights[name])]
    assert len(changed) > 0.9 * len(before.weights)
    assert all(after.weights[name].dtype == weight.dtype for name, weight in before.weights.items())
    for path, maps in before.frozen.items():
        assert not np.array_equal(maps.codes, after.frozen[path].codes)
        assert np.array_equal(maps.heads, after.frozen[path].heads)
    unlike = {"content_digest", "recovery"}
    assert before.header.model_dump(exclude=unlike) == after.header.model_dump(exclude=unlike)
    assert list(distilled.parent.iterdir()) == [distilled], "nothing of the training is left"


def test_what_was_checked_is_what_was_written(distilled: Path, eam_checkpoint: Path, pictures: Path) -> None:
    """All pictures, those that were held back among them, are nearer to the teacher."""
    before, after = (
        evaluate(each, ImageSource(pictures), reference=eam_checkpoint, live=True)
        for each in (eam_checkpoint, distilled)
    )
    assert before.kl is not None and after.kl is not None and after.kl < before.kl


def test_it_is_exported_like_any_other(distilled: Path, eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "y.onnx"
    export(distilled, output, teacher=eam_checkpoint, images=ImageSource(pictures))
    assert output.is_file()
    assert "3 epochs of 8 images a step" in str(inspect(distilled).details["recovery"])


def test_the_seed_decides(distilled: Path, eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    again, other = tmp_path / "again.eam.safetensors", tmp_path / "other.eam.safetensors"
    recover(eam_checkpoint, ImageSource(pictures), again, OPTIONS)
    assert again.read_bytes() == distilled.read_bytes()
    recover(eam_checkpoint, ImageSource(pictures), other, replace(OPTIONS, seed=1))
    assert other.read_bytes() != distilled.read_bytes()


FROZEN = {
    "rows": FreezeOptions(sparsity=0.6, score="random", granularity="row"),
    "entries": FreezeOptions(sparsity=0.9, score="random", granularity="entry", bits=8, quantizer="uniform"),
    "low rank": FreezeOptions(sparsity=0.6, score="random", rank="3"),
}


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_every_kind_of_frozen_piece_learns(kind: str, family: str, pictures: Path, tmp_path: Path) -> None:
    name, kwargs = (NAME, KWARGS) if family == "vit" else (SWIN_NAME, SWIN_KWARGS)
    weights = save_weights(make_model(name), tmp_path / "w.safetensors")
    checkpoint, output, source = tmp_path / "x.eam.safetensors", tmp_path / "y.eam.safetensors", ImageSource(pictures)
    options = replace(FROZEN[kind], window_maps="class")
    freeze(ModelSpec(name, str(weights), kwargs), source, checkpoint, options)
    header = recover(checkpoint, source, output, replace(OPTIONS, epochs=5))
    before, after = checkpoints.load(checkpoint), checkpoints.load(output)
    assert header.recovery is not None and header.recovery.training is not None
    assert header.recovery.training.kept_epoch > 0
    moved = [not np.array_equal(maps.codes, after.frozen[path].codes) for path, maps in before.frozen.items()]
    for path, groups in before.factors.items():
        moved += [
            not (np.array_equal(group.mix_codes, then.mix_codes) or np.array_equal(group.pool_codes, then.pool_codes))
            for group, then in zip(groups, after.factors[path], strict=True)
        ]
    assert moved and all(moved)


def test_training_begins_with_the_solved_layers(
    without_solving: pytest.MonkeyPatch, eam_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    source, output = ImageSource(pictures), tmp_path / "y.eam.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eamdeploy.stages.recover.solve", solving.solve)
        solved = recover(eam_checkpoint, source, tmp_path / "s.eam.safetensors").recovery
        header = recover(eam_checkpoint, source, output, replace(OPTIONS, learning_rate=1e-9, maps_rate=1e-9))
    found = header.recovery
    assert solved is not None and found is not None and found.training is not None
    assert found.layers == solved.layers and found.before == solved.before
    assert found.training.epochs[0].kl == pytest.approx(solved.after.kl, rel=1e-3)


def test_weights_of_half_precision_stay_so(pictures: Path, tmp_path: Path, eam_checkpoint: Path) -> None:
    loaded = checkpoints.load(eam_checkpoint)
    half = {
        name: weight.astype(np.float16) if weight.dtype == np.float32 else weight
        for name, weight in loaded.weights.items()
    }
    checkpoint, output = tmp_path / "x.eam.safetensors", tmp_path / "y.eam.safetensors"
    checkpoints.save(replace(loaded, weights=half), checkpoint)
    header = recover(checkpoint, ImageSource(pictures), output, OPTIONS)
    after = checkpoints.load(output)
    assert {str(weight.dtype) for weight in after.weights.values()} == {"float16"}
    assert header.recovery is not None and header.recovery.after.kl < header.recovery.before.kl


# --- what can go wrong ----------------------------------------------------------------------------------------------


class Interrupting(Notebook):
    """Presses Ctrl-C once `text` is noted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def progress(self, what: str, done: int, total: int) -> None:
        super().progress(what, done, total)
        if what == "images learnt from" and any(self._text in note for note in self.notes):
            raise KeyboardInterrupt


def test_an_interrupted_training_goes_on(distilled: Path, eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    output, source = tmp_path / "y.eam.safetensors", ImageSource(pictures)
    output.write_text("of before")
    first = Interrupting("epoch 2 of 3")
    with pytest.raises(KeyboardInterrupt):
        recover(eam_checkpoint, source, output, OPTIONS, observer=first)
    assert output.read_text() == "of before"
    (state,) = [file for file in tmp_path.iterdir() if file != output]
    assert f"goes on from the last epoch, which is in {state}" in first.notes[-1]
    second = Notebook()
    recover(eam_checkpoint, source, output, OPTIONS, observer=second)
    assert any("goes on after epoch 2 of 3" in note for note in second.notes)
    assert output.read_bytes() == distilled.read_bytes(), "as if nothing had happened"
    assert list(tmp_path.iterdir()) == [output]


def test_another_training_does_not_take_it_for_its_own(eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    output, source = tmp_path / "y.eam.safetensors", ImageSource(pictures)
    with pytest.raises(KeyboardInterrupt):
        recover(eam_checkpoint, source, output, OPTIONS, observer=Interrupting("epoch 1 of 3"))
    (state,) = tmp_path.iterdir()
    notebook = Notebook()
    recover(eam_checkpoint, source, output, replace(OPTIONS, epochs=1), observer=notebook)
    assert not any("goes on" in note for note in notebook.notes)
    assert set(tmp_path.iterdir()) == {output, state}, "the other one can still go on"


def test_a_damaged_state_is_not_gone_on_from(
    distilled: Path, eam_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    output, source = tmp_path / "y.eam.safetensors", ImageSource(pictures)
    with pytest.raises(KeyboardInterrupt):
        recover(eam_checkpoint, source, output, OPTIONS, observer=Interrupting("epoch 1 of 3"))
    (state,) = tmp_path.iterdir()
    state.write_bytes(state.read_bytes()[:5000])
    recover(eam_checkpoint, source, output, OPTIONS)
    assert output.read_bytes() == distilled.read_bytes()


def test_a_training_that_diverges_keeps_the_best_model(eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    output, notebook = tmp_path / "y.eam.safetensors", Notebook()
    wild = replace(OPTIONS, learning_rate=1e20)
    header = recover(eam_checkpoint, ImageSource(pictures), output, wild, observer=notebook)
    found = header.recovery
    assert found is not None and found.training is not None and found.training.stopped is not None
    assert found.training.kept_epoch == 0 and found.after == found.before
    assert any("diverged and was stopped" in note and "the model of before is kept" in note for note in notebook.notes)
    before, after = checkpoints.load(eam_checkpoint), checkpoints.load(output)
    assert all(np.array_equal(weight, after.weights[name]) for name, weight in before.weights.items())
    assert all(np.array_equal(maps.codes, after.frozen[path].codes) for path, maps in before.frozen.items())


def test_divergence_in_a_later_epoch_keeps_an_earlier_one(
    eam_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = Student.learn

    def broken(self: Student, *args: Any) -> float:
        loss = learn(self, *args)
        return loss if self.steps <= 4 else float("nan")

    monkeypatch.setattr(Student, "learn", broken)
    header = recover(eam_checkpoint, ImageSource(pictures), tmp_path / "y.eam.safetensors", OPTIONS)
    training = header.recovery.training if header.recovery is not None else None
    assert training is not None and training.stopped == "the loss of step 5 was nan"
    assert len(training.epochs) == 2 and training.kept_epoch in (1, 2)


def test_a_full_disk_leaves_the_last_epoch(
    eam_checkpoint: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def full(path: Path) -> Any:
        if len(written) > 1:
            raise ConfigError(f"cannot write {path}: No space left on device")
        written.append(path)
        return atomic_output(path)

    monkeypatch.setattr(training_state, "atomic_output", full)
    output, source = tmp_path / "y.eam.safetensors", ImageSource(pictures)
    with pytest.raises(ConfigError, match="No space left"):
        recover(eam_checkpoint, source, output, OPTIONS)
    monkeypatch.undo()
    assert set(tmp_path.iterdir()) == set(written)
    notebook = Notebook()
    recover(eam_checkpoint, source, output, OPTIONS, observer=notebook)
    assert any("goes on after epoch 1 of 3" in note for note in notebook.notes)


@pytest.mark.parametrize("method", ["solve", "distill"])
def test_numbers_that_are_not_finite_are_found_where_they_arise(
    method: Any, eam_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    loaded = checkpoints.load(eam_checkpoint)
    huge = dict(loaded.weights)
    huge["blocks.1.mlp.fc1.weight"] = np.full_like(huge["blocks.1.mlp.fc1.weight"], 3e38)
    checkpoint = tmp_path / "x.eam.safetensors"
    checkpoints.save(replace(loaded, weights=huge), checkpoint)
    with pytest.raises(CheckpointError, match=r"blocks\.1(\.mlp\.fc2)? gives values that are not finite"):
        recover(checkpoint, ImageSource(pictures), tmp_path / "y", replace(OPTIONS, method=method))
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"epochs": 0}, "epochs of recovery"),
        ({"batch": 0}, "batch of recovery"),
        ({"seed": -1}, "seed of recovery"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": float("nan")}, "learning rate"),
        ({"maps_rate": -1.0}, "rate of the maps"),
        ({"device": "tpu"}, "cannot train there"),
        ({"device": "cuda"}, "cannot train on a GPU"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    change: dict[str, Any], match: str, eam_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        recover(eam_checkpoint, ImageSource(pictures), tmp_path / "y", replace(OPTIONS, **change))


def test_one_image_is_too_few_and_two_do(eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "y.eam.safetensors"
    with pytest.raises(ConfigError, match="too few images"):
        recover(eam_checkpoint, ImageSource(pictures, limit=1), output, OPTIONS)
    header = recover(eam_checkpoint, ImageSource(pictures, limit=2), output, OPTIONS)
    assert header.recovery is not None and header.recovery.training is not None
    assert header.recovery.training.batch == 1, "there is one image to learn from"


# --- several processes ----------------------------------------------------------------------------------------------


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "eamdeploy.cli"]
    command = [sys.executable, *start, *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env={**os.environ})


def test_two_processes_learn_what_one_does(eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    alone, output = tmp_path / "x.eam.safetensors", tmp_path / "y.eam.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eamdeploy.stages.recover.solve", solving.solve)
        recover(eam_checkpoint, ImageSource(pictures), alone, OPTIONS)
    done = torchrun("recover", eam_checkpoint, "--data", pictures, "-o", output, *WORDS, "--json")
    assert done.returncode == 0, done.stderr
    header = CheckpointHeader.model_validate_json(done.stdout)
    one, two = checkpoints.load(alone), checkpoints.load(output)
    assert header.recovery == two.header.recovery and one.header.recovery is not None
    assert header.recovery is not None and header.recovery.training is not None
    assert header.recovery.training.steps == 6
    assert one.header.recovery.training is not None
    for first, second in zip(one.header.recovery.training.epochs, header.recovery.training.epochs, strict=True):
        assert second.loss == pytest.approx(first.loss, rel=1e-4)
        assert second.kl == pytest.approx(first.kl, rel=1e-2)
    for name, weight in one.weights.items():
        a, b = (
            np.delete(each, slice(48, 96)) if name.endswith("qkv.bias") else each
            for each in (weight, two.weights[name])
        )
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5, err_msg=name)  # a key's bias has no gradient but rounding
    for path, maps in one.frozen.items():
        assert np.mean(maps.codes != two.frozen[path].codes) < 0.01
    assert header.recovery.after.kl == pytest.approx(one.header.recovery.after.kl, rel=1e-2)
    assert set(tmp_path.iterdir()) == {alone, output}


def test_what_processes_cannot_share_is_said(eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    for words, expected in (
        (("--method", "distill", "--batch", 9), "a batch can't be shared among the processes"),
        (("--method", "solve"), "solve is the work of one process"),
    ):
        done = torchrun("recover", eam_checkpoint, "--data", pictures, "-o", tmp_path / "y", *words)
        assert done.returncode != 0 and expected in done.stderr


# --- where it is shown ----------------------------------------------------------------------------------------------


def test_the_command_line_shows_every_epoch(
    run_cli: RunCli, eam_checkpoint: Path, distilled: Path, pictures: Path, tmp_path: Path
) -> None:
    words = ("recover", eam_checkpoint, "--data", pictures, "-o", tmp_path / "y.eam.safetensors")
    done = run_cli(*words, *WORDS)
    assert "epoch" in done.out and "3 epochs of 8 images a step" in done.out
    assert done.err.count("epoch ") == 3
    assert (tmp_path / "y.eam.safetensors").read_bytes() == distilled.read_bytes()
    refused = run_cli(*words, "--method", "distill", "--epochs", 0)
    assert "epochs of recovery" in only_error(refused, ExitCode.BAD_INPUT)


def test_the_report_says_how_it_was_trained(eam_checkpoint: Path, distilled: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    report([eam_checkpoint, distilled], page)
    text = page.read_text()
    assert "recovered (distill): agreement" in text
    assert "--method distill" in text and "--epochs 3 --batch 8 --learning-rate 0.0003 --maps-rate 0.05" in text
