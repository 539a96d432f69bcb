"""`build-trt` on the command line, and what evaluates and profiles its engines, with a fake TensorRT and without."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import fake_tensorrt
import onnx
import pytest
from command_line import RunCli, only_error
from fake_tensorrt import GENERATIONS, read_plan
from lint_models import found

from eamdeploy.cli import options as options
from eamdeploy.engines.manifest import Manifest, manifest_path
from eamdeploy.engines.trt.request import BuilderRequest, TrtOptions
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import ConfigError, DeviceError, MissingDependency
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.stages.build_trt import plan_trt_build


@pytest.fixture
def model(eam_model: Path, tmp_path: Path) -> Path:
    """A copy of the exported model with its reference set."""
    for file in (eam_model, eam_model.with_name("base.onnx")):
        shutil.copy(file, tmp_path)
        shutil.copy(reference_path(file), tmp_path)
    return tmp_path / eam_model.name


@pytest.fixture(params=GENERATIONS)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> fake_tensorrt.Machine:
    made = fake_tensorrt.make_machine(request.param)
    fake_tensorrt.install(made, monkeypatch)
    return made


def on_8(machine: fake_tensorrt.Machine) -> bool:
    return str(machine.trt.fake.version).startswith("8")


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)


def document(text: str) -> Any:
    return json.loads(text)


# --- with a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [[], ["--fp16"]], ids=["fp32", "fp16"])
def test_engine_of_a_real_export_is_built_evaluated_and_profiled(
    machine: fake_tensorrt.Machine, model: Path, pictures: Path, precision: list[str], run_cli: RunCli
) -> None:
    engine = model.with_suffix(".plan")
    built = run_cli("build-trt", model, "-o", engine, *precision, "--json")
    assert built.code == 0, built.err
    manifest = Manifest.parse(built.out, "stdout")
    assert manifest == Manifest.read(manifest_path(engine))
    assert manifest.parity is not None and manifest.parity.top1_agreement == 100
    assert manifest.device is not None and manifest.device.engine_layers is not None
    maps = manifest.device.engine_layers.frozen_maps
    assert all(item.layer and (item.type == "Half" or on_8(machine)) for item in maps)
    assert len({item.frozen_map for item in maps}) == 2  # two modules with frozen heads
    assert manifest.settings.get("keep_fp32") == ("none" if precision else None)
    assert manifest.device.engine_layers.fused_attention  # the live head of the first module
    evaluated = run_cli("evaluate", engine, "--data", pictures, "--reference", engine, "--json")
    assert document(evaluated.out)["agreement"] == 100
    quick = ["--warmup-ms", 0, "--min-seconds", 0, "--min-runs", 2, "--no-memory"]
    profiled = run_cli("profile", engine, "--baseline", engine, *quick, "--json")
    assert profiled.code == 0, profiled.err
    (item,) = document(profiled.out)["engines"]
    assert (item["backend"], item["settings"]) == ("trt", manifest.settings)
    assert machine.cuda.memory == {}


def test_int8_from_calibration_images(
    machine: fake_tensorrt.Machine, model: Path, pictures: Path, run_cli: RunCli
) -> None:
    engine, given = model.with_suffix(".plan"), model.with_name("parsed.onnx")
    asked = ["--int8", "--calib-data", pictures, "--calib-images", 8, "--min-agreement", 50]
    if on_8(machine):
        line = only_error(run_cli("-q", "build-trt", model, "-o", engine, *asked, "--fp16"), 2)
        assert "kINT8 failed" in line and "without cuBLAS" in line
    else:
        asked.append("--fp16")
    built = run_cli("build-trt", model, "-o", engine, *asked, "--save-onnx", given, "--json")
    assert built.code == 0, built.err
    manifest = Manifest.parse(built.out, "stdout")
    assert manifest.device is not None and manifest.device.int8
    used = manifest.device.calibration
    assert used is not None and used.in_words in manifest.device.model_changes
    assert (used.method, used.images, used.folder) == ("percentile", 8, "pictures")
    assert manifest.parity is not None and manifest.parity.tolerance == "reduced-engine at 50 %"
    assert len({item.frozen_map for item in manifest.device.engine_layers.frozen_maps}) == 2  # type: ignore[union-attr]
    parsed = onnx.load(given)
    assert sum(node.op_type == "QuantizeLinear" for node in parsed.graph.node) > 10
    assert used.products > 5
    version = TrtVersion.parse(manifest.device.runtime)
    assert {finding.rule for finding in found(parsed, str(version))} <= {"attention-head-size"}
    again = run_cli("build-trt", model, "-o", engine, *asked)
    assert again.code == 0 and f"are taken from {engine}.ranges.json" in " ".join(again.err.split())


def test_int8_without_a_gpu_is_asked_for_and_written(
    no_tensorrt: None, model: Path, pictures: Path, run_cli: RunCli
) -> None:
    given, cache = model.with_name("parsed.onnx"), model.with_name("ranges.json")
    asked = ["--int8", "--calib-data", pictures, "--calib-method", "minmax", "--calib-cache", cache]
    shown = run_cli("build-trt", model, "--dry-run", "--trt", "10.3", *asked, "--save-onnx", given)
    assert shown.code == 0, shown.err
    assert "ranges: minmax of 24 images of pictures" in shown.out and cache.is_file()
    evaluated = run_cli("evaluate", given, "--data", pictures, "--reference", model, "--json")
    assert 50 <= document(evaluated.out)["agreement"] <= 100 and document(evaluated.out)["kl"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8"], "--int8 needs a model that says what is INT8; expected QuantizeLinear"),
        (["--calib-data", "PICTURES"], "calibration images are of use for INT8 alone"),
        (["--int8", "--calib-data", "nowhere"], "cannot read images from nowhere"),
        (["--int8", "--calib-data", "PICTURES", "--calib-cache", "MODEL"], "would replace the input"),
    ],
)
def test_int8_asked_for_wrongly(
    arguments: list[str], message: str, no_tensorrt: None, model: Path, pictures: Path, run_cli: RunCli
) -> None:
    named = {"PICTURES": pictures, "MODEL": model}
    result = run_cli("build-trt", model, "--dry-run", "--trt", "8.6", *(named.get(each, each) for each in arguments))
    assert message in only_error(result, 2)


def test_a_model_that_is_quantized_already_is_not_quantized_again(
    no_tensorrt: None, model: Path, pictures: Path, run_cli: RunCli
) -> None:
    given = model.with_name("parsed.onnx")
    dry = ["--dry-run", "--trt", "8.6", "--int8", "--calib-data", pictures]
    assert run_cli("build-trt", model, *dry, "--save-onnx", given).code == 0
    assert "is quantized already" in only_error(run_cli("build-trt", given, *dry), 2)
    assert run_cli("build-trt", given, *dry[:4]).code == 0


def test_the_gate_of_an_fp32_engine_is_not_loosened(
    model: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    fake_tensorrt.install(fake_tensorrt.make_machine(), monkeypatch)
    twin = model.with_name("base.onnx")
    refused = run_cli("build-trt", twin, "-o", twin.with_suffix(".plan"), "--min-agreement", 90)
    assert "expected an engine in FP16, BF16 or INT8; got an FP32 engine" in only_error(refused, 2)


def test_memory_of_an_engine_is_that_of_a_process_of_its_own(
    model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    fake_tensorrt.install(fake_tensorrt.make_machine(), monkeypatch)
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import fake_tensorrt\n"
        "class Keep:\n"
        "    def setitem(self, mapping, name, value): mapping[name] = value\n"
        "    def setattr(self, path, value):\n"
        "        import eamdeploy.engines.trt.backend as trt\n"
        "        trt.require_gpu = value\n"
        "fake_tensorrt.install(fake_tensorrt.make_machine(), Keep())\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    engine = model.with_suffix(".plan")
    run_cli("build-trt", model, "-o", engine)
    profiled = run_cli("profile", engine, "--warmup-ms", 0, "--min-seconds", 0, "--min-runs", 2, "--json")
    assert profiled.code == 0, profiled.err
    assert document(profiled.out)["engines"][0]["memory"]["engine_bytes"] == engine.stat().st_size


def test_people_read_what_became_of_the_model(model: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    fake_tensorrt.install(fake_tensorrt.make_machine(), monkeypatch)
    twin, engine = model.with_name("base.plan"), model.with_suffix(".plan")
    run_cli("build-trt", model, "-o", twin)
    told = run_cli("build-trt", model, "-o", engine, "--fp16", "--layer-profile", "--baseline", twin)
    assert told.code == 0, told.err
    for text in (
        "TensorRT 10.3.0 on Orin (compute capability 8.7)",
        "frozen maps as INT8",
        "of which fused attention: 2",
        "every top-1 equal",
        "base.plan: ",
        "0.5000 ms second",
        "tiny.plan.log",
    ):
        assert text in " ".join(told.out.split()), told.out
    assert "for TensorRT 10.3.0: frozen maps" in told.err


def test_gate_that_fails_ends_with_exit_code_3_and_leaves_the_old_engine(
    model: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    fake_tensorrt.install(fake_tensorrt.make_machine(), monkeypatch)
    engine = model.with_suffix(".plan")
    run_cli("build-trt", model, "-o", engine)
    before = engine.read_bytes()
    reference = ReferenceSet.load(reference_path(model))
    ReferenceSet(reference.pixels, -reference.logits, "turned around").save(reference_path(model))
    outcome = run_cli("-q", "build-trt", model, "-o", engine, "--fp16")
    assert "reduced-engine: first class equal for" in only_error(outcome, 3)
    assert engine.read_bytes() == before


def test_verbose_shows_the_builders_log(model: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    import logging

    fake_tensorrt.install(fake_tensorrt.make_machine(), monkeypatch)
    monkeypatch.setattr(logging.root, "handlers", [])
    assert "eamdeploy.tensorrt:building" in run_cli("-v", "build-trt", model, "-o", model.with_suffix(".plan")).err
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    assert "building" not in run_cli("build-trt", model, "-o", model.with_suffix(".plan")).err


# --- without ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_tensorrt")
def test_without_tensorrt_one_line_says_so_and_how_to_get_it(model: Path, run_cli: RunCli) -> None:
    line = only_error(run_cli("build-trt", model, "--fp16", "-o", model.with_suffix(".plan")), 4)
    assert "TensorRT is not installed here" in line
    assert "apt install python3-libnvinfer" in line or "pip install tensorrt" in line
    assert not model.with_suffix(".plan.log").exists()


def test_folder_called_tensorrt_is_no_tensorrt(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    (tmp_path / "tensorrt").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    if hasattr(__import__("tensorrt"), "__version__"):
        pytest.skip("the real TensorRT is installed here")
    try:
        assert "TensorRT is not installed" in only_error(run_cli("build-trt", model, "-o", tmp_path / "x.plan"), 4)
    finally:
        sys.modules.pop("tensorrt", None)


def test_without_gpu_one_line_says_so_before_anything_that_needs_one_is_touched(
    model: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    machine = fake_tensorrt.make_machine()
    monkeypatch.setitem(sys.modules, "tensorrt", machine.trt)
    monkeypatch.setattr("ctypes.CDLL", None)

    def no_gpu() -> None:
        raise DeviceError("no NVIDIA GPU can be used here: none")

    monkeypatch.setattr("eamdeploy.engines.trt.backend.require_gpu", no_gpu)
    monkeypatch.setattr("eamdeploy.engines.trt.backend.require_api", lambda *_: None)
    assert "no NVIDIA GPU" in only_error(run_cli("build-trt", model, "-o", model.with_suffix(".plan")), 4)
    model.with_suffix(".plan").write_bytes(b"plan")
    assert "no NVIDIA GPU" in only_error(run_cli("profile", model.with_suffix(".plan")), 4)
    assert machine.trt.fake.touched == set()


@pytest.mark.usefixtures("no_tensorrt")
@pytest.mark.parametrize("version", ["8.5", "8.6", "10.3", "11.4"])
def test_dry_run_shows_the_request_for_any_version(model: Path, version: str, run_cli: RunCli) -> None:
    before = sorted(model.parent.iterdir())
    outcome = run_cli("build-trt", model, "--dry-run", "--trt", version, "--fp16", "--max-batch", 4, "--json")
    assert outcome.code == 0, outcome.err
    request = BuilderRequest.parse(outcome.out, "stdout")
    assert request == plan_trt_build(model, TrtOptions(precision="fp16", max_batch=4), TrtVersion.parse(version))
    assert request.tensorrt == version
    assert request.shapes == {"image": [[1, 3, 32, 32], [1, 3, 32, 32], [4, 3, 32, 32]]}
    assert ("FP16" in request.set_flags) is (version != "11.4")
    people = run_cli("build-trt", model, "--dry-run", "--trt", version, "--fp16")
    assert people.code == 0 and f"TensorRT {version} would be asked" in people.out
    assert sorted(model.parent.iterdir()) == before


def test_dry_run_is_for_the_installed_version_unless_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    fake_tensorrt.install(fake_tensorrt.make_machine("8.6"), monkeypatch)
    assert document(run_cli("build-trt", model, "--dry-run", "--json").out)["tensorrt"] == "8.6.2.3"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "TensorRT is not installed" in only_error(run_cli("build-trt", model, "--dry-run"), 4)


def test_dry_run_asks_what_the_build_asks(machine: fake_tensorrt.Machine, model: Path, run_cli: RunCli) -> None:
    asked = ["--fp16", "--workspace", "2G", "--builder-level", 2, "--version-compatible"]
    request = BuilderRequest.parse(run_cli("build-trt", model, "--dry-run", "--json", *asked).out, "stdout")
    manifest = Manifest.parse(
        run_cli("build-trt", model, "-o", model.with_suffix(".plan"), "--json", *asked).out, "out"
    )
    assert manifest.settings == request.settings()
    header, _ = read_plan(model.with_suffix(".plan").read_bytes())
    assert sorted({*request.set_flags, "TF32"}) == header["flags"]
    assert header["pools"] == {"WORKSPACE": 2 << 30} and header["level"] == 2


def test_package_for_the_conversion_that_is_missing_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.startswith(("eamdeploy.convert.trt", "onnx_graphsurgeon"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingDependency, match=r"needs the package onnx.*pip install onnx onnx-graphsurgeon"):
        plan_trt_build(model, TrtOptions(), TrtVersion.parse("10.3"))


@pytest.mark.usefixtures("no_tensorrt")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fp16", "--bf16", "-o", "x.plan"], "--fp16 and --bf16; expected one of them"),
        (["--workspace", "much", "-o", "x.plan"], "--workspace; expected a number of bytes"),
        (["--trt", "8.6", "-o", "x.plan"], "--trt; expected --dry-run"),
        ([], "expected --output FILE.plan, or --dry-run"),
        (["--dry-run", "--trt", "8.6", "--int8"], "--int8 needs a model that says what is INT8"),
        (["--dry-run", "--trt", "8.2"], "8.2 is not supported"),
        (["--dry-run", "--trt", "old"], "no version of TensorRT"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_is_one_line(model: Path, run_cli: RunCli, arguments: list[str], message: str) -> None:
    assert message in only_error(run_cli("build-trt", model, *arguments), 2)


@pytest.mark.parametrize(
    ("text", "size"),
    [(None, None), ("1", 1), ("64K", 64 << 10), ("512m", 512 << 20), ("2G", 2 << 30), ("2GiB", 2 << 30)],
)
def test_sizes(text: str | None, size: int | None) -> None:
    assert options.parse_bytes("--workspace", text) == size


@pytest.mark.parametrize("text", ["", "G", "1.5G", "-1", "2T", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--workspace"):
        options.parse_bytes("--workspace", text)
