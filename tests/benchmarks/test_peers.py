"""benchmarks/peers.py and what it is made of, on tiny models; what is not installed must be named."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import parser
from PIL import Image
from rich.console import Console
from tiny_models import KWARGS, NAME, SWIN_KWARGS, SWIN_NAME

from eamdeploy.errors import EngineError, UnsupportedGraph
from eamdeploy.host.model import RANDOM, ModelSpec
from eamdeploy.parity.accuracy import Predict
from eamdeploy.parity.gate import TOLERANCES
from eamdeploy.profiling.timing import Call, Schedule, summarize

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import comparison
import floor
import our_engines
import peer_engines
import peers
from candidates import Candidate, Engine, Plan, Skipped, make
from comparison import PausableClock, Peers, Row
from floor import Product
from peer_engines import PEERS
from peers_show import draw, tables
from study import Settings, Study, code_digest

QUICK = Schedule(warmup_ms=0, min_seconds=0, min_runs=2, sittings=1)
PLANS = [*PEERS, *(plan for plan in our_engines.plans() if plan.name != "eamdeploy FP32, sparsity 0.2")]
OPENVINO = ("OpenVINO FP32", "OpenVINO INT8 (NNCF)")
INSTALLED = all(importlib.util.find_spec(name) for name in ("openvino", "nncf"))
# the provider comes with another package, see docs/guides/onnx-runtime.md
PROVIDED = "OpenVINOExecutionProvider" in onnxruntime.get_available_providers()
OUR_OPENVINO = [plan.name for plan in PLANS if plan.family == "ours" and plan.runtime == "openvino"]


@pytest.fixture(scope="module")
def settings(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The pictures with labels, each its number modulo 10."""
    data = tmp_path_factory.mktemp("peers") / "labelled"
    data.mkdir()
    files = sorted(pictures.iterdir())
    for file in files:
        (data / file.name).write_bytes(file.read_bytes())
    lines = [f"{file.name},{number % 10}" for number, file in enumerate(files)]
    (data / "labels.csv").write_text("\n".join(["file,label", *lines]) + "\n")
    return Settings(data, data.parent / "keep", calibration_images=6, score_images=2, images=5)


@pytest.fixture(scope="module")
def vit(settings: Settings, tiny_weights: Path) -> Study:
    return Study(ModelSpec(NAME, str(tiny_weights), KWARGS), settings)


@pytest.fixture(scope="module")
def measured(settings: Settings, vit: Study, stock_exports_made_once: Any) -> Peers:
    """Every row of a ViT with weights, and of a Swin with random ones.

    Torch compiles nothing here, which takes half a minute and is tried by `make bench`: the row has the
    model as it is.
    """
    swin = partial(Study, ModelSpec(SWIN_NAME, RANDOM, SWIN_KWARGS), settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "PEAK_SECONDS", 0.0)
        patch.setattr(peer_engines, "export_stock", stock_exports_made_once)
        patch.setattr(torch, "compile", lambda model, **options: model)
        return list(comparison.run([lambda: vit, swin], PLANS, [(1, 2)], QUICK, lambda _: None))[-1]


def test_the_comparison_so_far_is_there_after_every_run(vit: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "PEAK_SECONDS", 0.0)
    told: list[str] = []
    results = list(comparison.run([lambda: vit] * 2, PLANS[:2], [(1, 1), (1, 2)], QUICK, told.append))
    runs = [[(run.threads, run.batch) for run in model.combinations] for model in results[-1].models]
    assert runs == [[(1, 1), (1, 2)]] * 2 and len(told) == 2 * (2 + 2)
    assert [sum(len(model.combinations) for model in result.models) for result in results] == [1, 2, 3, 4]


@pytest.mark.parametrize("model", [0, 1])
def test_every_plan_has_a_row_and_what_runs_agrees(measured: Peers, model: int) -> None:
    rows = measured.models[model].rows
    assert [row.name for row in rows] == [plan.name for plan in PLANS]
    missing = [*([] if INSTALLED else OPENVINO), *([] if PROVIDED else OUR_OPENVINO)]
    # Without VNNI, ONNX Runtime 1.32 can't load what its own quantizer made of a Swin; the row says so.
    unloadable = {row.name for row in rows if row.skipped and "Attempt to replace the existing tensor" in row.skipped}
    assert unloadable <= ({"ORT static INT8"} if model == 1 else set())
    assert [row.name for row in rows if row.skipped and row.name not in unloadable] == missing
    for row in rows:
        if row.name in unloadable:
            continue
        if row.skipped:
            package = "onnxruntime-openvino" if row.family == "ours" else "'eamdeploy[bench]'"
            assert f"pip install {package}" in row.skipped
            continue
        assert row.agreement is not None and row.max_abs is not None and row.model_bytes and row.multiply_adds
        if row.arithmetic == "fp32" and row.name not in _frozen(rows):
            assert row.agreement == 100 and row.max_abs < TOLERANCES["f32-engine"].max_abs, row
        elif row.arithmetic == "int8":
            assert row.max_abs > 1e-5, row  # another function, and not the reference by mistake


def _frozen(rows: list[Row]) -> set[str]:
    return {row.name for row in rows if row.family == "ours" and row.note != "nothing frozen"}


def test_what_is_frozen_saves_multiply_adds_and_is_told(measured: Peers) -> None:
    rows = {row.name: row for row in measured.models[0].rows}
    none, half = rows["eamdeploy FP32, sparsity 0"], rows["eamdeploy FP32, sparsity 0.5"]
    assert half.note == "3 of 6 heads frozen by sensitivity" and none.note == "nothing frozen"
    assert none.multiply_adds is not None and half.multiply_adds is not None
    assert half.multiply_adds < none.multiply_adds <= (rows["torch eager"].multiply_adds or 0)


def test_labels_count_for_real_weights_alone(measured: Peers) -> None:
    real, random = measured.models
    assert real.weights == "tiny.safetensors" and random.weights == RANDOM
    assert real.reference_top1 is not None and all(row.top1 is not None for row in real.rows if not row.skipped)
    assert random.reference_top1 is None and all(row.top1 is None for row in random.rows)


def test_ours_are_set_against_the_fastest_of_each_kind(measured: Peers) -> None:
    for combination in (run for model in measured.models for run in model.combinations):
        timed = {item.name: item for item in combination.timed}
        p50 = {name: item.latency.p50_ms for name, item in timed.items()}
        stocks = {plan.name for plan in PEERS if plan.is_stock}
        assert combination.stock == min(stocks, key=p50.__getitem__) and timed[combination.stock].stock is None
        ours = timed["eamdeploy FP32, sparsity 0.5"]
        peers_timed = [plan.name for plan in PEERS if plan.name in p50]
        assert ours.best is not None and ours.best.name == min(peers_timed, key=p50.__getitem__)
        alike = [plan.name for plan in PEERS if (plan.runtime, plan.arithmetic) == ("onnxruntime", "fp32")]
        assert ours.like is not None and ours.like.name == min(alike, key=p50.__getitem__)
        assert ours.unfrozen is not None and ours.unfrozen.name == "eamdeploy FP32, sparsity 0"
        assert timed["torch eager"].best is None and timed["eamdeploy FP32, sparsity 0"].unfrozen is None
        for item in timed.values():
            assert item.times_floor == pytest.approx(item.latency.p50_ms / item.floor_ms)
            assert item.latency.batch == combination.batch


def test_the_floor_is_the_products_at_the_peak(measured: Peers) -> None:
    model = measured.models[0]
    rows = {row.name: row for row in model.rows}
    for combination in model.combinations:
        rates = {peak.arithmetic: peak.multiply_adds_per_s for peak in combination.peaks}
        for item in combination.timed:
            row = rows[item.name]
            wanted = 1e3 * combination.batch * (row.multiply_adds or 0) / rates[row.arithmetic]
            assert item.floor_ms == pytest.approx(wanted)


def test_json_table_and_picture_have_every_row(measured: Peers, tmp_path: Path) -> None:
    assert Peers.parse(measured.model_dump_json(), "peers") == measured
    console = Console(width=250, record=True)
    console.print(tables(measured))
    text = console.export_text()
    for plan in PLANS:
        timed = plan.family == "ours" and (PROVIDED or plan.name not in OUR_OPENVINO)
        wanted = 2 * (2 if timed else 1)  # two models, and the table of rivals
        assert sum(line.startswith(f"{plan.name} ") for line in text.splitlines()) == wanted, plan.name
    assert ("skipped: " in text) != (INSTALLED and PROVIDED) and "weights are random" in text and "baseline" in text
    for name in ("peers.png", "peers.svg"):
        draw(measured, tmp_path / name)
    pixels = np.asarray(Image.open(tmp_path / "peers.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0xC2, 0x41, 0x0C), (0x4B, 0x64, 0x78)):  # ours, and the peers
        assert (pixels == colour).all(axis=1).sum() > 500
    assert "<svg" in (tmp_path / "peers.svg").read_text()


def test_the_script_writes_what_it_prints(
    measured: Peers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "peers.json", tmp_path / "peers.png"
    seen: list[Any] = []

    def run(*arguments: object) -> Iterator[Peers]:
        seen.append(arguments)
        return iter([measured])

    monkeypatch.setattr(peers, "run", run)
    options = ["--keep", str(tmp_path / "keep"), "-o", str(output), "--plot", str(plot), "--threads", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["peers.py", "--weights", "w.safetensors", *options])
    peers.main()
    assert Peers.read(output) == measured and plot.exists() and "torch eager" in capsys.readouterr().out
    (studies, plans, combinations, schedule, _), *_ = seen
    specs = [study.args[0] for study in studies]
    assert specs == [ModelSpec(peers.DEIT, "w.safetensors"), ModelSpec(peers.SWIN, RANDOM)]
    assert [plan.name for plan in plans] == [plan.name for plan in (*PEERS, *our_engines.plans())]
    assert combinations == [(1, 1), (1, 8), (2, 1), (2, 8)] and schedule.min_seconds == 5
    assert len(list((tmp_path / "keep" / "noise").iterdir())) == peers.NOISE_IMAGES


# --- making ----------------------------------------------------------------------------------------------------------


def test_what_was_made_is_found_again(vit: Study, measured: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Any:
        raise AssertionError("it is there already")

    again = Study(vit.spec, vit.settings)
    monkeypatch.setattr(again, "once", lambda name, _: again.folder / name)
    for plan in PLANS:
        if plan.runtime == "openvino" and not INSTALLED:
            continue
        monkeypatch.setattr(np, "save", never)
        engine = plan.make(again)
        assert all(file.exists() for file in engine.files), plan.name
        again.logits(never, engine.folder, 1)


def test_other_inputs_have_another_folder(vit: Study, tmp_path: Path) -> None:
    for changed in (
        Study(replace(vit.spec, weights=RANDOM), vit.settings),
        Study(vit.spec, replace(vit.settings, calibration_images=5)),
        Study(vit.spec, replace(vit.settings, crop_pct=0.9)),
    ):
        assert changed.folder != vit.folder
    assert Study(vit.spec, replace(vit.settings, images=3)).folder == vit.folder
    (tmp_path / "a.py").write_text("a")
    before = code_digest(tmp_path)
    (tmp_path / "a.py").write_text("b")
    assert code_digest(tmp_path) != before


def test_what_fails_leaves_nothing_behind(vit: Study) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    before = sorted(vit.folder.iterdir())
    with pytest.raises(OSError, match="disk full"):
        vit.once("broken", fail)
    assert sorted(vit.folder.iterdir()) == before


def test_a_peer_that_fails_is_skipped_and_ours_is_not(vit: Study) -> None:
    def open_broken(threads: int, batch: int) -> AbstractContextManager[Predict]:
        raise EngineError("no compiler here")

    def broken(study: Study) -> Engine:
        return Engine(study.once("broken-engine", lambda folder: None), (), Path(), open_broken)

    plan = Plan("broken", "peer", "torch", "fp32", broken)
    assert make(plan, vit) == Skipped(plan, "no compiler here")
    with pytest.raises(EngineError, match="no compiler"):
        make(replace(plan, family="ours"), vit)


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_a_missing_package_is_named(
    package: str, vit: Study, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    fresh = Study(vit.spec, replace(settings, keep=tmp_path))  # where it was not made before
    found = make(next(plan for plan in PEERS if plan.name == OPENVINO[1]), fresh)
    assert isinstance(found, Skipped) and "not installed here" in found.reason
    assert (package if INSTALLED else "openvino") in found.reason


def test_images_that_fill_no_batch_are_filled_up(vit: Study, tmp_path: Path) -> None:
    seen = []

    def engine(images: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append(len(images))
        return images.mean(axis=(2, 3))

    logits = vit.logits(engine, tmp_path, 2)
    assert seen == [2, 2, 2] and logits.shape == (5, 3)  # five images in twos
    np.testing.assert_array_equal(vit.logits(lambda images: images, tmp_path, 2), logits)


def test_a_loaded_candidate_runs_on_the_images_given(vit: Study) -> None:
    found = make(next(plan for plan in PEERS if plan.is_stock), vit)
    assert isinstance(found, Candidate)
    with found.load(1, np.zeros((3, 3, 32, 32), np.float32)) as call:
        assert np.asarray(call()).shape == (3, 10)


def test_pauses_do_not_count() -> None:
    clock = PausableClock()
    call: Call = clock.then_pause(lambda: "result", 0.05)
    start = clock()
    assert call() == "result"
    assert summarize(np.array([clock() - start]), 1).p50_ms < 40


# --- multiply-adds and peak ------------------------------------------------------------------------------------------


def _model() -> onnx.ModelProto:
    """Conv in 2 groups, a linear layer, a product of two activations, and a Gemm that transposes its weight."""
    body = """
        patches = Conv <group = 2, strides = [3, 3]> (image, kernel)
        rows = Reshape (patches, spread)
        tokens = Transpose <perm = [0, 2, 1]> (rows)
        hidden = MatMul (tokens, weight)
        turned = Transpose <perm = [0, 2, 1]> (hidden)
        scores = MatMul (hidden, turned)
        mixed = MatMul (scores, hidden)
        pooled = ReduceMean <axes = [1], keepdims = 0> (mixed)
        logits = Gemm <transB = 1> (pooled, head)
    """
    header = '<ir_version: 8, opset_import: ["": 17]>'
    model = parser.parse_model(f"{header} g (float[B,4,6,6] image) => (float[B,5] logits) {{ {body} }}")
    for name, value in {
        "kernel": np.ones((6, 2, 3, 3), np.float32),
        "spread": np.array([0, 6, -1], np.int64),
        "weight": np.ones((6, 7), np.float32),
        "head": np.ones((5, 7), np.float32),
    }.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return model


def test_multiply_adds_of_a_graph_made_by_hand() -> None:
    found = list(floor.products(_model()))
    assert found == [
        Product(groups=2, M=4, K=2 * 9, N=3, constant=True),  # 4 places, 2 of 4 channels × 9, 3 of 6 kernels
        Product(groups=1, M=4, K=6, N=7, constant=True),
        Product(groups=1, M=4, K=7, N=4, constant=False),
        Product(groups=1, M=4, K=4, N=7, constant=False),
        Product(groups=1, M=1, K=7, N=5, constant=True),
    ]
    assert floor.count_multiply_adds(_model()) == 432 + 168 + 112 + 112 + 35


def test_a_graph_without_shapes_has_no_count() -> None:
    model = _model()
    model.graph.node[1].op_type = "Unheard"
    with pytest.raises(UnsupportedGraph, match="shapes of MatMul"):
        floor.count_multiply_adds(model)


@pytest.mark.parametrize("arithmetic", ["fp32", "int8"])
def test_the_peak_is_of_products_with_weights_at_that_batch(arithmetic: floor.Arithmetic) -> None:
    sizes = [Product(1, 4, 24, 16, True), Product(1, 400, 8, 8, False)]
    peak = floor.measure_peak(sizes, arithmetic, threads=1, batch=3, seconds=0.0)
    assert peak.size == (12, 24, 16) and peak.multiply_adds_per_s > 0 and peak.arithmetic == arithmetic


def test_the_chain_computes_in_the_arithmetic_asked_for() -> None:
    kinds = {name: {node.op_type for node in floor._chain(3, 4, 5, name).graph.node} for name in ("fp32", "int8")}
    assert kinds == {"fp32": {"MatMul"}, "int8": {"QLinearMatMul"}}
