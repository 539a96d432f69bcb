"""Forms of a model for ONNX Runtime, and `build-ort --tune`, which keeps the fastest of them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from attention_graphs import HEIGHT, WIDTH, GraphBuilder, H, N, ints
from command_line import RunCli, only_error
from engine_models import CARD

from eamdeploy import build_ort
from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.onnx_files import ModelData, read_model
from eamdeploy.convert.ort import convert
from eamdeploy.convert.ort_form import AS_EXPORTED, OrtForm, candidates
from eamdeploy.convert.ranges import Calibration
from eamdeploy.engines.manifest import Manifest, TriedForm, manifest_path
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import ConfigError, EngineError, ParityError, UnsupportedGraph
from eamdeploy.graph.model import card_of, with_card
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT
from eamdeploy.parity.gate import TOLERANCES
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.profiling.timing import Schedule, SpeedUp
from eamdeploy.stages.ort_forms import Request, build, fastest

QUICK = Schedule(warmup_ms=0, min_seconds=0, min_runs=8, sittings=2)
FUSED = OrtForm(fused_attention=True)
STATIC = OrtForm(int8="static")
ON_OPENVINO = OrtForm(int8="static", provider="openvino")


@pytest.fixture
def model(eam_model: Path, tmp_path: Path) -> Path:
    for file in (eam_model, reference_path(eam_model)):
        shutil.copy(file, tmp_path)
    return tmp_path / eam_model.name


needs_openvino = pytest.mark.skipif(
    "OpenVINOExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="the installed ONNX Runtime has no OpenVINO: pip uninstall onnxruntime && pip install onnxruntime-openvino",
)


@pytest.fixture
def calibration(pictures: Path, tmp_path: Path) -> Calibration:
    return Calibration(ImageSource(pictures), cache=tmp_path / "ranges.json")


def request(model: Path, calibration: Calibration | None = None) -> Request:
    return Request(
        model=model,
        output=model.with_name("x.ort.onnx"),
        threads=1,
        calibration=calibration,
        reference=ReferenceSet.load(reference_path(model)),
        reduced=TOLERANCES["f32-engine"],  # that no INT8 form keeps
    )


def operators(engine: Path) -> set[str]:
    return {node.op_type for node in onnx.load(engine).graph.node}


def names(manifest: Manifest) -> list[str]:
    assert manifest.tried is not None
    return [tried.form for tried in manifest.tried]


@pytest.mark.parametrize(
    ("form", "rewrites", "operator"),
    [
        (FUSED, ["fused_attention"], "MultiHeadAttention"),
        (OrtForm(int8="dynamic"), ["dynamic_int8"], "MatMulInteger"),
        (OrtForm(True, "dynamic"), ["fused_attention", "dynamic_int8"], "MultiHeadAttention"),
        (STATIC, ["integer_map_products", "quantize_products"], "QuantizeLinear"),
        (
            OrtForm(True, "static"),
            ["integer_map_products", "fused_attention", "quantize_products"],
            "MultiHeadAttention",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, OrtForm) else None,
)
def test_every_form_is_built_checked_and_named(
    model: Path, calibration: Calibration, form: OrtForm, rewrites: list[str], operator: str
) -> None:
    engine = model.with_name("x.ort.onnx")
    reduced = 75.0 if form.int8 else None
    images = calibration if form.int8 == "static" else None
    manifest = build_ort(model, engine, forms=[form], threads=1, calibration=images, min_agreement=reduced)
    assert manifest.card is not None and manifest.card.rewrites[-len(rewrites) :] == rewrites
    assert manifest.parity is not None and manifest.parity.passed and manifest.tried is None
    assert operator in operators(engine)
    assert manifest.settings["session.disable_quant_qdq"] == ("0" if form.int8 == "static" else "1")
    with open_runner(engine) as runner:
        assert runner.infer(np.zeros((3, *runner.io.input_shape[1:]), np.float32)).shape == (3, 10)


def test_ranges_are_kept_beside_the_engine_and_used_again(model: Path, pictures: Path) -> None:
    engine = model.with_name("x.ort.onnx")
    build_ort(model, engine, forms=[STATIC], calibration=Calibration(ImageSource(pictures)), min_agreement=0)
    kept = engine.with_name("x.ort.onnx.ranges.json")
    written = kept.stat().st_mtime_ns
    build_ort(model, engine, forms=[STATIC], calibration=Calibration(ImageSource(pictures)), min_agreement=0)
    assert kept.stat().st_mtime_ns == written


def test_candidates_are_the_forms_that_the_options_and_providers_allow() -> None:
    assert candidates(["cpu"], int8=False, calibrated=True) == [AS_EXPORTED, FUSED]
    assert [form.name for form in candidates(["cpu", "openvino"], int8=False, calibrated=False)] == [
        *("as exported", "fused attention", "as exported on openvino"),
    ]
    assert {form.int8 for form in candidates(["cpu"], int8=True, calibrated=False)} == {None, "dynamic"}
    assert {form.int8 for form in candidates(["cpu"], int8=True, calibrated=True)} == {None, "dynamic", "static"}
    assert candidates(["openvino"], int8=True, calibrated=False) == [OrtForm(provider="openvino")]


def speed_up(median: float, margin: float) -> SpeedUp:
    spread = {"p5": median, "p25": median, "p75": median, "p95": median}
    return SpeedUp(rounds=9, sittings=2, median=median, low=median - margin, high=median + margin, **spread)


def test_a_later_form_is_kept_only_where_it_is_faster_for_certain() -> None:
    assert fastest([None]) == 0
    assert fastest([None, speed_up(1.1, 0.2)]) == 0
    assert fastest([None, speed_up(0.8, 0.1)]) == 0
    assert fastest([None, speed_up(1.1, 0.05), speed_up(1.3, 0.1), speed_up(1.4, 0.5)]) == 2


def test_tuning_keeps_one_form_and_all_times(model: Path) -> None:
    asked = request(model)
    manifest = build(asked, candidates(["cpu"], int8=False, calibrated=False), SILENT, QUICK)
    assert Manifest.read(manifest_path(asked.output)) == manifest
    assert names(manifest) == ["as exported", "fused attention"] and manifest.tried is not None
    first, second = manifest.tried
    assert first.p50_ms is not None and first.p50_ms > 0 and first.speed_up is None
    assert second.low is not None and second.high is not None and second.low <= second.high
    (chosen,) = [tried for tried in manifest.tried if tried.chosen]
    made_of = [tried.made_of for tried in manifest.tried]
    assert made_of == [AS_EXPORTED.record, OrtForm(fused_attention=True).record]
    assert (chosen.form == "fused attention") == ("MultiHeadAttention" in operators(asked.output))


def test_a_form_that_fails_the_gate_is_named_and_never_chosen(model: Path, calibration: Calibration) -> None:
    asked = request(model, calibration)
    manifest = build(asked, [AS_EXPORTED, OrtForm(int8="dynamic"), STATIC], SILENT, QUICK)
    assert manifest.tried is not None
    assert [(tried.chosen, tried.p50_ms is None) for tried in manifest.tried] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    assert [tried.made_of and tried.made_of.int8 for tried in manifest.tried] == [
        None,
        "dynamic",
        "static",
    ]
    assert all("logits" in str(tried.refused) or "parity" in str(tried.refused) for tried in manifest.tried[1:])
    assert manifest.engine_digest == manifest.model_digest


def test_where_no_form_passes_nothing_is_written_and_the_first_reason_given(model: Path) -> None:
    loaded = ReferenceSet.load(reference_path(model))
    dataclasses.replace(loaded, logits=-loaded.logits).save(reference_path(model))
    asked = request(model)
    with pytest.raises(ParityError):
        build(asked, [AS_EXPORTED, FUSED], SILENT, QUICK)
    assert not asked.output.exists() and not manifest_path(asked.output).exists()


def test_what_can_not_be_converted(model: Path, calibration: Calibration) -> None:
    data = read_model(model)
    with pytest.raises(EngineError, match="x: it is damaged or no ONNX model"):
        convert(ModelData(b"no model"), FUSED, "x")
    with pytest.raises(ConfigError, match=r"x can't be calibrated.*--calib-data"):
        convert(data, STATIC, "x")
    with pytest.raises(UnsupportedGraph, match="x has no live attention that can be fused"):
        convert(convert(data, FUSED, "x"), FUSED, "x")
    with pytest.raises(ConfigError, match="is quantized already"):
        convert(convert(data, STATIC, "x", calibration), OrtForm(int8="dynamic"), "x")
    assert convert(data, AS_EXPORTED, "x") is data


def test_maps_that_stay_floats_are_one_constant_in_static_int8(calibration: Calibration) -> None:
    """Two products read them, so that they can't be integers; the reshape behind them is folded."""
    g = GraphBuilder()
    rows = g.op("DequantizeLinear", np.ones((H * N, N), np.uint8), np.full(H * N, 1 / N, np.float32), axis=0)
    maps = g.op("Reshape", rows, ints(1, H, N, N))
    context = g.op("Add", g.op("MatMul", maps, g.values()), g.op("MatMul", maps, g.values()))
    how = Preprocessing(size=(HEIGHT, WIDTH), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    card = CARD.model_copy(update={"preprocessing": how})
    stock = with_card(g.classify(g.project(g.merge_heads(context))), card)
    made = onnx.load_from_string(convert(ModelData(stock.SerializeToString()), STATIC, "x", calibration).model)
    done = card_of(made, "x")
    assert done is not None and done.rewrites == ["float_maps", "quantize_products"]
    constants = {item.name for item in made.graph.initializer}
    assert {node.op_type for node in made.graph.node if constants.issuperset(node.input)} == {"DequantizeLinear"}


def test_dynamic_int8_alone_gets_the_file_as_it_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[onnx.ModelProto] = []

    def quantizer(stock: onnx.ModelProto, _: str) -> onnx.ModelProto:
        given.append(stock)
        return stock

    monkeypatch.setattr("eamdeploy.convert.ort.dynamic_int8", quantizer)
    for form in (OrtForm(int8="dynamic"), OrtForm(True, "dynamic")):
        convert(read_model(model), form, "x")
    assert [stock == onnx.load(model) for stock in given] == [True, False]


def test_the_command_line_tunes_and_shows_what_it_tried(model: Path, run_cli: RunCli) -> None:
    engine = model.with_name("x.ort.onnx")
    built = run_cli("build-ort", model, "-o", engine, "--tune", "--threads", 1)
    assert built.code == 0, built.err
    assert "tried here  as exported:" in built.out and "fused attention:" in built.out and "chosen" in built.out
    assert "building: fused attention" in built.err


def test_options_that_are_of_no_use_are_refused(model: Path, pictures: Path, run_cli: RunCli) -> None:
    engine = model.with_name("x.ort.onnx")
    refused = run_cli("build-ort", model, "-o", engine, "--calib-data", pictures)
    assert "calibration images are of use for INT8 alone" in only_error(refused, 2)


def test_a_form_and_tuning_are_one_too_many_and_no_form_too_few(model: Path, run_cli: RunCli) -> None:
    engine = model.with_name("x.ort.onnx")
    refused = run_cli("build-ort", model, "-o", engine, "--tune", "--fused-attention")
    assert "tuning tries fused attention too" in only_error(refused, 2)
    with pytest.raises(ConfigError, match="there is nothing to build"):
        build_ort(model, engine, forms=[])


def test_a_missing_folder_is_found_before_anything_is_built(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eamdeploy.engines.ort.build.check", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(ConfigError, match="no such folder"):
        build_ort(model, model.parent / "absent" / "x.ort.onnx", forms=[AS_EXPORTED, FUSED])


def test_data_in_a_second_file_is_refused(model: Path) -> None:
    loaded = onnx.load(model)
    loaded.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    with pytest.raises(EngineError, match="keeps data in a second file"):
        convert(ModelData(loaded.SerializeToString()), FUSED, "x")


def test_an_old_manifest_without_what_was_tried_is_still_read(model: Path) -> None:
    manifest = build_ort(model, model.with_name("x.ort.onnx"), threads=1)
    text = manifest.model_dump_json(exclude={"tried"})
    assert Manifest.parse(text, "x") == manifest
    assert TriedForm(form="as exported").refused is None


@needs_openvino
def test_static_int8_on_openvino(model: Path, calibration: Calibration) -> None:
    engine = model.with_name("x.ov.onnx")
    manifest = build_ort(model, engine, threads=1, forms=[ON_OPENVINO], calibration=calibration, min_agreement=0)
    assert manifest.provider == "openvino" and manifest.settings["session.disable_quant_qdq"] == "0"
    with open_runner(engine) as runner:
        assert len(runner.layer_times(np.zeros((1, *runner.io.input_shape[1:]), np.float32), 1)) == 1


def test_the_command_line_tunes_on_all_providers_or_on_the_one_that_is_named(
    model: Path, pictures: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[OrtForm]] = []

    def build(request: Request, forms: list[OrtForm], observer: object) -> Manifest:
        tried.append(forms)
        raise ConfigError("that is enough")

    available = ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr("eamdeploy.stages.ort_forms.build", build)
    tune = ["build-ort", model, "-o", model.with_name("x.onnx"), "--tune", "--int8", "--calib-data", pictures]
    assert run_cli(*tune).code == run_cli(*tune, "--provider", "openvino").code == 2
    everywhere, there = tried
    assert [form.name for form in everywhere] == [
        *("as exported", "fused attention", "dynamic INT8", "fused attention, dynamic INT8", "static INT8"),
        *("fused attention, static INT8", "as exported on openvino", "static INT8 on openvino"),
    ]
    assert there == [OrtForm(provider="openvino"), ON_OPENVINO]
