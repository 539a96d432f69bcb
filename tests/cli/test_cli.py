from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import COMMANDS, Outcome, RunCli, only_error
from PIL import Image
from tiny_models import KWARGS, NAME, SWIN_KWARGS, SWIN_NAME

import eamdeploy
from eamdeploy.cli import options as options
from eamdeploy.convert.ranges import ActivationRanges
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.analysis import Analysis
from eamdeploy.eam.checkpoint import CheckpointHeader
from eamdeploy.engines.manifest import Manifest
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import ConfigError, MissingDependency
from eamdeploy.images.preprocess import normalize
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.pipeline.run import RunReport
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.records.export import Export
from eamdeploy.records.profile import Profile
from eamdeploy.stages.inspect import Inspection

MODEL = ["--model", NAME, "--model-kwargs", *(f"{key}={value}" for key, value in KWARGS.items())]
QUICK = ["--warmup-ms", 0, "--min-seconds", 0, "--min-runs", 2, "--threads", 1, "--no-memory"]


def only_document(outcome: Outcome) -> Any:
    """The one JSON document on stdout of a command that went well."""
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)


# --- the whole of it -------------------------------------------------------------------------------------------------


def test_help_lists_every_stage(run_cli: RunCli) -> None:
    outcome = run_cli("--help")
    assert outcome.code == 0
    assert all(re.search(rf"\b{command}\b", outcome.out) for command in COMMANDS)


def test_version(run_cli: RunCli) -> None:
    assert run_cli("--version") == Outcome(0, f"{eamdeploy.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], None),
        (["nosuch"], "No such command"),
        (["freeze", "--data", "d", "-o", "x"], "Missing option '--model'"),
        (["freeze", "--model", "m", "--data", "d", "-o", "x", "--sparsity", "much"], "'--sparsity'"),
        (["freeze", "--model", "m", "--data", "d", "-o", "x", "--score", "beauty"], "'--score'"),
        (["freeze", "--model", "m", "--data", "d", "-o", "x", "--granularity", "column"], "'--granularity'"),
        (["analyze", "--model", "m", "--data", "d", "-o", "x", "--window-maps", "all"], "'--window-maps'"),
        (["evaluate", "x.onnx", "--data", "d", "--split", "third"], "'--split'"),
        (["profile", "x.onnx", "--threads", "0"], "'--threads'"),
        (["inspect"], "Missing argument"),
        (["inspect", "a", "b"], "unexpected extra argument"),
    ],
    ids=str,
)
def test_wrong_use_is_told_with_exit_code_2(run_cli: RunCli, arguments: list[str], message: str | None) -> None:
    outcome = run_cli(*arguments)
    assert outcome.code == 2
    if message is None:
        assert "Usage: eamdeploy" in outcome.out
    else:
        assert outcome.out == "" and message in re.sub(r"[│\s]+", " ", outcome.err)


def test_every_function_of_a_stage_is_importable_from_the_package() -> None:
    names = {command.replace("-", "_") for command in COMMANDS if command != "lint"}
    assert names | {"__version__"} == set(eamdeploy.__all__)
    for name in names:
        function = getattr(eamdeploy, name)
        assert function.__name__ == name and "Raises:" in function.__doc__
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        eamdeploy.prune  # noqa: B018


# --- one command after the other -------------------------------------------------------------------------------------


def test_freeze_prints_the_heads_and_the_sparsity_and_draws_them(
    run_cli: RunCli, tiny_weights: Path, pictures: Path, tmp_path: Path
) -> None:
    output, picture = tmp_path / "x.eam.safetensors", tmp_path / "heads.png"
    common = [*MODEL, "--weights", tiny_weights, "--data", pictures, "--images", 8, "--sparsity", 0.4, "-o", output]
    outcome = run_cli("freeze", *common, "--heatmap", picture, "--granularity", "head")
    assert outcome.code == 0, outcome.err
    header = checkpoints.load(output).header
    assert header.timm_kwargs == KWARGS
    for path, heads in header.freezing.heads.items():
        (line,) = re.findall(rf"{path} +(.*)", outcome.out)
        assert [int(head) for head in re.findall(r"(\d)\*", line)] == heads
    assert "sparsity 33.3% (asked for 40.0%): 2 of 6 heads, by sensitivity; 4 bits squared" in outcome.out
    assert "sensitivity of 6 heads on 8 images: about " in outcome.err
    with Image.open(picture) as image:
        assert image.width > 200
    quiet = run_cli("-q", "freeze", *common)
    assert (quiet.code, quiet.out, quiet.err) == (0, outcome.out, "")
    asked = run_cli("freeze", *common, "--json")
    assert CheckpointHeader.model_validate(only_document(asked)) == header
    assert "sparsity 33.3%" in asked.err


def test_analyze_writes_what_it_prints(run_cli: RunCli, tiny_weights: Path, pictures: Path, tmp_path: Path) -> None:
    output, picture = tmp_path / "a.json", tmp_path / "heads.svg"
    common = ["--weights", tiny_weights, "--data", pictures, "-o", output, "--heatmap", picture]
    outcome = run_cli("analyze", *MODEL, *common, "--sparsity", 0.2, "--json")
    result = Analysis.read(output)
    assert Analysis.model_validate(only_document(outcome)) == result
    assert result.score == "entropy" and sum(map(len, result.frozen.values())) == 1
    assert "24 images of pictures; sparsity 16.7% of 20.0% asked for" in outcome.err
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize("granularity", ["row", "entry"])
def test_analyze_and_freeze_of_swin_by_rows_and_entries(
    run_cli: RunCli, pictures: Path, tmp_path: Path, granularity: str
) -> None:
    model = ["--model", SWIN_NAME, "--model-kwargs", *(f"{key}={value}" for key, value in SWIN_KWARGS.items())]
    output, record, picture = tmp_path / "x.eam.safetensors", tmp_path / "x.json", tmp_path / "x.svg"
    common = ["--weights", "random", "--data", pictures, "--images", 4, "--sparsity", 0.3, "--score", "variance"]
    chosen = ["--granularity", granularity, "--window-maps", "class", "--heatmap", picture]
    frozen = run_cli("freeze", *model, *common, *chosen, "-o", output)
    assert frozen.code == 0, frozen.err
    header = checkpoints.load(output).header
    assert (header.freezing.granularity, header.freezing.window_maps) == (granularity, "class")
    assert header.timm_kwargs == json.loads(json.dumps(SWIN_KWARGS))
    assert "<!-- frozen share: " in picture.read_text()
    picture.unlink()
    analyzed = run_cli("analyze", *model, *common, *chosen, "-o", record)
    assert analyzed.code == 0, analyzed.err
    result = Analysis.read(record)
    assert (result.granularity, result.window_maps, result.frozen) == (granularity, "class", header.freezing.heads)
    assert "<!-- share that would be frozen: " in picture.read_text()


def test_swin_that_is_not_supported_is_told_in_one_line(run_cli: RunCli, pictures: Path, tmp_path: Path) -> None:
    common = ["--weights", "random", "--data", pictures, "-o", tmp_path / "x.eam.safetensors"]
    for model, reason in (
        (["swinv2_tiny_window8_256", "--model-kwargs", "depths=(1,)", "embed_dim=24", "num_heads=(1,)"], "temperature"),
        (
            [SWIN_NAME, "--model-kwargs", "strict_img_size=False", "depths=(1,)", "num_heads=(1,)"],
            "depend on the image",
        ),
    ):
        assert reason in only_error(run_cli("freeze", "--model", *model, *common), 2)
    model = [SWIN_NAME, "--model-kwargs", "depths=(1,)", "num_heads=(1,)", "embed_dim=8"]
    error = only_error(
        run_cli("freeze", "--model", *model, *common, "--score", "row-entropy", "--granularity", "entry"), 2
    )
    assert "row-entropy cannot rank entries" in error


def test_pack_takes_maps_of_somebodys_own_training(run_cli: RunCli, tiny_weights: Path, tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(1, 4, (2, 17, 17))
    arrays: dict[str, Any] = {"blocks.1.attn.heads": np.array([2, 0]), "blocks.1.attn.codes": codes}
    np.savez(tmp_path / "maps.npz", **arrays)
    output = tmp_path / "x.eam.safetensors"
    common = [*MODEL, "--weights", tiny_weights, "--maps", tmp_path / "maps.npz", "-o", output]
    outcome = run_cli("pack", *common, "--bits", 2, "--quantizer", "uniform")
    assert outcome.code == 0 and "sparsity 33.3%: 2 of 6 heads, by given; 2 bits uniform" in outcome.out
    loaded = checkpoints.load(output)
    np.testing.assert_array_equal(loaded.frozen["blocks.1.attn"].codes, codes[::-1])
    assert only_document(run_cli("pack", *common, "--bits", 2, "--json"))["freezing"]["quantizer"] == "squared"


def test_export_build_evaluate_profile_and_inspect(
    run_cli: RunCli, eam_checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    model, base = tmp_path / "x.onnx", tmp_path / "base.onnx"
    common = [
        "export",
        eam_checkpoint,
        "-o",
        model,
        "--baseline",
        base,
        "--exporter",
        "torchscript",
        "--data",
        pictures,
    ]
    exported = Export.model_validate(only_document(run_cli(*common, "--batch", 2, "--images", 3, "--json")))
    assert exported.baseline is not None and exported.frozen.parity.n == 3
    shown = run_cli(*common)
    assert shown.code == 0 and "16 images in" in shown.out and "freeze_heads" in shown.out

    engines = []
    for source in (model, base):
        engines.append(source.with_suffix(".ort.onnx"))
        built = run_cli("build-ort", source, "-o", engines[-1], "--threads", 1, "--json")
        assert Manifest.model_validate(only_document(built)).parity is not None
        assert "16 images, every top-1 equal" in built.err and re.search("provider +cpu", built.err)
    engine, twin = engines

    common = ["evaluate", engine, "--reference", twin, "--data", pictures, "--split", "odd", "--images", 7]
    asked = run_cli(*common, "--json", "-o", tmp_path / "e.json")
    report = EvaluationReport.model_validate(only_document(asked))
    assert report == EvaluationReport.read(tmp_path / "e.json")
    assert {"top1", "top5", "agreement", "kl", "n_images"} <= json.loads(asked.out).keys()
    assert (report.n_images, report.top1) == (7, None)
    assert re.search(rf"agreement +{report.agreement:.1f} %", run_cli(*common).out)

    measured = run_cli("profile", engine, "--baseline", twin, *QUICK, "--json", "-o", tmp_path / "p.json")
    assert Profile.model_validate(only_document(measured)) == Profile.read(tmp_path / "p.json")
    assert "baseline" in measured.err and "×" in measured.err

    for file, kind in (
        (engine, "ONNX Runtime engine"),
        (tmp_path / "p.json", "profile"),
        (eam_checkpoint, "EAM check"),
    ):
        seen = Inspection.model_validate(only_document(run_cli("inspect", file, "--json")))
        assert seen.kind.startswith(kind)
        assert seen.kind in " ".join(run_cli("inspect", file).out.split())


def test_run_does_everything_once(run_cli: RunCli, tiny_weights: Path, pictures: Path, tmp_path: Path) -> None:
    kwargs = ", ".join(f"{key} = {value}" for key, value in KWARGS.items())
    (tmp_path / "run.toml").write_text(
        f'output = "out"\nmodel = {{name = "{NAME}", weights = "{tiny_weights}", kwargs = {{{kwargs}}}}}\n'
        f'calibrate = {{data = "{pictures}"}}\nevaluate = {{data = "{pictures}"}}\n'
        'export = {exporter = "torchscript"}\nprofile = {min_seconds = 0.0, warmup_ms = 0.0, min_runs = 2}\n'
    )
    first = run_cli("run", tmp_path / "run.toml")
    assert first.code == 0, first.err
    assert "freeze: running" in first.err
    assert (tmp_path / "out" / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    again = RunReport.model_validate(only_document(run_cli("run", tmp_path / "run.toml", "--json")))
    assert again.ran == []
    assert again.profile.engines[0].memory is not None


def test_passes_are_left_out_by_name(run_cli: RunCli, eam_checkpoint: Path, tmp_path: Path) -> None:
    common = ["export", eam_checkpoint, "-o", tmp_path / "x.onnx", "--exporter", "torchscript", "--no-measure"]
    outcome = run_cli(*common, "--without", "add_position", "--without", "gather_tokens", "--json")
    rewrites = Export.model_validate(only_document(outcome)).frozen.rewrites
    missing = {"add_position", "gather_tokens", "window_order", "merge_gathers"}
    assert "freeze_heads" in rewrites and not missing.intersection(rewrites)
    assert "left out of the passes: add_position, gather_tokens, merge_gathers, window_order" in outcome.err
    refused = run_cli(*common, "--without", "add_position", "--without", "freeze_heads")
    assert "the pass freeze_heads can't be left out" in only_error(refused, 2)


def test_everything_from_random_weights_says_so_to_people(run_cli: RunCli, pictures: Path, tmp_path: Path) -> None:
    checkpoint, model = tmp_path / "x.eam.safetensors", tmp_path / "x.onnx"
    data = ["--data", pictures, "--images", 3]
    common = [*MODEL, "--weights", "random", *data, "--score", "variance"]
    warning = "The weights are random"
    assert warning in run_cli("freeze", *common, "-o", checkpoint).out
    assert warning in run_cli("analyze", *common, "-o", tmp_path / "a.json").out
    assert run_cli("export", checkpoint, "-o", model, "--exporter", "torchscript").code == 0
    assert warning in run_cli("evaluate", checkpoint, *data).out
    assert warning in run_cli("profile", model, *QUICK).out
    assert re.search("weights +random", run_cli("inspect", model).out)


def test_every_command_that_reads_images_turns_them_and_counts_what_it_does_not_read(
    run_cli: RunCli, tiny_weights: Path, pictures: Path, eam_engine: Path, tmp_path: Path
) -> None:
    folder, checkpoint, model = tmp_path / "photos", tmp_path / "x.eam.safetensors", tmp_path / "x.onnx"
    shutil.copytree(pictures, folder)
    (folder / "a.avif").write_bytes(b"")
    exif = Image.Exif()
    exif[0x0112] = 6
    for file in folder.glob("*.png"):
        Image.open(file).save(file, exif=exif)
    told = f"1 file of {folder} was not read because of its ending: .avif 1"
    common = [*MODEL, "--weights", tiny_weights, "--data", folder, "--images", 4, "--score", "variance"]
    calibrated = ["--int8", "--calib-data", folder, "--calib-images", 4, "--min-agreement", 0]
    commands: dict[str, list[object]] = {
        "freeze": [*common, "-o", checkpoint],
        "analyze": [*common, "-o", tmp_path / "a.json"],
        "export": [
            checkpoint,
            "-o",
            model,
            "--data",
            folder,
            "--images",
            4,
            "--exporter",
            "torchscript",
            "--no-measure",
        ],
        "build-ort": [model, "-o", tmp_path / "x.ort.onnx", *calibrated],
        "build-trt": [model, "--dry-run", "--trt", "10.3", *calibrated[:-2], "--calib-cache", tmp_path / "c.json"],
        "evaluate": [eam_engine, "--data", folder, "-o", tmp_path / "e.json"],
    }
    for command, arguments in commands.items():
        outcome = run_cli(command, *arguments, "--exif-transpose")
        assert outcome.code == 0, outcome.err
        assert outcome.err.count(told) == 1, command

    def read() -> dict[str, Any]:
        return {
            "freeze": checkpoints.load(checkpoint).header.calibration,
            "analyze": Analysis.read(tmp_path / "a.json").calibration,
            "export": ReferenceSet.load(reference_path(model)).pixels.tolist(),
            "build-ort": ActivationRanges.read(tmp_path / "x.ort.onnx.ranges.json").ranges,
            "build-trt": ActivationRanges.read(tmp_path / "c.json").ranges,
            "evaluate": EvaluationReport.read(tmp_path / "e.json").images,
        }

    turned = read()
    assert turned["freeze"] == turned["analyze"] and turned["freeze"].exif_transpose
    assert turned["evaluate"] == "photos (all, turned by EXIF)"
    for command, arguments in commands.items():
        assert run_cli(command, *arguments).code == 0
    as_stored = read()
    assert not as_stored["freeze"].exif_transpose
    assert [command for command in commands if turned[command] == as_stored[command]] == []


def test_evaluate_reads_labels_as_asked_and_warns_of_those_of_another_model(
    run_cli: RunCli, eam_engine: Path, pictures: Path, tmp_path: Path
) -> None:
    engine, source = eam_engine.with_name("base.ort.onnx"), ImageSource(pictures)
    with open_runner(engine, 1) as runner:
        assert runner.card is not None
        (batch,) = source.batches(source.open(), runner.card.preprocessing, 24, SILENT)
        classes = runner.infer(normalize(batch.pixels, runner.card.preprocessing)).argmax(axis=1)
    for kind, shift in (("right", 0), ("wrong", 1)):
        for number in range(1, 11):
            (tmp_path / kind / f"class{number}").mkdir(parents=True)
            shutil.copy(pictures / "000.png", tmp_path / kind / f"class{number}" / "extra.png")
        for file, number in zip(batch.files, classes, strict=True):
            shutil.copy(file, tmp_path / kind / f"class{(number + shift) % 10 + 1}")
    (tmp_path / "names.txt").write_text("\n".join(f"class{number}" for number in range(1, 11)))
    common = ["evaluate", engine, "--threads", 1, "--data"]

    refused = only_error(run_cli(*common, tmp_path / "right"), 2)
    assert "class2: class 1 by natural, class 2 by letters" in refused and "--class-order natural" in refused
    wanted = f"{100 * 25 / 34:.1f} %"  # all but nine of the extra ones
    for asked in (["--class-order", "natural"], ["--class-names", tmp_path / "names.txt"]):
        outcome = run_cli(*common, tmp_path / "right", *asked)
        assert re.search(rf"top-1 +{wanted}", outcome.out) and "guessing" not in outcome.out
    (tmp_path / "names.txt").write_text("one\n")
    short = run_cli(*common, tmp_path / "right", "--class-names", tmp_path / "names.txt")
    assert "expected 10 names; got 1" in only_error(short, 2)
    for quiet in ([], ["-q"]):
        outcome = run_cli(*quiet, *common, tmp_path / "wrong", "--class-order", "natural", "--json")
        assert EvaluationReport.model_validate(only_document(outcome)).labels_in_doubt
        assert "no better than guessing among 10 classes: the labels probably do not belong" in outcome.err


def test_trained_weights_bring_no_warning(run_cli: RunCli, eam_engine: Path, pictures: Path) -> None:
    assert "random" not in run_cli("evaluate", eam_engine, "--data", pictures, "--images", 2).out
    assert "random" not in run_cli("profile", eam_engine, *QUICK).out


def test_names_that_look_like_markup_stay_as_they_are(run_cli: RunCli, tmp_path: Path) -> None:
    odd = tmp_path / "[bold]x :smile:.json"
    odd.write_text('{"a": "[red]é[/]"}')
    outcome = run_cli("inspect", odd, "--json")
    assert only_document(outcome)["file"] == str(odd)
    assert only_document(outcome)["details"] == {"a": "[red]é[/]"}
    shown = " ".join(outcome.err.split())  # a long title is folded
    assert odd.name in shown and "[red]é[/]" in shown
    odd.unlink()
    assert f"cannot read {odd}: " in only_error(run_cli("inspect", odd), 2)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_with_exit_code_2(run_cli: RunCli, eam_engine: Path, tmp_path: Path) -> None:
    line = only_error(run_cli("evaluate", eam_engine, "--data", tmp_path / "none", "--json"), 2)
    assert f"cannot read images from {tmp_path / 'none'}; expected a folder with images" in line
    assert "got nothing there" in line


def test_failed_gate_is_one_line_with_exit_code_3(run_cli: RunCli, eam_model: Path, tmp_path: Path) -> None:
    twin = reference_path(eam_model.with_name("base.onnx"))
    line = only_error(run_cli("build-ort", eam_model, "-o", tmp_path / "x.onnx", "--reference", twin, "--no-verify"), 3)
    assert "parity of " in line and "> 0.002" in line
    assert list(tmp_path.iterdir()) == []


def test_missing_backend_is_one_line_with_exit_code_4(run_cli: RunCli, tmp_path: Path) -> None:
    (tmp_path / "x.plan").write_bytes(b"")
    assert "TensorRT" in only_error(run_cli("profile", tmp_path / "x.plan"), 4)


def test_missing_provider_is_one_line_with_exit_code_4(
    run_cli: RunCli, eam_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    line = only_error(run_cli("build-ort", eam_model, "-o", tmp_path / "x.onnx", "--provider", "openvino"), 4)
    assert "no provider openvino" in line and "pip install onnxruntime-openvino" in line
    assert list(tmp_path.iterdir()) == []


def test_line_breaks_in_a_message_are_gone(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(path: Path, **_: object) -> None:
        raise MissingDependency("one\ntwo\n   three " + "long " * 60)

    monkeypatch.setattr("eamdeploy.stages.inspect.inspect", fail)
    assert "error: one two three long long" in only_error(run_cli("inspect", tmp_path), 4)


def test_a_bug_of_ours_keeps_its_traceback_with_exit_code_1() -> None:
    program = (
        "import sys, eamdeploy.stages.inspect as inspection, eamdeploy.cli.app as cli\n"
        "inspection.inspect = lambda path, verify: 1 / 0\n"
        "sys.argv = ['eamdeploy', 'inspect', 'x']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


def test_the_installed_program_is_this_command_line() -> None:
    program = Path(sys.executable).with_name("eamdeploy")
    if not program.exists():
        pytest.skip("the project is not installed beside this Python")
    done = subprocess.run([program, "inspect", "/no/such.json"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: cannot read /no/such.json: No such file or directory\n"


# --- how values are spelled ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "spelled"),
    [
        (["freeze", "--model-kwargs", "a=1", "b=2", "-o", "x=1"], ["freeze", *"abA"]),
        (["--model-kwargs", "a=1", "--model-kwargs", "b=2"], list("ab")),
        (["--model-kwargs", "a=1", "file.onnx", "c=3"], ["a", "file.onnx", "c=3"]),
        (["x", "a=1"], ["x", "a=1"]),
        (["--model-kwargs=a=1"], ["--model-kwargs=a=1"]),
        ([], []),
    ],
)
def test_model_kwargs_become_one_option_per_value(arguments: list[str], spelled: list[str]) -> None:
    meant = {"a": ["--model-kwargs", "a=1"], "b": ["--model-kwargs", "b=2"], "A": ["-o", "x=1"]}
    assert options.split_model_kwargs(arguments) == [word for each in spelled for word in meant.get(each, [each])]


def test_model_kwargs_are_python_literals_or_text() -> None:
    words = ["img_size=(32,48)", "ratio=2.5", "qk_norm=True", "global_pool=avg", "x=None", "y='a b'", "z=a=b"]
    assert options.parse_model_kwargs(words) == {
        "img_size": (32, 48),
        "ratio": 2.5,
        "qk_norm": True,
        "global_pool": "avg",
        "x": None,
        "y": "a b",
        "z": "a=b",
    }


@pytest.mark.parametrize("word", ["depth", "=3", "a-b=3", "1a=3"])
def test_model_kwargs_without_a_name_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=rf"--model-kwargs; expected name=value; got {word}"):
        options.parse_model_kwargs([word])


def test_bits_and_batch_are_checked() -> None:
    assert [options.parse_bits(bits) for bits in (2, 3, 4, 8)] == [2, 3, 4, 8]
    assert (options.parse_batch("dynamic"), options.parse_batch("16")) == (None, 16)
    for bits in (0, 1, 5, 16):
        with pytest.raises(ConfigError, match=rf"--bits; expected one of 2, 3, 4, 8; got {bits}"):
            options.parse_bits(bits)
    for batch in ("0", "-1", "1.5", "many", ""):
        with pytest.raises(ConfigError, match=rf"--batch; expected 'dynamic' or a number of at least 1; got {batch}"):
            options.parse_batch(batch)
