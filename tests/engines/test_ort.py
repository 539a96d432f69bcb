from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from engine_models import build, make_frozen_model

from eamdeploy.engines.manifest import Manifest, manifest_path
from eamdeploy.engines.ort.runner import ENGINE_SETTINGS, OrtRunner
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import CheckpointError, ConfigError, EngineError

FROZEN = make_frozen_model()
IMAGES = np.random.default_rng(0).uniform(-2, 2, (2, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "eam.onnx"
    onnx.save(FROZEN.to_onnx(), path)
    return path


@pytest.fixture
def engine(model: Path) -> Path:
    output = model.with_name("eam.ort.onnx")
    build(model, output, threads=1, reference=None)
    return output


class SessionSpy:
    """Stands in for `onnxruntime.InferenceSession` and keeps the options of each session that is made."""

    def __init__(self) -> None:
        self.options: list[Any] = []
        self.providers: list[Any] = []
        self.make = onnxruntime.InferenceSession

    def __call__(self, source: Any, options: Any, providers: Any, enable_fallback: int) -> Any:
        self.options.append(options)
        self.providers.append(providers)
        return self.make(source, options, providers=providers, enable_fallback=enable_fallback)


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> SessionSpy:
    spy = SessionSpy()
    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    return spy


def test_plain_onnxruntime_opens_the_engine_and_it_holds_integers(engine: Path) -> None:
    session = onnxruntime.InferenceSession(engine, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"image": IMAGES})[0], FROZEN.forward(IMAGES), atol=1e-5)
    graph = onnx.load(engine).graph
    codes = next(tensor for tensor in graph.initializer if tensor.name == "codes")
    assert codes.data_type == onnx.TensorProto.UINT8
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(codes), FROZEN.codes)
    assert "DequantizeLinear" in {node.op_type for node in graph.node}


def test_engine_runs_with_the_settings_and_threads_of_its_manifest(
    model: Path, engine: Path, sessions: SessionSpy
) -> None:
    build(model, engine, threads=2, reference=None)
    with open_runner(engine) as runner:
        assert dict(runner.settings) == Manifest.read(manifest_path(engine)).settings
    built, opened = sessions.options
    for options in (built, opened):
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
        assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert sessions.providers == [[("CPUExecutionProvider", {})]] * 2


def test_model_without_manifest_runs_with_the_runtimes_defaults(model: Path, sessions: SessionSpy) -> None:
    with open_runner(model, threads=1) as runner:
        assert "session.disable_quant_qdq" not in runner.settings
    (options,) = sessions.options
    with pytest.raises(RuntimeError, match="disable_quant_qdq"):
        options.get_session_config_entry("session.disable_quant_qdq")


def test_settings_fold_the_maps_at_load_and_change_no_bit(model: Path, tmp_path: Path, sessions: SessionSpy) -> None:
    with (
        OrtRunner(model, threads=1, settings={}) as plain,
        OrtRunner(model, threads=1, settings=ENGINE_SETTINGS) as ours,
    ):
        np.testing.assert_array_equal(plain.infer(IMAGES), ours.infer(IMAGES))
    operators = []
    for index, options in enumerate(sessions.options):
        options.optimized_model_filepath = str(tmp_path / f"optimized{index}.onnx")
        sessions.make(str(model), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
        operators.append({node.op_type for node in graph.node})
    assert "DequantizeLinear" in operators[0]
    assert "DequantizeLinear" not in operators[1]


@pytest.mark.parametrize("level", ["disable", "basic", "extended", "all"])
def test_every_optimization_level_runs(model: Path, level: str) -> None:
    with OrtRunner(model, threads=1, settings={"graph_optimization_level": level}) as runner:
        np.testing.assert_allclose(runner.infer(IMAGES), FROZEN.forward(IMAGES), atol=1e-5)


def test_unknown_optimization_level_is_refused(model: Path) -> None:
    with pytest.raises(EngineError, match=r"graph_optimization_level.*all.*got fastest"):
        OrtRunner(model, threads=1, settings={"graph_optimization_level": "fastest"})


def test_a_model_given_as_bytes_reads_no_second_file_even_from_the_models_folder(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = model.with_name("split.onnx")
    onnx.save(FROZEN.to_onnx(), split, save_as_external_data=True, location="split.data", size_threshold=100)
    with OrtRunner(split, threads=1, settings={}) as runner:
        assert runner.infer(IMAGES).shape == (2, 5)
    monkeypatch.chdir(model.parent)
    with pytest.raises(EngineError, match="second file"):
        OrtRunner(split.read_bytes(), threads=1, settings={})


def test_damaged_card_is_refused(model: Path) -> None:
    graph = onnx.load(model)
    graph.metadata_props[0].value = '{"timm_model": 3}'
    onnx.save(graph, model)
    with pytest.raises(CheckpointError, match=r"eam\.onnx: metadata eamdeploy"):
        open_runner(model, threads=1)


def test_output_needs_the_name_of_an_onnx_file(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.onnx"):
        build(model, model.with_name("eam.engine"), threads=1, reference=None)


def change_input(graph: onnx.GraphProto, dim: int) -> None:
    graph.input[0].type.tensor_type.shape.dim[dim].dim_param = "any"


def add_input(graph: onnx.GraphProto) -> None:
    graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))


def add_output(graph: onnx.GraphProto) -> None:
    graph.output.append(onnx.helper.make_tensor_value_info("pooled", onnx.TensorProto.FLOAT, ["batch", 16]))


def double_input(graph: onnx.GraphProto) -> None:
    graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    graph.node.insert(0, onnx.helper.make_node("Cast", ["image"], ["image32"], to=onnx.TensorProto.FLOAT))
    graph.node[1].input[0] = "image32"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda graph: change_input(graph, 2), "only B may vary"),
        (add_input, "2 inputs"),
        (add_output, "2 outputs"),
        (double_input, r"tensor\(double\)"),
    ],
    ids=["height", "inputs", "outputs", "double"],
)
def test_models_that_are_no_image_classifiers_are_refused(model: Path, change: Any, reason: str) -> None:
    proto = onnx.load(model)
    change(proto.graph)
    onnx.save(proto, model)
    with pytest.raises(EngineError, match=reason):
        open_runner(model, threads=1)


def test_output_that_is_no_logits_is_refused(model: Path) -> None:
    proto = onnx.load(model)
    proto.graph.output[0].name = "merged"
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("merged", onnx.TensorProto.FLOAT, ["b", 4, 16]))
    onnx.save(proto, model)
    with open_runner(model, threads=1) as runner, pytest.raises(EngineError, match=r"no logits.*\[2, 4, 16\]"):
        runner.infer(IMAGES)


def test_failure_while_running_is_one_line_with_the_name(model: Path) -> None:
    proto = onnx.load(model)
    shape = next(tensor for tensor in proto.graph.initializer if tensor.name == "merged_shape")
    shape.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 4, 16]), "merged_shape"))
    onnx.save(proto, model)
    with open_runner(model, threads=1) as runner, pytest.raises(EngineError, match=r"failed to run .*eam\.onnx") as err:
        runner.infer(IMAGES)
    assert "\n" not in str(err.value)
