"""INT8 engines are the same function on processors with VNNI and without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from processors import EMULATED, SATURATES_HERE, SATURATING, Job, Kind, emulation, run_on

from eamdeploy import build_ort
from eamdeploy.convert.ort_form import OrtForm, candidates
from eamdeploy.convert.ort_int8 import dynamic_int8
from eamdeploy.convert.ranges import Calibration
from eamdeploy.engines.ort.providers import installed_providers
from eamdeploy.engines.ort.runner import EXACT_PRODUCTS
from eamdeploy.engines.registry import open_runner
from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.images.preprocess import normalize
from eamdeploy.images.source import ImageSource
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.passes.base import PlannedPass, run_passes
from eamdeploy.passes.integer_map_products import IntegerMapProducts, frozen_values
from eamdeploy.passes.quantize_products import QuantizeProducts, calibrated_tensors

Results = dict[str, NDArray[np.float32]]
RunOn = Callable[[Kind], Results]

RNG = np.random.default_rng(0)
ROWS, INNER, COLUMNS = 40, 64, 48
HEADS, TOKENS, HEAD_SIZE = 2, 18, 6
KEEP_QDQ = {"session.disable_quant_qdq": "0"}
FORMS = candidates(installed_providers(), int8=True, calibrated=True)

WEIGHT = np.concatenate(
    [
        RNG.standard_normal((INNER, 16)),
        np.ones((INNER, 8)),
        -np.ones((INNER, 8)),
        np.where(np.arange(INNER)[:, None] % 2 == 0, 1.0, -1.0) * np.ones((INNER, 8)),
        RNG.standard_t(2, (INNER, 8)),
    ],
    axis=1,
).astype(np.float32)
MAPS = np.concatenate(
    [np.full((TOKENS, TOKENS), 127), np.arange(1, TOKENS + 1) ** 2 % 127 + np.zeros((TOKENS, 1), int)]
).astype(np.uint8)


def extremes(*shape: int) -> NDArray[np.float32]:
    """Integers from -128 to 127, for scales of 1, so that none is rounded; most at the ends, where sums are largest."""
    values = np.where(RNG.random(shape) < 0.3, RNG.integers(-128, 128, shape), RNG.choice([-128, 127], shape))
    values[..., 0, :], values[..., 1, :] = 127, -128
    return values.astype(np.float32)


INPUTS = {"x": extremes(ROWS, INNER), "values": extremes(1, HEADS, TOKENS, HEAD_SIZE)}

kinds = pytest.mark.parametrize("kind", ["this machine", *EMULATED])


def require(kind: Kind) -> Kind:
    """The kind, or the test is skipped and says why it can't be tried here."""
    missing = emulation(kind).missing
    if missing is not None:
        pytest.skip(missing)
    return kind


def model_of(nodes: list[onnx.NodeProto], shapes: tuple[list[int], list[int]], **constants: object) -> onnx.ModelProto:
    """From `image` to `logits`, which are twice p, so that no product is taken for a classifier's."""
    taken, given = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(("image", "logits"), shapes, strict=True)
    )
    stored = {"two": np.array(2, np.float32), **constants}
    graph = helper.make_graph(
        [*nodes, helper.make_node("Mul", ["p", "two"], ["logits"])],
        "made",
        [taken],
        [given],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def linear() -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["image", "w"], ["p"], name="product")
    return model_of([node], ([ROWS, INNER], [ROWS, COLUMNS]), w=WEIGHT)


def dynamic_full(folder: Path) -> onnx.ModelProto:
    """Weights of 8 full bits, as ONNX Runtime's quantizer makes them."""
    source, target = folder / "float.onnx", folder / "full.onnx"
    onnx.save(linear(), source)
    quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
    return onnx.load(target)


def static(*, for_pairs: bool) -> onnx.ModelProto:
    """As for ONNX Runtime, or without `for_pairs` as for TensorRT, with weights of 8 full bits."""
    graph = to_graph(linear())
    ranges = dict.fromkeys(calibrated_tensors(graph), (-127.0, 127.0))  # symmetric: scale 1
    run_passes(graph, [PlannedPass(QuantizeProducts(ranges, for_pairs=for_pairs), expected=1)])
    return to_model(graph)


def maps() -> onnx.ModelProto:
    """Frozen maps times values, as integers."""
    nodes = [
        helper.make_node("DequantizeLinear", ["maps", "scales", "zeros"], ["rows"], axis=0),
        helper.make_node("Reshape", ["rows", "shape"], ["frozen"]),
        helper.make_node("MatMul", ["frozen", "image"], ["p"], name="product"),
    ]
    shape = [1, HEADS, TOKENS, HEAD_SIZE]
    stock = model_of(
        nodes,
        (shape, shape),
        maps=MAPS,
        scales=np.ones(len(MAPS), np.float32),
        zeros=np.zeros(len(MAPS), np.uint8),
        shape=np.array([1, HEADS, TOKENS, TOKENS]),
    )
    graph = to_graph(stock)
    ranges = dict.fromkeys(frozen_values(graph), (-127.0, 127.0))
    run_passes(graph, [PlannedPass(IntegerMapProducts(ranges), expected=1)])
    return to_model(graph)


def exact(model: onnx.ModelProto) -> NDArray[np.float64]:
    """What the quantized model is, by numpy: all activations are multiples of their scale, 1."""
    stored = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    left = [item for item in stored.values() if item.dtype == np.uint8 and item.ndim == 4]
    if left:
        return np.asarray(2 * (left[0].astype(np.int64) @ INPUTS["values"].astype(np.int64)), np.float64)
    (integers,) = (item for item in stored.values() if item.dtype == np.int8 and item.ndim == 2)
    (scales,) = (item for item in stored.values() if item.dtype == np.float32 and item.shape == (COLUMNS,))
    sums = INPUTS["x"].astype(np.int64) @ integers.astype(np.int64)
    return np.asarray(2 * sums * scales.astype(np.float64))


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, onnx.ModelProto]:
    return {
        "dynamic": dynamic_int8(linear(), "x"),
        "static": static(for_pairs=True),
        "maps": maps(),
        "dynamic, 8 full bits": dynamic_full(tmp_path_factory.mktemp("full")),
        "static, 8 full bits": static(for_pairs=False),
    }


@pytest.fixture(scope="module")
def run_products(products: dict[str, onnx.ModelProto], tmp_path_factory: pytest.TempPathFactory) -> RunOn:
    """What every product gives on a kind of processor, with ONNX Runtime's own kernels and with its exact ones."""
    folder, jobs, results = tmp_path_factory.mktemp("products"), {}, {}
    for name, model in products.items():
        file, given = folder / f"{name}.onnx", "values" if name == "maps" else "x"
        onnx.save(model, file)
        jobs[name] = Job(file, given, KEEP_QDQ)
        jobs[f"{name}, exact kernels"] = Job(file, given, {**KEEP_QDQ, **EXACT_PRODUCTS})

    def run(kind: Kind) -> Results:
        if kind not in results:
            results[kind] = run_on(kind, jobs, INPUTS)
        return results[kind]

    return run


def error(got: NDArray[np.float32], model: onnx.ModelProto) -> float:
    """The largest, as a share of the largest value."""
    wanted = exact(model)
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@kinds
@pytest.mark.parametrize("name", ["dynamic", "static", "maps"])
def test_products_of_our_engines_are_exact_on_every_kind_of_processor(
    kind: Kind, name: str, products: dict[str, onnx.ModelProto], run_products: RunOn
) -> None:
    assert error(run_products(require(kind))[name], products[name]) < 1e-6


@pytest.mark.parametrize("name", ["dynamic, 8 full bits", "static, 8 full bits"])
def test_weights_of_eight_full_bits_saturate_without_vnni_and_not_with_it(
    name: str, products: dict[str, onnx.ModelProto], run_products: RunOn
) -> None:
    """So the emulation is what it claims, and what is not so in our engines matters."""
    here = error(run_products("this machine")[name], products[name])
    assert here > 0.1 if SATURATES_HERE else here < 1e-6
    tried = [kind for kind in SATURATING if emulation(kind).missing is None]
    if not tried:
        pytest.skip(str(emulation("avx2").missing))
    for kind in tried:
        assert error(run_products(kind)[name], products[name]) > 0.1, kind


@kinds
@pytest.mark.parametrize("name", ["dynamic, 8 full bits", "static, 8 full bits"])
def test_models_of_others_are_exact_with_the_setting_that_they_get(
    kind: Kind, name: str, products: dict[str, onnx.ModelProto], run_products: RunOn
) -> None:
    assert error(run_products(require(kind))[f"{name}, exact kernels"], products[name]) < 1e-6


@pytest.fixture(scope="module")
def engines(eam_model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[OrtForm, Path]:
    """The tiny model in every form that tuning may choose."""
    folder = tmp_path_factory.mktemp("forms")
    for file in (eam_model, reference_path(eam_model)):
        shutil.copy(file, folder)
    calibration = Calibration(ImageSource(pictures), cache=folder / "ranges.json")
    built = {}
    for index, form in enumerate(FORMS):
        built[form] = folder / f"{index}.ort.onnx"
        build_ort(
            folder / eam_model.name,
            built[form],
            threads=1,
            forms=[form],
            calibration=calibration if form.int8 == "static" else None,
            min_agreement=0 if form.int8 else None,
        )
    return built


@pytest.fixture(scope="module")
def run_engines(engines: dict[OrtForm, Path], eam_model: Path) -> RunOn:
    """Logits of every engine for the images of its reference set."""
    with open_runner(next(iter(engines.values()))) as runner:
        assert runner.card is not None
        images = normalize(ReferenceSet.load(reference_path(eam_model)).pixels, runner.card.preprocessing)
    results: dict[Kind, Results] = {}

    def run(kind: Kind) -> Results:
        if kind not in results:
            jobs = {form.name: Job(path, "images") for form, path in engines.items()}
            results[kind] = run_on(kind, jobs, {"images": images})
        return results[kind]

    return run


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("kind", EMULATED)
def test_every_form_that_tuning_can_choose_is_the_same_function(kind: Kind, form: OrtForm, run_engines: RunOn) -> None:
    """With AVX-512 bit for bit, as floats are computed alike; else as near as floats that are rounded otherwise allow.

    A rounding may move an activation by a step of INT8; weights of 8 full bits move these logits by 4 % of their span.
    """
    here, there = run_engines("this machine")[form.name], run_engines(require(kind))[form.name]
    difference, span = np.abs(here - there).max(), np.ptp(here)
    if kind == "avx512" and form.provider == "cpu":
        np.testing.assert_array_equal(there, here)
    assert difference <= (0.01 if form.int8 else 1e-5) * span
