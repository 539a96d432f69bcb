"""The builder is asked for what was decided, in every generation, and its failures are told."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from engine_models import CARD, FrozenModel
from fake_tensorrt import GENERATIONS, read_plan
from onnx import TensorProto, numpy_helper
from trt_workshop import FROZEN, Workshop, make_workshop, named, with_int8_activations, with_softmax

from eamdeploy.artifacts import onnx_files
from eamdeploy.artifacts.onnx_files import digest_model
from eamdeploy.engines.manifest import Manifest, manifest_path
from eamdeploy.engines.trt.backend import _is_mostly_fp32
from eamdeploy.engines.trt.request import ModelFacts, TrtOptions, make_request
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import ConfigError, DeviceError, EngineError, ParityError

FP16 = TrtOptions(precision="fp16")


@pytest.fixture(params=GENERATIONS)
def workshop(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return make_workshop(tmp_path, monkeypatch, request.param)


@pytest.fixture
def ten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    return make_workshop(tmp_path, monkeypatch)


def softmax_model() -> onnx.ModelProto:
    return named(with_softmax(FROZEN.to_onnx()))


def on_8(workshop: Workshop) -> bool:
    return str(workshop.machine.trt.fake.version).startswith("8")


def short(names: list[str]) -> list[str]:
    return [name.rpartition("/")[2] for name in names]


def test_every_generation_builds_checks_and_describes(workshop: Workshop) -> None:
    manifest = workshop.build()
    generation = workshop.machine.trt.fake.version
    assert manifest.parity is not None
    assert (manifest.parity.tolerance, manifest.parity.passed, manifest.parity.n) == ("f32-engine", True, 6)
    assert (manifest.backend, manifest.batch, manifest.card) == ("trt", None, CARD)
    device = manifest.device
    assert device is not None
    assert (device.runtime, device.gpu, device.compute_capability) == (generation, "Orin", "8.7")
    assert device.device_memory_bytes == (4096 if on_8(workshop) else 8192)
    maps = "frozen maps as FP32" if on_8(workshop) else "frozen maps as INT8"
    assert device.model_changes == [maps]
    assert manifest.versions["tensorrt"] == generation
    assert Manifest.read(manifest_path(workshop.engine)) == manifest
    assert workshop.notes == [f"for TensorRT {generation}: {maps}"]


def test_what_the_parser_gets_has_int8_maps_from_10_on(workshop: Workshop) -> None:
    workshop.build()
    model = onnx.load_model_from_string(read_plan(workshop.engine.read_bytes())[1])
    if on_8(workshop):
        assert {item.data_type for item in model.graph.initializer} == {TensorProto.FLOAT, TensorProto.INT64}
        return
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    types = {item.name: item.data_type for item in model.graph.initializer}
    assert [types[name] for name in node.input] == [TensorProto.INT8, TensorProto.FLOAT, TensorProto.INT8]
    assert onnx.load(workshop.model).graph.initializer != model.graph.initializer


def test_fp16_below_11_constrains_layers_and_from_11_converts_the_model(workshop: Workshop) -> None:
    workshop.save(softmax_model())
    manifest = workshop.build(FP16, check=False)
    asked, data = read_plan(workshop.engine.read_bytes())
    model = onnx.load_model_from_string(data)
    kept = ["mean", "centred", "square", "variance", "shifted", "deviation", "normal"]
    assert manifest.settings["keep_fp32"] == "norm"
    if workshop.machine.trt.fake.version.startswith("11"):
        assert asked["flags"] == ["TF32"] and asked["fp32"] == []
        types = {
            item.name: item.type.tensor_type.elem_type
            for item in onnx.shape_inference.infer_shapes(model).graph.value_info
        }
        wide = {node.name for node in model.graph.node if types.get(node.output[0]) == TensorProto.FLOAT}
        assert set(kept) <= set(short(list(wide)))
        assert types["mixed"] == TensorProto.FLOAT16 and types["grid"] == TensorProto.FLOAT16
        assert model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
        assert model.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    else:
        int8 = [] if on_8(workshop) else ["INT8"]
        assert asked["flags"] == ["FP16", *int8, "OBEY_PRECISION_CONSTRAINTS", "TF32"]
        assert short(asked["fp32"]) == kept
        assert short(asked["fp32_outputs"]) == kept[:-1]
        assert TensorProto.FLOAT16 not in {item.data_type for item in model.graph.initializer}


def test_fp16_engine_is_held_to_top_1(workshop: Workshop) -> None:
    manifest = workshop.build(FP16)
    assert manifest.parity is not None
    assert (manifest.parity.tolerance, manifest.parity.top1_agreement) == ("reduced-engine", 100)
    assert manifest.parity.max_abs is not None and manifest.parity.max_abs > 2e-3  # FP32's tolerance would refuse it
    assert manifest.device is not None and manifest.device.precision == "fp16"


def test_fp16_engine_with_another_first_class_is_not_written(workshop: Workshop) -> None:
    workshop.build()
    before = workshop.engine.read_bytes(), manifest_path(workshop.engine).read_bytes()
    graph = onnx.load(workshop.model)
    head = next(item for item in graph.graph.initializer if item.name == "head")
    head.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(head), "head"))
    workshop.save(graph)
    with pytest.raises(ParityError, match=r"first class equal for 0 %.*Don't use it; try --keep-fp32 norm-softmax, or"):
        workshop.build(FP16)
    with pytest.raises(ParityError, match=r"first class equal for 0 %.*Don't use it; compare the ONNX model"):
        workshop.build(replace(FP16, keep_fp32="norm-softmax"))
    assert before == (workshop.engine.read_bytes(), manifest_path(workshop.engine).read_bytes())


def test_fp16_engine_as_large_as_fp32s_is_said(workshop: Workshop) -> None:
    workshop.build(FP16)  # a fake's engine holds the model that it was given
    said = [note for note in workshop.notes if "most of it computes in FP32, though FP16 is allowed" in note]
    chooses = not str(workshop.machine.trt.fake.version).startswith("11")
    assert len(said) == chooses
    assert not chooses or "eam.plan.log" in said[0]


@pytest.mark.parametrize(
    ("options", "plan_bytes", "mostly"),
    [
        (TrtOptions(precision="fp16"), 570, False),
        (TrtOptions(precision="fp16"), 1100, True),
        (TrtOptions(precision="bf16"), 1100, True),
        (TrtOptions(precision="fp32"), 1100, False),
        (TrtOptions(precision="fp16", int8=True), 1100, False),  # the model's weights are INT8
    ],
)
def test_the_size_tells_what_an_engine_computes_in(options: TrtOptions, plan_bytes: int, mostly: bool) -> None:
    facts = ModelFacts("x", (None, 3, 8, 8), nodes=(), dequantizes=options.int8, quantizes=options.int8)
    request = make_request(TrtVersion.parse("10.3"), options, facts, [])
    assert _is_mostly_fp32(request, plan_bytes, 1000) is mostly


def test_maps_that_had_to_be_requantized_are_held_to_top_1_and_said(ten: Workshop) -> None:
    squares = FROZEN.codes.astype(np.int64).clip(0, 15) ** 2
    frozen = FrozenModel(
        FROZEN.patch, squares.astype(np.uint8), (1 / squares.sum(axis=1)).astype(np.float32), FROZEN.head
    )
    ten.save(named(frozen.to_onnx()))
    reference = ten.model.with_name("squares.npz")
    frozen.reference().save(reference)
    manifest = ten.build(reference=reference)
    assert manifest.parity is not None and manifest.parity.tolerance == "reduced-engine"
    assert manifest.device is not None
    assert manifest.device.model_changes == ["frozen maps requantized to integers up to 127", "frozen maps as INT8"]


def test_all_options_reach_the_builder(workshop: Workshop) -> None:
    cache = workshop.engine.with_name("t.cache")
    options = TrtOptions(
        workspace_bytes=1 << 20,
        timing_cache=cache,
        min_batch=2,
        opt_batch=3,
        max_batch=4,
        builder_level=5,
        version_compatible=True,
        hardware_compatible=True,
    )
    manifest = workshop.build(options)
    asked = workshop.asked()
    assert asked["pools"] == {"WORKSPACE": 1 << 20}
    assert asked["profile"] == {"image": [[2, 3, 8, 8], [3, 3, 8, 8], [4, 3, 8, 8]]}
    assert (asked["level"], asked["compatibility"], asked["verbosity"]) == (5, "AMPERE_PLUS", "DETAILED")
    assert "VERSION_COMPATIBLE" in asked["flags"] and "TF32" not in asked["flags"]
    assert cache.exists()
    assert manifest.device is not None
    assert manifest.device.version_compatible and manifest.device.hardware_compatible


def test_fixed_batch_needs_no_profile(workshop: Workshop) -> None:
    workshop.save(named(FROZEN.to_onnx(batch=2)))
    assert workshop.build().batch == 2
    assert workshop.asked()["profile"] is None


def test_frozen_maps_are_found_in_the_engine_whatever_became_of_them(workshop: Workshop) -> None:
    for options in (TrtOptions(), FP16):
        manifest = workshop.build(options)
        assert manifest.device is not None and manifest.device.engine_layers is not None
        found = [(item.layer or "nowhere", item.type) for item in manifest.device.engine_layers.frozen_maps]
        if on_8(workshop):  # the float constant is named by the layers that read it
            assert found and all(layer.endswith(("/maps", "/mixed")) for layer, _ in found)
        else:
            ((layer, kind),) = found
            assert layer.endswith("/rows") and kind == "Half"


def test_frozen_maps_of_a_version_without_int8_constants_are_found_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = make_workshop(tmp_path, monkeypatch, "8.6", version="8.5.2")
    manifest = workshop.build()
    assert manifest.device is not None and manifest.device.engine_layers is not None
    assert manifest.device.model_changes == ["frozen maps as FP32"]
    layers = {item.layer for item in manifest.device.engine_layers.frozen_maps}
    assert layers and all(layer is not None and layer.endswith(("/maps", "/mixed")) for layer in layers)
    assert "INT8" not in workshop.asked()["flags"]


def test_layer_times_and_the_twins_size_are_noted(ten: Workshop) -> None:
    twin = ten.engine.with_name("base.plan")
    ten.engine, engine = twin, ten.engine
    built = ten.build()
    ten.engine = engine
    manifest = ten.build(TrtOptions(layer_profile=True), baseline=twin)
    assert manifest.device is not None and manifest.device.baseline is not None
    assert manifest.device.layer_ms == {"first": 0.25, "second": 0.5}
    assert built.device is not None and built.device.engine_layers is not None
    assert manifest.device.baseline.layers == built.device.engine_layers.layers > 0
    assert (manifest.device.baseline.engine, manifest.device.baseline.engine_bytes) == ("base.plan", built.engine_bytes)


def test_baseline_without_manifest_is_refused_before_the_build(ten: Workshop) -> None:
    twin = ten.engine.with_name("base.plan")
    twin.write_bytes(b"plan")
    with pytest.raises(ConfigError, match=r"no manifest beside \S*base\.plan"):
        ten.build(baseline=twin)
    assert not ten.engine.exists()


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_failed_build_tells_its_last_errors_the_node_and_the_memory(workshop: Workshop) -> None:
    workshop.build()
    before = workshop.engine.read_bytes()
    node = next(node.name for node in onnx.load(workshop.model).graph.node if node.op_type == "Conv")
    workshop.machine.trt.fake.build_error = (
        f"10: Could not find any implementation for node {node} + another.\n2nd line"
    )
    with pytest.raises(EngineError) as caught:
        workshop.build()
    message = str(caught.value)
    assert f"TensorRT could not build an engine, at Conv {node}: 10: Could not find" in message
    assert "GB main memory" in message and "--workspace" in message and "\n" not in message
    assert workshop.engine.read_bytes() == before


def test_int8_constants_in_an_fp16_engine_of_8_6_fail_with_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = make_workshop(tmp_path, monkeypatch, "8.6")
    foreign = FROZEN.to_onnx(card=None)
    codes = next(item for item in foreign.graph.initializer if item.name == "codes")
    codes.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(codes).clip(0, 127).astype(np.int8), "codes"))
    zeros = next(node for node in foreign.graph.node if node.op_type == "DequantizeLinear").input[2]
    zero = next(item for item in foreign.graph.initializer if item.name == zeros)
    zero.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(zero).astype(np.int8), zeros))
    workshop.save(named(foreign))
    with pytest.raises(EngineError, match=r"kINT8 failed\. \); free: .* TensorRT 8\.6\.0 without cuBLAS built no FP16"):
        workshop.build(FP16, check=False)
    assert workshop.build(check=False).engine_bytes > 0


def test_class_token_that_8_6_cannot_join_fails_with_what_is_known(ten: Workshop) -> None:
    said = "[graphShapeAnalyzer.cpp] Error Code 4: Miscellaneous (node_cat: error while computing output extent)"
    ten.machine.trt.fake.parse_error = said
    with pytest.raises(
        EngineError, match=r"output extent\)\. TensorRT 8\.6\.0 can't join a class token.*`eamdeploy lint"
    ):
        ten.build()


def test_failure_that_was_never_met_has_the_usual_hint_alone(ten: Workshop) -> None:
    ten.machine.trt.fake.build_error = "it broke"
    with pytest.raises(EngineError, match=r"it broke; free: [^;]*GB main memory\. The whole log"):
        ten.build()


def test_builder_that_does_not_start_is_told(ten: Workshop) -> None:
    ten.machine.trt.fake.starts = False
    with pytest.raises(EngineError, match="builder can't start"):
        ten.build()


def test_parser_names_the_node_that_it_refuses(ten: Workshop) -> None:
    foreign = named(FROZEN.to_onnx(card=None))  # not ours, so not converted
    ten.save(foreign)
    node = next(node.name for node in foreign.graph.node if node.op_type == "DequantizeLinear")
    with pytest.raises(EngineError, match=rf"parser can't read.*DequantizeLinear {node}: .*UINT8.*eamdeploy lint"):
        ten.build(check=False)
    assert not ten.engine.exists()


def test_log_lies_beside_the_engine_also_after_a_failure_and_goes_to_pythons_logging(
    ten: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    ten.machine.trt.fake.build_error = "it broke"
    with caplog.at_level(logging.INFO, "eamdeploy.tensorrt"), pytest.raises(EngineError):
        ten.build()
    text = ten.engine.with_name("eam.plan.log").read_text()
    assert text == "[INFO] building\n[WARNING] this may go wrong\n[ERROR] it broke\n"
    levels = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert levels == [("INFO", "building"), ("WARNING", "this may go wrong"), ("ERROR", "it broke")]


def test_log_on_a_full_disk_does_not_fail_the_build(ten: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk:
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    original = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: FullDisk() if self.suffix == ".log" else original(self, *a, **k)
    )
    assert ten.build().engine_bytes > 0


def test_log_that_cannot_be_written_is_an_error_before_the_build(ten: Workshop) -> None:
    ten.engine.with_name("eam.plan.log").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write \S*eam\.plan\.log"):
        ten.build()


def test_gpu_memory_that_is_full_is_told_and_nothing_leaks(ten: Workshop) -> None:
    from fake_tensorrt.cuda import Code

    ten.machine.cuda.failing["cudaMalloc"] = Code(2, "cudaErrorMemoryAllocation")
    with pytest.raises(DeviceError, match=r"cudaMalloc failed.*memory is full"):
        ten.build()
    assert ten.machine.cuda.memory == {} and ten.machine.cuda.alive == set()


@pytest.mark.parametrize("name", ["x.onnx", "x", "x.plan.gz"])
def test_engine_needs_the_name_of_a_plan(ten: Workshop, name: str) -> None:
    ten.engine = ten.engine.with_name(name)
    with pytest.raises(ConfigError, match=r"\.plan or \.engine"):
        ten.build()


def test_killed_while_writing_leaves_the_old_engine(ten: Workshop) -> None:
    ten.build()
    before = {path.name: path.read_bytes() for path in ten.engine.parent.iterdir()}
    child = os.fork()
    if child == 0:
        os.fsync = lambda descriptor: os._exit(9)  # type: ignore[assignment]  # in the midst of publishing
        try:
            ten.build(FP16)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    after = {path.name: path.read_bytes() for path in ten.engine.parent.iterdir()}
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("limit", [onnx_files.ONE_FILE_BYTES, 1000], ids=["parsed as one", "parsed as two"])
def test_model_with_data_in_a_second_file(ten: Workshop, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ten.build()
    onnx.save(named(FROZEN.to_onnx()), ten.model, save_as_external_data=True, location="eam.data", size_threshold=100)
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", limit)
    two = ten.build()
    assert two.parity is not None and two.parity == one.parity
    assert two.model_digest == digest_model(ten.model) != one.model_digest
    assert not [path.name for path in ten.engine.parent.iterdir() if path.name.startswith(".")]
    (ten.model.parent / "eam.data").unlink()
    with pytest.raises(ConfigError, match=r"eam\.onnx keeps its weights in eam\.data, which is not beside it"):
        ten.build()


def test_input_that_is_no_image_is_refused(ten: Workshop) -> None:
    model = FROZEN.to_onnx(card=None)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    ten.save(model)
    with pytest.raises(EngineError, match="only B may vary"):
        ten.build(check=False)


def test_quantized_activations_are_built_with_int8(ten: Workshop) -> None:
    ten.save(named(with_int8_activations(FROZEN.to_onnx())))
    manifest = ten.build(TrtOptions(int8=True), check=False)
    assert manifest.device is not None and manifest.device.int8
    assert manifest.device.engine_layers is not None and len(manifest.device.engine_layers.frozen_maps) == 1
    assert json.loads(manifest.model_dump_json())["settings"]["int8"] == "True"
