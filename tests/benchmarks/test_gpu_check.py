"""benchmarks/gpu_check.py and gpu_models.py, with a fake TensorRT and tiny models."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import fake_tensorrt
import numpy as np
import pytest
from rich.console import Console

from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.errors import EngineError
from eamdeploy.parity.reference_set import reference_path
from eamdeploy.profiling.timing import Schedule

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import gpu_check
import gpu_models
from gpu_check import Case, GpuCheck

GROUPS = (
    (Case("base", "fp16"), Case("stock", "fp16"), Case("tiny", "fp16"), Case("tiny", "fp16", "norm")),
    (Case("base", "fp32"), Case("absent", "fp32")),
)


@pytest.fixture
def models(eam_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("tiny", "base"):
        source = eam_model.with_name(f"{name}.onnx")
        shutil.copy(source, folder)
        shutil.copy(reference_path(source), folder)
    shutil.copy(eam_model.with_name("base.onnx"), folder / "stock.onnx")
    return folder


def test_it_gives_up_where_nothing_can_be_built(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_tensorrt.install(fake_tensorrt.make_machine("8.6"), monkeypatch)
    groups = [[Case(f"absent-{number}", "fp16") for number in range(5)]]
    result = gpu_check.run(models, tmp_path, seconds=60, groups=groups, sittings=2, batches=(1,))
    assert [item.error is not None for item in result.built] == [True] * 3
    assert result.left_out == ["absent-3-fp16", "absent-4-fp16"] and not result.profiles


@pytest.mark.parametrize("generation", fake_tensorrt.GENERATIONS)
def test_cases_are_built_measured_and_what_fails_is_written_down(
    generation: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.install(fake_tensorrt.make_machine(generation), monkeypatch)
    monkeypatch.setattr(gpu_check, "Schedule", lambda **_: _QUICK)
    work = tmp_path / "work"
    work.mkdir()
    result = gpu_check.run(
        gpu_check._unpacked(models, work), work, seconds=60, groups=GROUPS, sittings=2, batches=(1, 2)
    )
    named = {item.name: item for item in result.built}
    assert list(named) == ["base-fp16", "stock-fp16", "tiny-fp16", "tiny-fp16-keep-norm", "base-fp32", "absent-fp32"]
    assert "cannot read" in (named["absent-fp32"].error or "") and result.failed
    assert named["tiny-fp16"].top1_agreement == 100 and named["stock-fp16"].top1_agreement is None
    layers = named["tiny-fp16"].layers
    assert layers is not None and len({item.frozen_map for item in layers.frozen_maps}) == 2
    halves, _, singles, _ = result.profiles
    assert [measured.batch for measured in result.profiles] == [1, 2, 1, 2]
    assert halves.baseline is not None and halves.baseline.engine == "base-fp16.plan"
    assert [item.engine for item in halves.engines] == ["stock-fp16.plan", "tiny-fp16.plan", "tiny-fp16-keep-norm.plan"]
    assert all(item.split is not None for item in halves.engines)
    assert singles.baseline is None and [item.engine for item in singles.engines] == ["base-fp32.plan"]
    assert GpuCheck.parse(result.model_dump_json(), "result") == result
    console = Console(width=250, record=True)
    console.print(gpu_check.table(result))
    text = console.export_text()
    assert "tiny-fp16" in text and "cannot read" in text and "100.0 %" in text


_QUICK = Schedule(warmup_ms=0, min_seconds=0, min_runs=2, sittings=2)


def test_without_time_nothing_is_built_and_that_is_said(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tensorrt.install(fake_tensorrt.make_machine(), monkeypatch)
    result = gpu_check.run(models, tmp_path, seconds=-1, groups=GROUPS, sittings=1, batches=(1,))
    assert result.built == [] and result.profiles == [] and len(result.left_out) == 6


def test_without_tensorrt_it_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", str(tmp_path)])
    assert gpu_check.main() == 4
    assert capsys.readouterr().err.startswith("error: TensorRT is not installed here")


def test_the_models_of_all_cases_are_made() -> None:
    wanted = [case for group in gpu_check.GROUPS for case in group]
    assert {case.model for case in wanted} <= set(gpu_models.MODELS)
    assert len({case.name for case in wanted}) == len(wanted)


def test_a_case_is_named_by_model_precision_and_what_is_kept() -> None:
    assert Case.parse("deit-base:fp16") == Case("deit-base", "fp16")
    assert Case.parse("deit-base:int8-fp32:norm") == Case("deit-base", "int8-fp32", "norm")
    assert Case.parse("a:int8-fp32").int8 and Case.parse("a:int8").int8 and not Case.parse("a:fp32").int8
    for wrong in ("a", "a:fp8", "a:fp16:softmax", "a:fp16:norm:norm", "a:fp16:none:norm"):
        with pytest.raises(ValueError):
            Case.parse(wrong)


@pytest.mark.parametrize(
    ("precision", "lowest", "int8"),
    [("fp32", "fp32", False), ("fp16", "fp16", False), ("int8", "fp16", True), ("int8-fp32", "fp32", True)],
)
def test_a_case_asks_for_its_precision(
    precision: gpu_check.Precision, lowest: str, int8: bool, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TrtOptions] = []

    def refuse(model: Path, engine: Path, options: TrtOptions, **_: object) -> None:
        asked.append(options)
        raise EngineError("not today")

    monkeypatch.setattr(gpu_check, "build_trt", refuse)
    built, _ = gpu_check._build(Case("base", precision), models, models)
    assert built.error == "not today" and [(each.precision, each.int8) for each in asked] == [(lowest, int8)]


def test_an_archive_holds_the_models(models: Path, tmp_path: Path) -> None:
    gpu_models.pack(models, tmp_path / "models.tar.xz")
    unpacked = gpu_check._unpacked(tmp_path / "models.tar.xz", tmp_path / "unpacked")
    assert {file.name: file.read_bytes() for file in unpacked.iterdir()} == {
        file.name: file.read_bytes() for file in models.iterdir()
    }


def test_a_subset_of_frozen_heads_is_a_checkpoint(eam_checkpoint: Path, tmp_path: Path) -> None:
    whole = checkpoints.load(eam_checkpoint)
    (first, second) = whole.frozen
    assert [maps.heads.tolist() for maps in whole.frozen.values()] == [[1], [0, 1]]
    part = gpu_models.subset(whole, {second: [1]})
    checkpoints.save(part, tmp_path / "part.eam.safetensors")
    loaded = checkpoints.load(tmp_path / "part.eam.safetensors")
    assert list(loaded.frozen) == [second] and loaded.frozen[second].heads.tolist() == [1]
    np.testing.assert_array_equal(loaded.frozen[second].codes[0], whole.frozen[second].codes[1])
    assert loaded.header.freezing.sparsity == pytest.approx(whole.header.freezing.sparsity / 3)
    ranked = gpu_models.ranked_heads(whole)
    scores = [whole.header.freezing.scores[path][head] for path, head in ranked]
    assert scores == sorted(scores) and set(gpu_models.ranked_layers(whole)) == {first, second}
    assert gpu_models.grouped([(second, 1), (first, 0), (second, 0)]) == {second: [0, 1], first: [0]}


def test_random_weights_keep_few_bits() -> None:
    values = np.random.default_rng(0).normal(0, 0.02, 1000).astype(np.float32)
    short = gpu_models.rounded(values)
    np.testing.assert_allclose(short, values, rtol=2.0**-gpu_models.MANTISSA_BITS)
    assert (short.view(np.uint32) & 0xFFFF == 0).all()
    whole = np.arange(5)
    assert gpu_models.rounded(whole) is whole
