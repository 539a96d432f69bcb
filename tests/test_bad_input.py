"""Bad input gets one clear line and exit code 2; what was there before survives, and nothing half-written is left."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import RunCli, only_error
from foreign_files import Trap
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import KWARGS, NAME, SWIN_KWARGS, SWIN_NAME, make_model, save_weights

from eamdeploy import freeze as freeze_model
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.host.model import ModelSpec
from eamdeploy.images.source import ImageSource

MODEL = ["--model", NAME, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
FAST = ["--score", "variance"]
OLD = b"what was there before"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder where every output has an older version."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("x.eam.safetensors", "x.onnx", "x.reference.npz", "x.ort.onnx", "x.ort.onnx.json", "x.json"):
        (folder / name).write_bytes(OLD)
    return folder


def assert_untouched(out: Path) -> None:
    files = {file.name: file.read_bytes() for file in out.iterdir()}
    assert set(files) == {"x.eam.safetensors", "x.onnx", "x.reference.npz", "x.ort.onnx", "x.ort.onnx.json", "x.json"}
    assert set(files.values()) == {OLD}


def freeze(weights: object, data: object, out: Path, *more: object) -> list[object]:
    """The words of a `freeze` command."""
    return ["freeze", *MODEL, "--weights", weights, "--data", data, "-o", out / "x.eam.safetensors", *FAST, *more]


# --- weights ---------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def make_foreign(file: Path) -> None:
    file.write_bytes(b"<!DOCTYPE html><html>404</html>" * 40)


def deepen(file: Path) -> None:
    save_weights(make_model(changes={"depth": 3}), file)


def add_classes(file: Path) -> None:
    save_weights(make_model(changes={"num_classes": 12}), file)


def put_nan(file: Path) -> None:
    state = load_file(file)
    state["blocks.0.mlp.fc1.weight"][3, 4] = np.nan
    save_file(state, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            truncate,
            r"cannot read weights from \S*w\.safetensors: it begins as a safetensors file, and is damaged\. .*cut off",
        ),
        (
            make_foreign,
            r"cannot read weights from \S*w\.safetensors; .*got a web page \(HTML\)\. Download the file itself",
        ),
        (deepen, r"w\.safetensors does not fit.*expected its 32 tensors; got 12 unknown, first blocks\.2\..*--model"),
        (add_classes, r"head\.weight and 1 more; expected shape \[10, 48\]; got \[12, 48\].*num_classes=12"),
        (put_nan, r"w\.safetensors: blocks\.0\.mlp\.fc1\.weight has NaN or infinite values"),
    ],
)
def test_bad_weights(
    run_cli: RunCli,
    tiny_weights: Path,
    pictures: Path,
    tmp_path: Path,
    out: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    weights = tmp_path / "w.safetensors"
    shutil.copy(tiny_weights, weights)
    damage(weights)
    assert re.search(message, only_error(run_cli(*freeze(weights, pictures, out)), 2))
    assert_untouched(out)


def test_pth_that_wants_unpickling_is_refused_and_not_run(
    run_cli: RunCli, pictures: Path, tmp_path: Path, out: Path
) -> None:
    weights, mark = tmp_path / "w.pth", tmp_path / "mark"
    torch.save({"model": make_model().state_dict(), "args": Trap(mark)}, weights)
    line = only_error(run_cli(*freeze(weights, pictures, out)), 2)
    assert re.search(r"w\.pth wants unpickling, which can run code, and is not loaded.*foreign_files\.spring", line)
    assert not mark.exists()
    assert_untouched(out)
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap does not work, so this test shows nothing"


# --- EAM checkpoints -------------------------------------------------------------------------------------------------


def edit_checkpoint(
    file: Path, tensors: Callable[[dict[str, Any]], None] | None = None, header: dict[str, Any] | None = None
) -> None:
    """Changes tensors or the header of the EAM checkpoint in `file`; keys of `header` may be `a.b`."""
    arrays = load_file(file)
    with safe_open(file, framework="numpy") as opened:
        document = json.loads(opened.metadata()["eam"])
    if tensors is not None:
        tensors(arrays)
    for key, value in (header or {}).items():
        *parents, last = key.split(".")
        place = document
        for parent in parents:
            place = place[parent]
        place[last] = value
    save_file(arrays, file, metadata={"eam": json.dumps(document)})


def scale_rows(arrays: dict[str, Any]) -> None:
    arrays["eam.blocks.1.attn.scales"][1, 4] *= np.float32(1.001)


def weight_nan(arrays: dict[str, Any]) -> None:
    arrays["model.norm.weight"][3] = np.nan


def drop_weight(arrays: dict[str, Any]) -> None:
    del arrays["model.norm.weight"]


CHECKPOINT_DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncate, r"c\.eam\.safetensors is damaged or no safetensors file"),
    "foreign": (make_foreign, r"c\.eam\.safetensors is damaged or no safetensors file"),
    "rows": (
        lambda file: edit_checkpoint(file, scale_rows),
        r"blocks\.1\.attn: 1 of 34 rows do not sum to 1.*1\.001 at",
    ),
    "NaN": (lambda file: edit_checkpoint(file, weight_nan), r"c\.eam\.safetensors: model\.norm\.weight is not finite"),
    "bits": (
        lambda file: edit_checkpoint(file, header={"freezing.bits": 3}),
        r"eam\.blocks\.0\.attn\.codes has the wrong size; expected uint8 \[109\] for 3-bit codes",
    ),
    "sparsity": (lambda file: edit_checkpoint(file, header={"freezing.sparsity": 0.7}), r"sparsity; expected 0\.5"),
    "format": (
        lambda file: edit_checkpoint(file, header={"format": 4}),
        r"unknown checkpoint format; expected format 1 or 2",
    ),
    "header": (lambda file: edit_checkpoint(file, header={"colour": 1}), r"CheckpointHeader: colour: Extra inputs"),
}


@pytest.mark.parametrize("command", ["export", "evaluate", "inspect"])
@pytest.mark.parametrize(("damage", "message"), CHECKPOINT_DAMAGE.values(), ids=CHECKPOINT_DAMAGE.keys())
def test_bad_checkpoint(
    run_cli: RunCli,
    eam_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    out: Path,
    command: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    checkpoint = tmp_path / "c.eam.safetensors"
    shutil.copy(eam_checkpoint, checkpoint)
    damage(checkpoint)
    more = {"export": ["-o", out / "x.onnx"], "evaluate": ["--data", pictures, "-o", out / "x.json"], "inspect": []}
    assert re.search(message, only_error(run_cli(command, checkpoint, "--no-verify", *more[command]), 2))
    assert_untouched(out)


def flip_bit(file: Path) -> None:
    """The lowest bit of a weight."""
    raw = bytearray(file.read_bytes())
    data = 8 + int.from_bytes(raw[:8], "little")
    raw[data + json.loads(raw[8:data])["model.norm.weight"]["data_offsets"][0]] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [flip_bit, lambda file: edit_checkpoint(file, header={"preprocessing.crop_pct": 0.8})],
    ids=["weight", "header"],
)
def test_checkpoint_that_was_altered_is_refused_unless_that_is_asked_for(
    run_cli: RunCli,
    eam_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    out: Path,
    damage: Callable[[Path], None],
) -> None:
    checkpoint = tmp_path / "c.eam.safetensors"
    shutil.copy(eam_checkpoint, checkpoint)
    damage(checkpoint)
    new = tmp_path / "new"
    new.mkdir()
    commands: dict[str, list[Any]] = {
        "export": ["--exporter", "torchscript", "--no-measure", "-o", "x.onnx"],
        "evaluate": ["--data", pictures, "--images", 2, "-o", "x.json"],
        "inspect": [],
        "report": ["-o", "x.html"],
    }
    for command, more in commands.items():
        line = only_error(run_cli(command, checkpoint, *more[:-1], *(out / name for name in more[-1:])), 2)
        assert re.search(r"c\.eam\.safetensors was damaged or altered.*--no-verify", line), command
        assert_untouched(out)
        done = run_cli(command, checkpoint, *more[:-1], *(new / name for name in more[-1:]), "--no-verify")
        assert done.code == 0, (command, done)


@pytest.mark.parametrize("verify", ["--verify", "--no-verify"])
def test_checkpoint_of_before_is_read_as_ever(run_cli: RunCli, verify: str, tmp_path: Path) -> None:
    new, old = Path(__file__).parents[1] / "models" / "digits_deit.eam.safetensors", tmp_path / "old.eam.safetensors"
    with safe_open(new, framework="numpy") as file:
        header = json.loads(file.metadata()["eam"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    del header["content_digest"], header["freezing"]["cost"]
    save_file(tensors, old, metadata={"eam": json.dumps({**header, "format": 1})})
    done = run_cli("inspect", old, verify, "--json")
    assert done.code == 0
    assert json.loads(done.out)["details"]["unaltered"] == "not known: the file records no digest of its contents"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": {"timm_kwargs.depth": 3}}, r"does not fit the model; .*got 12 missing, first blocks\.2\."),
        (
            {"header": {"timm_kwargs.num_classes": 7}},
            r"head\.weight and 1 more; expected shape \[7, 48\]; got \[10, 48\]",
        ),
        (
            {"header": {"timm_model": "swin_tiny_patch4_window7_224"}},
            r"cannot make swin_tiny|does not fit|not supported",
        ),
        ({"header": {"timm_model": "nosuch"}}, r"has no model 'nosuch'"),
        ({"tensors": drop_weight}, r"does not fit the model; .*got 1 missing, first norm\.weight"),
    ],
    ids=["depth", "classes", "swin", "unknown model", "missing weight"],
)
def test_checkpoint_of_another_architecture(
    run_cli: RunCli, eam_checkpoint: Path, tmp_path: Path, out: Path, change: dict[str, Any], message: str
) -> None:
    checkpoint = tmp_path / "c.eam.safetensors"
    shutil.copy(eam_checkpoint, checkpoint)
    edit_checkpoint(checkpoint, **change)
    assert re.search(message, only_error(run_cli("export", checkpoint, "--no-verify", "-o", out / "x.onnx"), 2))
    assert_untouched(out)


def test_plain_weights_are_no_checkpoint(run_cli: RunCli, tiny_weights: Path, out: Path) -> None:
    line = only_error(run_cli("export", tiny_weights, "-o", out / "x.onnx"), 2)
    assert "tiny.safetensors is no EAM checkpoint" in line and "eamdeploy freeze" in line
    assert_untouched(out)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swin_checkpoint(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A tiny Swin with a frozen map for each class of windows."""
    folder = tmp_path_factory.mktemp("swin")
    weights = save_weights(make_model(SWIN_NAME), folder / "swin.safetensors")
    options = FreezeOptions(sparsity=0.6, score="random", window_maps="class")
    checkpoint = folder / "swin.eam.safetensors"
    freeze_model(ModelSpec(SWIN_NAME, str(weights), SWIN_KWARGS), ImageSource(pictures), checkpoint, options)
    return checkpoint


@pytest.mark.parametrize("command", ["export", "evaluate"])
@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([0, 1, 2, 2], r"codes has the wrong size; expected uint8 \[768\] for 4-bit codes \[2, 3, 16, 16\]"),
        ([0, 1, 3, 2], r"windows of layers\.0\.blocks\.1\.attn \(window_maps: class\)"),
        ([1, 2, 3, 4], "the numbers 0…M − 1"),
        ([0, 1, 2, 3, 0], r"header key freezing\.sparsity; expected 0\.61"),
    ],
    ids=["too few classes", "other classes", "no class 0", "too many windows"],
)
def test_checkpoint_whose_window_classes_do_not_fit_the_model(
    run_cli: RunCli,
    swin_checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    out: Path,
    command: str,
    windows: list[int],
    message: str,
) -> None:
    checkpoint = tmp_path / "c.eam.safetensors"
    shutil.copy(swin_checkpoint, checkpoint)
    with safe_open(checkpoint, framework="numpy") as opened:
        attention = json.loads(opened.metadata()["eam"])["attention"]
    attention["layers.0.blocks.1.attn"]["windows"] = windows
    edit_checkpoint(checkpoint, header={"attention": attention})
    more = {"export": ["-o", out / "x.onnx"], "evaluate": ["--data", pictures, "-o", out / "x.json"]}
    assert re.search(message, only_error(run_cli(command, checkpoint, "--no-verify", *more[command]), 2))
    assert_untouched(out)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (["strict_img_size=False"], "strict_img_size=False makes the windows depend on the image"),
        (["window_size=0"], "timm cannot make .*Window sizes must be positive"),
        (["depths=2"], "timm cannot make .*'depths': 2"),
    ],
    ids=["any size", "empty windows", "depths"],
)
def test_swin_arguments_that_cannot_be_used(
    run_cli: RunCli, pictures: Path, out: Path, kwargs: list[str], message: str
) -> None:
    arguments = ("--model", SWIN_NAME, "--weights", "random", "--data", pictures, "-o", out / "x.eam.safetensors")
    line = only_error(run_cli("freeze", *arguments, "--model-kwargs", "num_classes=10", *kwargs), 2)
    assert re.search(message, line)
    assert_untouched(out)


def test_swin_v2_is_refused_with_the_reason(run_cli: RunCli, pictures: Path, out: Path) -> None:
    arguments = ("--model", "swinv2_tiny_window8_256", "--weights", "random", "--data", pictures)
    line = only_error(run_cli("freeze", *arguments, "-o", out / "x.eam.safetensors"), 2)
    assert "SwinTransformerV2 are not supported" in line and "cosine similarity" in line
    assert_untouched(out)


# --- somebody's own maps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            "maps",
            np.full((1, 17, 17), 1 / 16),
            r"17 of 17 rows.*blocks\.0\.attn do not sum to 1;.*got 1\.0625 at \[0, 0\]",
        ),
        ("maps", np.full((1, 17, 17), np.nan), r"maps\.npz: blocks\.0\.attn are not finite"),
        (
            "codes",
            np.full((1, 17, 17), 16),
            r"blocks\.0\.attn\.codes out of range; expected integers in 0 … 15 \(4 bits\)",
        ),
        ("codes", np.full((1, 17, 17), -1), r"out of range; .*; got -1 … -1"),
        ("codes", np.full((1, 16, 16), 1), r"expected uint8 \[1, 17, 17\]; got uint8 \[1, 16, 16\]"),
    ],
    ids=["row sums", "NaN", "code too large", "code below 0", "tokens"],
)
def test_bad_maps(
    run_cli: RunCli, tiny_weights: Path, tmp_path: Path, out: Path, kind: str, values: Any, message: str
) -> None:
    maps = tmp_path / "maps.npz"
    np.savez(maps, **{"blocks.0.attn.heads": np.array([1]), f"blocks.0.attn.{kind}": values})
    command = ["pack", *MODEL, "--weights", tiny_weights, "--maps", maps, "-o", out / "x.eam.safetensors"]
    assert re.search(message, only_error(run_cli(*command), 2))
    assert_untouched(out)


# --- options and images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["1.01", "-0.01", "nan", "inf"])
@pytest.mark.parametrize("command", ["freeze", "analyze"])
def test_sparsity_outside_0_to_1(
    run_cli: RunCli, tiny_weights: Path, pictures: Path, out: Path, command: str, sparsity: str
) -> None:
    words = [command, *freeze(tiny_weights, pictures, out, "--sparsity", sparsity)[1:]]
    line = only_error(run_cli(*words), 2)
    assert f"sparsity; expected a number in [0, 1]; got {float(sparsity)}" in line
    assert_untouched(out)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), r"no image in \S*data or its sub-folders; expected images \(\.bmp.*; got none"),
        (lambda folder: None, r"cannot read images from \S*data; expected a folder with images.*; got nothing there"),
        (lambda folder: folder.write_text(""), r"cannot read images from \S*data; .*; got a file"),
    ],
    ids=["empty", "missing", "file"],
)
@pytest.mark.parametrize("command", ["freeze", "export", "evaluate"])
def test_folder_without_images(
    run_cli: RunCli,
    tiny_weights: Path,
    eam_checkpoint: Path,
    tmp_path: Path,
    out: Path,
    command: str,
    make: Callable[[Path], object],
    message: str,
) -> None:
    data = tmp_path / "data"
    make(data)
    commands = {
        "freeze": freeze(tiny_weights, data, out),
        "export": ["export", eam_checkpoint, "-o", out / "x.onnx", "--data", data],
        "evaluate": ["evaluate", eam_checkpoint, "--data", data, "-o", out / "x.json"],
    }
    assert re.search(message, only_error(run_cli(*commands[command]), 2))
    assert_untouched(out)


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Forty JPEGs, one of which breaks off half way, and one is none."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(40):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize((60, 50), Image.Resampling.BICUBIC).save(folder / f"{index:02}.jpg")
    truncate(folder / "17.jpg")
    return folder


def test_corrupt_jpeg_among_many_is_an_error(
    run_cli: RunCli, tiny_weights: Path, eam_engine: Path, photographs: Path, out: Path
) -> None:
    for words in (
        freeze(tiny_weights, photographs, out),
        ["evaluate", eam_engine, "--data", photographs, "-o", out / "x.json"],
    ):
        line = only_error(run_cli(*words), 2)
        assert re.search(r"cannot use image \S*photographs/17\.jpg: .*truncated.*--skip-bad", line)
        assert_untouched(out)


def test_corrupt_jpeg_among_many_is_named_counted_and_left_out(
    run_cli: RunCli, tiny_weights: Path, eam_engine: Path, photographs: Path, out: Path
) -> None:
    frozen = run_cli(*freeze(tiny_weights, photographs, out, "--skip-bad", "--json"))
    assert frozen.code == 0
    assert re.search(r"^skipped 17\.jpg: .*truncated", frozen.err, re.MULTILINE)
    assert json.loads(frozen.out)["calibration"]["n_images"] == 39
    evaluated = run_cli("evaluate", eam_engine, "--data", photographs, "--skip-bad", "--json")
    assert evaluated.code == 0 and "skipped 17.jpg" in evaluated.err
    report = json.loads(evaluated.out)
    assert (report["n_images"], report["n_skipped"], report["skipped"]) == (39, 1, ["17.jpg"])


def test_label_out_of_range(run_cli: RunCli, eam_engine: Path, pictures: Path, tmp_path: Path, out: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    rows = [f"{file.name},{10 if index == 5 else index % 10}" for index, file in enumerate(sorted(pictures.iterdir()))]
    (data / "labels.csv").write_text("\n".join(["file,label", *rows]))
    line = only_error(run_cli("evaluate", eam_engine, "--data", data, "-o", out / "x.json"), 2)
    assert re.search(
        r"the label of \S*005\.png is out of range; expected 0 to 9, as the model has 10 classes; got 10", line
    )
    assert_untouched(out)


# --- output ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def writers(
    tiny_weights: Path, pictures: Path, eam_checkpoint: Path, eam_model: Path, eam_engine: Path, tmp_path: Path
) -> dict[str, list[object]]:
    """A command of each kind that writes a file, without the `-o` at its end."""
    maps = tmp_path / "maps.npz"
    arrays: dict[str, Any] = {"heads": np.array([1]), "codes": np.ones((1, 17, 17), np.uint8)}
    np.savez(maps, **{f"blocks.0.attn.{name}": array for name, array in arrays.items()})
    weights = [*MODEL, "--weights", tiny_weights]
    quick = ["--warmup-ms", 0, "--min-seconds", 0, "--min-runs", 2, "--threads", 1, "--no-memory"]
    return {
        "freeze": ["freeze", *weights, "--data", pictures, *FAST],
        "analyze": ["analyze", *weights, "--data", pictures],
        "heatmap": ["analyze", *weights, "--data", pictures, "-o", tmp_path / "new.json"],
        "pack": ["pack", *weights, "--maps", maps],
        "export": ["export", eam_checkpoint, "--exporter", "torchscript"],
        "baseline": ["export", eam_checkpoint, "-o", tmp_path / "new.onnx", "--exporter", "torchscript"],
        "build-ort": ["build-ort", eam_model, "--threads", 1],
        "evaluate": ["evaluate", eam_engine, "--data", pictures],
        "profile": ["profile", eam_engine, *quick],
    }


OPTION = {"heatmap": "--heatmap", "baseline": "--baseline"}
SUFFIX = {
    **{"freeze": ".eam.safetensors", "pack": ".eam.safetensors", "export": ".onnx", "baseline": ".onnx"},
    **{"build-ort": ".onnx", "analyze": ".json", "evaluate": ".json", "profile": ".json", "heatmap": ".png"},
}


@pytest.mark.parametrize("command", SUFFIX)
@pytest.mark.parametrize("place", ["missing folder", "folder", "device"])
def test_output_that_cannot_be_written(
    run_cli: RunCli, writers: dict[str, list[object]], tmp_path: Path, command: str, place: str
) -> None:
    name = f"x{SUFFIX[command]}"
    target = tmp_path / "no" / name if place == "missing folder" else tmp_path / name
    if place == "folder":
        target.mkdir()
    if place == "device":
        os.mkfifo(target)
    before = sorted(tmp_path.rglob("*"))
    line = only_error(run_cli("-q", *writers[command], OPTION.get(command, "-o"), target), 2)
    got = {"missing folder": "no such folder", "folder": "an existing folder", "device": "an existing device"}[place]
    assert f"cannot write {target}; expected " in line and f"got {got}" in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["freeze", "analyze", "pack", "export", "evaluate", "profile"])
def test_output_that_is_an_input(
    run_cli: RunCli, writers: dict[str, list[object]], tmp_path: Path, command: str
) -> None:
    words = writers[command]
    after = {"freeze": "--weights", "analyze": "--weights", "pack": "--maps"}.get(command, command)
    place = words.index(after) + 1
    source = Path(str(words[place]))
    words[place] = tmp_path / f"in{source.suffix}"
    shutil.copy(source, str(words[place]))
    line = only_error(run_cli(*words, "-o", words[place]), 2)
    assert f"{words[place]} would replace the input" in line
    assert Path(str(words[place])).read_bytes() == source.read_bytes()


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Inside the block, a write beyond `n_bytes` of a file fails in the kernel, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("command", SUFFIX)
def test_disk_that_fills_up_half_way(
    run_cli: RunCli, writers: dict[str, list[object]], tmp_path: Path, command: str
) -> None:
    target = tmp_path / f"x{SUFFIX[command]}"
    target.write_bytes(OLD)
    before = sorted([*tmp_path.iterdir(), *([tmp_path / "new.json"] if command == "heatmap" else [])])
    with file_size_limit(6000 if command == "heatmap" else 300):
        line = only_error(run_cli("-q", *writers[command], OPTION.get(command, "-o"), target), 2)
    assert f"{os.strerror(errno.EFBIG)}. Check that the folder exists, is writable and has free space" in line
    assert target.read_bytes() == OLD
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["freeze", "export", "build-ort"])
def test_interrupt_while_writing(
    run_cli: RunCli,
    writers: dict[str, list[object]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    target = tmp_path / f"x{SUFFIX[command]}"
    target.write_bytes(OLD)
    before = sorted(tmp_path.iterdir())
    partial: list[str] = []

    def interrupt(descriptor: int) -> None:
        partial.extend(file.name for file in tmp_path.glob("*.partial"))
        partial.extend(file.name for file in tmp_path.glob(".*.partial"))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    outcome = run_cli(*writers[command], "-o", target)
    assert (outcome.code, outcome.out) == (130, "")
    assert partial, "nothing was half-written at that moment, so this test shows nothing"
    assert target.read_bytes() == OLD
    assert sorted(tmp_path.iterdir()) == before


def test_ctrl_c_while_freezing(pictures: Path, out: Path) -> None:
    kwargs = ["img_size=64", "patch_size=8", "embed_dim=96", "depth=12", "num_heads=12", "num_classes=10"]
    words = ["freeze", "--model", NAME, "--model-kwargs", *kwargs, "--weights", "random", "--data", pictures]
    command = [sys.executable, "-m", "eamdeploy.cli", *map(str, [*words, "-o", out / "x.eam.safetensors"])]

    def heed_ctrl_c() -> None:  # a test run in the background of a script inherits that it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        assert process.stderr.readline().startswith("sensitivity of 144 heads on 24 images: about ")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130, errors
    assert output == "" and "Traceback" not in errors
    assert_untouched(out)
