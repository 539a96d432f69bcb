from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from report_records import (
    analysis,
    board_profile,
    card,
    device_build,
    digest,
    engine,
    evaluation,
    export,
    freezing,
    manifest,
    on_jetson,
    profile,
    remote_profiles,
    rich_records,
    write_all,
)

from eamdeploy.artifacts.records import Record
from eamdeploy.artifacts.run_state import RunState, StageState
from eamdeploy.cli import app as cli
from eamdeploy.cli.options import split_model_kwargs
from eamdeploy.engines.manifest import CalibratedProducts
from eamdeploy.records.evaluation import EvaluatedImages
from eamdeploy.remote.profile import RemoteProfiles
from eamdeploy.reporting.prose.command_line import Command
from eamdeploy.reporting.prose.reproduce import commands
from eamdeploy.reporting.records.sources import read_sources

CALIBRATED = CalibratedProducts(products=24, method="percentile", images=8, folder="photos")


def images(folder: str = "photos", **changes: Any) -> EvaluatedImages:
    made = EvaluatedImages(folder=folder, split="all", limit=None, exif_transpose=False)
    return made.model_copy(update=changes)


def commands_of(folder: Path, records: dict[str, Record], monkeypatch: pytest.MonkeyPatch) -> list[Command]:
    write_all(folder, records)
    monkeypatch.chdir(folder)
    return commands(read_sources([Path(name) for name in records]))


@pytest.mark.parametrize(
    ("record", "text", "unknown"),
    [
        (
            profile([engine("x", None, 1.0), engine("y z", None, 1.0)], engine("b", None, 1.0)),
            "eamdeploy profile x 'y z' --baseline b --device cpu --threads 4 --batch 1 --warmup-ms 200.0 "
            "--min-seconds 3.0 --min-runs 50 --sittings 5 -o r.json",
            "whether --no-power was given",
        ),
        (
            profile([engine("x", None, 1.0, memory=None)]),
            "eamdeploy profile x --device cpu --threads 4 --batch 1 --warmup-ms 200.0 --min-seconds 3.0 --min-runs 50 "
            "--sittings 5 --no-memory -o r.json",
            "whether --no-power was given",
        ),
        (
            board_profile([on_jetson("x.plan", None, 2.0, 8000)], None),
            "eamdeploy profile x.plan --device jetson --threads 1 --batch 1 --streams 2 --warmup-ms 200.0 "
            "--min-seconds 3.0 --min-runs 50 --sittings 5 --layer-profile -o r.json",
            "--power-seconds",
        ),
        (
            remote_profiles(),
            "eamdeploy profile out/model.plan --baseline out/base.plan --device ssh://nvidia@orin.lan "
            "--device ssh://agx.lan:2222 --device ssh://pi5 --threads 1 --batch 1 --streams 2 --warmup-ms 200.0 "
            "--min-seconds 3.0 --min-runs 50 --sittings 5 --layer-profile -o r.json",
            "--remote-command, --ssh-config; --power-seconds",
        ),
        (
            RemoteProfiles(profiles={}, failures=remote_profiles().failures),
            "eamdeploy profile ENGINE --device ssh://pi5 -o r.json",
            "the engines and all options; --remote-command, --ssh-config",
        ),
        (
            evaluation("x", "b", n_skipped=1, skipped=["f"]),
            "eamdeploy evaluate x --reference b --data photos --split odd --images 500 --skip-bad -o r.json",
            "where the folder of images lies, --class-names, --threads",
        ),
        (
            evaluation(
                "x.eam.safetensors",
                "x.eam.safetensors with all attention live",
                used=images("a (b)"),
                reference_is_live=True,
            ),
            "eamdeploy evaluate x.eam.safetensors --data 'a (b)' -o r.json",
            "where the folder of images lies, --class-names, --threads",
        ),
        (
            evaluation(
                "x",
                None,
                used=images(split="even", exif_transpose=True),
                class_order="natural",
            ),
            "eamdeploy evaluate x --data photos --split even --exif-transpose --class-order natural -o r.json",
            "where the folder of images lies, --class-names, --threads",
        ),
        (
            evaluation("x", None, used=images(limit=9, exif_transpose=True)),
            "eamdeploy evaluate x --data photos --images 9 --exif-transpose -o r.json",
            "where the folder of images lies, --class-names, --threads",
        ),
        (
            manifest("x.ort.onnx", card(), parity=None),
            "eamdeploy build-ort MODEL.onnx -o r --threads 4 --no-check",
            f"the name of the model {digest('x.onnx')}",
        ),
        (
            manifest("x.ort.onnx", card(), provider="openvino"),
            "eamdeploy build-ort MODEL.onnx -o r --threads 4 --provider openvino",
            f"the name of the model {digest('x.onnx')}",
        ),
        (
            manifest("x.ort.onnx", card(rewrites=["fused_attention", "dynamic_int8"])),
            "eamdeploy build-ort MODEL.onnx -o r --threads 4 --fused-attention --int8",
            f"the name of the model {digest('x.onnx')}; --min-agreement",
        ),
        (
            manifest("x.ort.onnx", card(rewrites=["integer_map_products", "quantize_products"])),
            "eamdeploy build-ort MODEL.onnx -o r --threads 4 --int8 --calib-data IMAGES",
            f"the name of the model {digest('x.onnx')}; where the calibration images lie, other --calib options, "
            "--exif-transpose, --min-agreement",
        ),
        (
            manifest(
                "x.plan",
                card(),
                backend="trt",
                settings={"memory_pools.WORKSPACE": "1024", "builder_optimization_level": "4", "cuda_graph": "True"},
                device=device_build(int8=True, version_compatible=True),
            ),
            "eamdeploy build-trt MODEL.onnx -o r --fp16 --int8 --workspace 1024 --builder-level 4 "
            "--version-compatible --cuda-graph --layer-profile --baseline base.plan",
            f"the name of the model {digest('x.onnx')}; --keep-fp32, --timing-cache and batch sizes, but for what the "
            "settings say; whether --calib-data was given, and other --calib options",
        ),
        (
            manifest(
                "x.plan",
                card(rewrites=["quantize_products"]),
                backend="trt",
                settings={"keep_fp32": "none"},
                device=device_build(int8=True),
            ),
            "eamdeploy build-trt MODEL.onnx -o r --fp16 --int8 --keep-fp32 none --layer-profile --baseline base.plan",
            f"the name of the model {digest('x.onnx')}; --timing-cache and batch sizes, but for what the settings say",
        ),
        (
            manifest("x.plan", card(), backend="trt", settings={"keep_fp32": "none"}, device=device_build()),
            "eamdeploy build-trt MODEL.onnx -o r --fp16 --keep-fp32 none --layer-profile --baseline base.plan",
            f"the name of the model {digest('x.onnx')}; --timing-cache and batch sizes, but for what the settings say",
        ),
        (
            manifest(
                "x.plan",
                card(),
                backend="trt",
                device=device_build(int8=True, calibration=CALIBRATED),
            ),
            "eamdeploy build-trt MODEL.onnx -o r --fp16 --int8 --calib-data photos --calib-images 8 --calib-method "
            "percentile --layer-profile --baseline base.plan",
            f"the name of the model {digest('x.onnx')}; --keep-fp32, --timing-cache and batch sizes, but for what the "
            "settings say; where the calibration images lie, --calib-split, --calib-cache, --exif-transpose",
        ),
        (
            analysis(),
            "eamdeploy analyze --model deit_made_up_patch16_224 --weights weights.safetensors --data photos --mean 0.5 "
            "0.5 0.5 --std 0.25 0.25 0.25 --crop-pct 0.875 --interpolation bicubic --sparsity 0.3 --granularity row "
            "--score entropy --bins 16 --spacing uniform -o r.json",
            "folders of images and weights, --model-kwargs, --split, --images, --bits, --quantizer, --seed; 256 images "
            "were used",
        ),
        (
            analysis(calibration=analysis().calibration.model_copy(update={"exif_transpose": True})),
            "eamdeploy analyze --model deit_made_up_patch16_224 --weights weights.safetensors --data photos "
            "--exif-transpose --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25 --crop-pct 0.875 --interpolation bicubic "
            "--sparsity 0.3 --granularity row --score entropy --bins 16 --spacing uniform -o r.json",
            "folders of images and weights, --model-kwargs, --split, --images, --bits, --quantizer, --seed; 256 images "
            "were used",
        ),
        (
            export(),
            "eamdeploy export CHECKPOINT -o model.onnx --baseline base.onnx --json > r.json",
            "the checkpoint, --batch, --opset, --target, --exporter, --without, --data",
        ),
        (RunState(), "eamdeploy run CONFIG.toml", "the name of the configuration file"),
    ],
)
def test_a_record_tells_its_command_and_what_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record, text: str, unknown: str
) -> None:
    (command,) = commands_of(tmp_path, {"r.json": record}, monkeypatch)
    assert command == Command("r.json", text, unknown)
    parse(command)


def test_machines_with_other_numbers_of_threads_were_left_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = remote_profiles().profiles
    both["ssh://agx.lan:2222"] = both["ssh://agx.lan:2222"].model_copy(update={"threads": 12})
    (command,) = commands_of(tmp_path, {"r.json": RemoteProfiles(profiles=both, failures={})}, monkeypatch)
    assert "--threads" not in command.text


def test_a_checkpoint_tells_how_it_was_frozen(eam_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(eam_checkpoint.parent)
    (command,) = commands(read_sources([Path(eam_checkpoint.name)]))
    assert command.text.startswith(
        "eamdeploy freeze --model vit_tiny_patch16_224 --weights tiny.safetensors --model-kwargs img_size=32 "
    )
    assert command.text.endswith(
        "--data pictures --sparsity 0.5 --granularity head --score random --bits 4 --quantizer squared "
        "-o tiny.eam.safetensors"
    )
    assert command.unknown.endswith("; 24 images were used")
    parse(command)


def test_export_and_run_tell_the_name_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {"y.onnx": digest("y.onnx"), "y.reference.npz": digest("npz")}
    records: dict[str, Record] = {
        "out/run.json": RunState(stages={"export": StageState(inputs="", outputs=outputs)}),
        "x.json": export(),
        "model.ort.onnx.json": manifest("model.ort.onnx", card(freezing())),
        "y.ort.onnx.json": manifest("y.ort.onnx", card()),
    }
    found = commands_of(tmp_path, records, monkeypatch)
    builds = [(command.text, command.unknown) for command in found if " build-ort " in command.text]
    assert builds == [
        ("eamdeploy build-ort model.onnx -o model.ort.onnx --threads 4", ""),
        ("eamdeploy build-ort out/y.onnx -o y.ort.onnx --threads 4", ""),
    ]


def test_the_checkpoint_behind_an_export_is_known_through_its_engine(
    tmp_path: Path, eam_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkpoint,) = read_sources([eam_checkpoint]).checkpoints
    built = manifest("model.ort.onnx", card(freezing(), checkpoint_digest=checkpoint.digest))
    files = write_all(tmp_path, {"x.json": export(), "m.json": built})
    found = commands(read_sources([*files, eam_checkpoint]))
    (exporting,) = (command for command in found if " export " in command.text)
    assert exporting.text.startswith(f"eamdeploy export {eam_checkpoint} -o model.onnx")
    assert not exporting.unknown.startswith("the checkpoint")


def parse(command: Command) -> None:
    """The command line takes every word of it; nothing is run."""
    program, name, *words = shlex.split(command.text.partition(" > ")[0])
    assert program == "eamdeploy"
    group = typer.main.get_command(cli.app)
    subcommand = group.get_command(None, name)  # type: ignore[attr-defined,unused-ignore]
    context = subcommand.make_context(name, split_model_kwargs(words))
    assert context.args == []


def test_the_command_line_takes_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = {**rich_records(), "r.json": RunState(), "boards.json": remote_profiles()}
    found = commands_of(tmp_path, records, monkeypatch)
    assert len(found) == len(records)
    for command in found:
        parse(command)
