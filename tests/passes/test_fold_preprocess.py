"""The pass, and everything that must cope with pixels as input: gate, engine, evaluation, profile, inspection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from attention_graphs import B, D, Floats, GraphBuilder, ints, run_unoptimized
from command_line import RunCli, only_error
from numpy.typing import NDArray
from rewriting import changed, initializers, left_alone, ops, rewritten
from timm_graphs import Export, images_of, planned_modules

from eamdeploy import build_ort, evaluate, export, inspect, profile
from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.convert.ort_form import OrtForm
from eamdeploy.convert.ranges import Calibration
from eamdeploy.convert.trt import prepare
from eamdeploy.engines.ort.runner import OrtRunner
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import ConfigError, EngineError, ParityError
from eamdeploy.graph.model import card_of, to_model
from eamdeploy.images.preprocess import normalize
from eamdeploy.images.source import ImageSource
from eamdeploy.parity.gate import TOLERANCES, compare
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.passes.base import run_passes
from eamdeploy.passes.fold_preprocess import FoldPreprocess
from eamdeploy.passes.order import plan_passes
from eamdeploy.profiling.inputs import random_images
from eamdeploy.profiling.timing import Schedule
from eamdeploy.stages.profile import Extras

HOW = Preprocessing(size=(2, 3), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
FOLD = FoldPreprocess(HOW.mean, HOW.std)
_RNG = np.random.default_rng(6)
PIXELS = _RNG.integers(0, 256, (B, 2, 3, 3), np.uint8)
WEIGHT, BIAS = _RNG.normal(0, 1, (D, 3, 1, 1)).astype(np.float32), _RNG.normal(0, 1, D).astype(np.float32)


def pixels_of(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """uint8 [B,3,H,W] of [B,H,W,3]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def run_on_pixels(model: onnx.ModelProto, pixels: NDArray[np.uint8]) -> Floats:
    return run_unoptimized(model, pixels)  # type: ignore[arg-type]


def embedded(*constants: Floats, batch: int | str = B, **attributes: object) -> onnx.ModelProto:
    """A convolution of the image, classified."""
    g = GraphBuilder(batch)
    conv = g.op("Conv", "image", *constants, **attributes)
    flat = g.op("Reshape", conv, ints(0, D, -1))
    stock = g.classify(g.op("Relu", g.op("Transpose", flat, perm=[0, 2, 1])))
    kept = [node for node in stock.graph.node if node.name not in ("Reshape_0", "Transpose_1", "MatMul_2", "Add_3")]
    del stock.graph.node[:]
    stock.graph.node.extend(kept)  # the builder's own way from the image to tokens
    return stock


@pytest.mark.parametrize("batch", [B, "batch"])
@pytest.mark.parametrize("constants", [(WEIGHT, BIAS), (WEIGHT,)], ids=["biased", "no bias"])
def test_pixels_give_what_normalized_images_gave(constants: Any, batch: int | str) -> None:
    stock = embedded(*constants, batch=batch)
    model, result = rewritten(stock, FOLD, 1)
    assert (result.nodes_after - result.nodes_before, ops(model)["Cast"]) == (1, 1)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    expected = run_unoptimized(stock, normalize(PIXELS, HOW))
    assert compare(expected, run_on_pixels(model, pixels_of(PIXELS)), TOLERANCES["f32-reassoc"]).passed


def test_every_pixel_value_is_normalized() -> None:
    stock = embedded(WEIGHT, BIAS, batch="batch")
    model, _ = rewritten(stock, FOLD, 1)
    values = np.arange(256, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    expected = run_unoptimized(stock, normalize(values, HOW))
    assert compare(expected, run_on_pixels(model, pixels_of(values)), TOLERANCES["f32-reassoc"]).passed


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_perturbed_constant_is_noticed(name: str) -> None:
    stock = embedded(WEIGHT, BIAS)
    model, _ = rewritten(stock, FOLD, 1)
    (full,) = (each for each in initializers(model) if each.endswith(f"/fold_preprocess/{name}"))
    wrong = changed(model, full, lambda values: values * np.float32(1.01))
    expected = run_unoptimized(stock, normalize(PIXELS, HOW))
    assert not compare(expected, run_on_pixels(wrong, pixels_of(PIXELS)), TOLERANCES["f32-reassoc"]).passed


# --- near misses -----------------------------------------------------------------------------------------------------

PADDED = "the convolution pads the image"
WEIGHT_OF_GROUPS = np.ones((3 * D, 1, 1, 1), np.float32)


@pytest.mark.parametrize(
    ("stock", "reason"),
    [
        (lambda: embedded(WEIGHT, BIAS, pads=[0, 0, 0, 1]), PADDED),
        (lambda: embedded(WEIGHT, BIAS, auto_pad="SAME_UPPER"), PADDED),
        (
            lambda: embedded(WEIGHT_OF_GROUPS, group=3),
            "the convolution does not sum over 3 channels",
        ),
        (lambda: GraphBuilder().classify("Add_3"), "not a convolution with constant weights"),
    ],
    ids=["padding", "same", "groups", "no convolution"],
)
def test_near_misses_are_left_alone_with_the_reason(stock: Callable[[], onnx.ModelProto], reason: str) -> None:
    assert [each.endswith(reason) for each in left_alone(stock(), FOLD)] == [True]


def test_image_that_is_read_twice_is_left_alone() -> None:
    g = GraphBuilder()
    conv = g.op("Conv", "image", WEIGHT)
    tokens = g.op("Transpose", g.op("Reshape", conv, ints(0, D, -1)), perm=[0, 2, 1])
    assert left_alone(g.classify(g.op("Add", g.x, tokens)), FOLD) == ["2 nodes read the image"]


def test_convolution_with_computed_weights_is_left_alone() -> None:
    stock = embedded(WEIGHT, BIAS, batch="batch")
    conv = next(node for node in stock.graph.node if node.op_type == "Conv")
    count = onnx.helper.make_node("Shape", ["image"], ["count"], name="count", start=0, end=1)
    factor = onnx.helper.make_node("Cast", ["count"], ["factor"], name="factor", to=onnx.TensorProto.FLOAT)
    scaled = onnx.helper.make_node("Mul", [conv.input[1], "factor"], ["scaled"], name="scaled")
    conv.input[1] = "scaled"
    for node in (scaled, factor, count):
        stock.graph.node.insert(0, node)
    assert left_alone(stock, FOLD) == ["Conv reads the image, not a convolution with constant weights"]


def test_graph_of_pixels_is_left_alone() -> None:
    model, _ = rewritten(embedded(WEIGHT, BIAS), FOLD, 1)
    assert left_alone(model, FOLD) == ["the input is no float32 image"]


# --- what torch exports ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "export_of",
    [
        *(Export(v, "torchscript", None, 17) for v in ("vit", "distilled", "avg-pool", "swin", "swin-padded")),
        Export("vit", "torchscript", 2, 17),
        Export("vit", "dynamo", None, 18),
    ],
    ids=str,
)
def test_all_passes_behind_it_find_their_places(export_of: Export) -> None:
    modules = planned_modules(export_of.variant)
    plain, folded = (export_of.graph() for _ in range(2))
    run_passes(plain, plan_passes(modules))
    run_passes(folded, plan_passes(modules, fold=FOLD))
    assert len(folded.nodes) == len(plain.nodes) + 1
    height, width = images_of(export_of.variant).shape[2:]
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    expected = run_unoptimized(to_model(plain), normalize(pixels, HOW))
    assert compare(expected, run_on_pixels(to_model(folded), pixels_of(pixels)), TOLERANCES["f32-engine"]).passed


# --- what reads such a model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folded_model(tmp_path_factory: pytest.TempPathFactory, eam_checkpoint: Path, pictures: Path) -> Path:
    """`eam_model`, and its twin, with pixels as input."""
    output = tmp_path_factory.mktemp("folded") / "tiny.onnx"
    twin, images = output.with_name("base.onnx"), ImageSource(pictures)
    done = export(eam_checkpoint, output, baseline=twin, images=images, fold_preprocess=True)
    assert done.frozen.parity.passed and done.frozen.rewrites[0] == "fold_preprocess"
    return output


@pytest.fixture(scope="module")
def folded_engine(folded_model: Path) -> Path:
    engine = folded_model.with_name("tiny.ort.onnx")
    manifest = build_ort(folded_model, engine, threads=1)
    assert manifest.parity is not None and manifest.parity.passed
    assert manifest.card is not None and manifest.card.takes_pixels
    return engine


def test_ranges_for_static_int8_are_measured_with_pixels(folded_model: Path, pictures: Path) -> None:
    engine, form = folded_model.with_name("tiny.int8.ort.onnx"), OrtForm(int8="static")
    calibration = Calibration(ImageSource(pictures))
    manifest = build_ort(folded_model, engine, forms=[form], threads=1, calibration=calibration, min_agreement=75)
    assert manifest.parity is not None and manifest.parity.passed
    assert manifest.card is not None and manifest.card.takes_pixels


def test_the_card_and_the_file_say_what_the_input_is(folded_model: Path, eam_model: Path) -> None:
    for path, type_ in ((folded_model, onnx.TensorProto.UINT8), (eam_model, onnx.TensorProto.FLOAT)):
        model = onnx.load(path)
        card = card_of(model, "it")
        assert card is not None and card.takes_pixels == (type_ == onnx.TensorProto.UINT8)
        assert model.graph.input[0].type.tensor_type.elem_type == type_
    assert inspect(folded_model).details["input"] == "image uint8 ['batch', 3, 32, 32]"


def test_the_engine_takes_the_reference_pixels_and_nothing_else(folded_engine: Path, folded_model: Path) -> None:
    reference = ReferenceSet.load(reference_path(folded_model))
    with OrtRunner(folded_engine, threads=1, settings={}) as runner:
        logits = runner.infer(pixels_of(reference.pixels))
        np.testing.assert_allclose(logits, reference.logits, atol=1e-4)
        assert random_images(runner, 3).dtype == np.uint8
        with pytest.raises(ConfigError, match=r"expected uint8 \['B', 3, 32, 32\]; got float32 \[1, 3, 32, 32\]"):
            runner.infer(np.zeros((1, 3, 32, 32), np.float32))


def test_wrong_normalization_fails_the_gate(
    eam_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = FoldPreprocess.__init__
    monkeypatch.setattr(FoldPreprocess, "__init__", lambda self, mean, std: right(self, (0.4, 0.5, 0.5), std))
    with pytest.raises(ParityError, match="parity of the exported graph"):
        export(eam_checkpoint, tmp_path / "x.onnx", fold_preprocess=True)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_gives_each_model_what_it_takes(
    folded_engine: Path, eam_checkpoint: Path, eam_engine: Path, pictures: Path
) -> None:
    images = ImageSource(pictures, limit=8)
    for model, reference in ((folded_engine, eam_engine), (eam_engine, folded_engine), (folded_engine, eam_checkpoint)):
        found = evaluate(model, images, reference=reference, threads=1)
        assert found.agreement == 100 and found.max_abs_logit_diff is not None and found.max_abs_logit_diff < 1e-3


def test_profile_measures_it_beside_an_engine_of_normalized_images(folded_engine: Path, eam_engine: Path) -> None:
    quick = Schedule(warmup_ms=1, min_seconds=0.05, min_runs=4, sittings=1)
    found = profile(
        [eam_engine, folded_engine], threads=1, schedule=quick, extras=Extras(fresh=False, power=False, layers=True)
    )
    assert len(found.engines) == 2 and all(item.layer_ms for item in found.engines)


def test_tensorrt_is_not_given_pixels(
    eam_checkpoint: Path, folded_model: Path, tmp_path: Path, run_cli: RunCli
) -> None:
    output = tmp_path / "x.onnx"
    done = run_cli("export", eam_checkpoint, "-o", output, "--target", "trt", "--fold-preprocess")
    assert "TensorRT is not given pixels; expected a float32 input; got uint8" in only_error(done, 2)
    with pytest.raises(EngineError, match="its input has to be float32"):
        prepare(folded_model, TrtVersion.parse("8.6"), TrtOptions())


def test_the_command_line(eam_checkpoint: Path, tmp_path: Path, run_cli: RunCli) -> None:
    output = tmp_path / "x.onnx"
    assert run_cli("export", eam_checkpoint, "-o", output, "--fold-preprocess", "--no-measure", "--batch", 1).code == 0
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(uint8)"
