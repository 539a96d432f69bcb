from __future__ import annotations

import json
import re
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
from eamdeploy import cli_options as options
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.analysis import Analysis
from eamdeploy.eam.checkpoint import CheckpointHeader
from eamdeploy.engines.base import Manifest
from eamdeploy.errors import ConfigError, MissingDependency
from eamdeploy.evaluation import EvaluationReport
from eamdeploy.host.export_record import Export
from eamdeploy.inspection import Inspection
from eamdeploy.parity import reference_path
from eamdeploy.pipeline import RunReport
from eamdeploy.profiling.profile import Profile

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
    assert "sensitivity of 6 heads: about " in outcome.err
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
    assert "frozen share of " in picture.read_text()
    picture.unlink()
    analyzed = run_cli("analyze", *model, *common, *chosen, "-o", record)
    assert analyzed.code == 0, analyzed.err
    result = Analysis.read(record)
    assert (result.granularity, result.window_maps, result.frozen) == (granularity, "class", header.freezing.heads)
    assert "frozen share of " in picture.read_text()


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
    np.savez(tmp_path / "maps.npz", **{"blocks.1.attn.heads": np.array([2, 0]), "blocks.1.attn.codes": codes})
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
        assert seen.kind in run_cli("inspect", file).out


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
    words = ["build-ort", eam_model, "-o", tmp_path / "x.onnx", "--reference", twin, "--no-verify"]
    line = only_error(run_cli(*words), 3)
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
    def fail(path: Path, *, verify: bool) -> None:
        raise MissingDependency("one\ntwo\n   three " + "long " * 60)

    monkeypatch.setattr("eamdeploy.inspection.inspect", fail)
    assert "error: one two three long long" in only_error(run_cli("inspect", tmp_path), 4)


def test_a_bug_of_ours_keeps_its_traceback_with_exit_code_1() -> None:
    program = (
        "import sys, eamdeploy.inspection as inspection, eamdeploy.cli as cli\n"
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
