"""The main job on real weights and photographs, measured. Takes minutes on a small machine.

Even-numbered photographs calibrate, odd-numbered ones measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from eamdeploy import build_ort, evaluate, export, freeze, inspect
from eamdeploy.devices.provenance import usable_cores
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.quantizers import integer_values
from eamdeploy.engines.registry import open_runner
from eamdeploy.host import freezing
from eamdeploy.host.calibrate import look, predict
from eamdeploy.host.model import ModelSpec
from eamdeploy.host.reference import load_reference
from eamdeploy.images.options import PreprocessingOverrides
from eamdeploy.images.preprocess import normalize
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT
from eamdeploy.parity.accuracy import top_k_hits

pytestmark = pytest.mark.timeout(1500)

NAME = "deit_tiny_patch16_224"
OVERRIDES = PreprocessingOverrides(crop_pct=0.875)
# 32 images for the sensitivity keep this file under two minutes; at 4 bits 24 to 64 images choose the same heads
VARIANTS = {
    "row-entropy 4 bits": FreezeOptions(sparsity=0.2, score="row-entropy"),
    "sensitivity 4 bits": FreezeOptions(sparsity=0.2, score_images=32),
    "sensitivity 2 bits": FreezeOptions(sparsity=0.2, score_images=32, bits=2),
    "rows": FreezeOptions(sparsity=0.2, granularity="row", score_images=64),
    "entries": FreezeOptions(sparsity=0.2, granularity="entry", score_images=64),
}
MAIN = "sensitivity 4 bits"
N_ENGINE = 200

Floats = NDArray[np.float32]


@pytest.fixture(scope="module", autouse=True)
def every_core() -> Iterator[None]:
    """The other tests' models are too small for more than one thread; this one is not."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photographs(shared_data: Path) -> Path:
    return shared_data / "imagenet_sample"


@pytest.fixture(scope="module")
def frozen(shared_data: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every variant; what the 500 photographs show of the maps is the same for all of them."""
    seen: list[Any] = []

    def look_once(*arguments: Any, **options: Any) -> Any:
        if not seen:
            seen.append(look(*arguments, **options))
        return seen[0]

    spec = ModelSpec(NAME, str(shared_data / f"{NAME}.fp16.safetensors"))
    folder = tmp_path_factory.mktemp("real")
    files = {name: folder / f"{index}.eam.safetensors" for index, name in enumerate(VARIANTS)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(freezing, "look", look_once)
        for name, file in files.items():
            header = freeze(spec, ImageSource(photographs, "even"), file, VARIANTS[name], overrides=OVERRIDES)
            assert header.calibration is not None and header.calibration.n_images == 500
            if header.freezing.granularity == "head":
                assert sum(map(len, header.freezing.heads.values())) == 7
    return files


@dataclass(frozen=True, eq=False)
class Measured:
    """Logits of the 500 odd-numbered photographs by model, and their labels."""

    logits: dict[str, Floats]
    labels: NDArray[np.int64]

    def top1(self, model: str) -> float:
        return 100 * float(np.mean(top_k_hits(self.logits[model], self.labels, 1)))

    def agreement(self, model: str) -> float:
        return 100 * float(np.mean(self.logits[model].argmax(1) == self.logits["stock"].argmax(1)))


@pytest.fixture(scope="module")
def measured(frozen: dict[str, Path], photographs: Path) -> Measured:
    """One pass over the photographs through the stock model and every variant's reference forward."""
    loaded = {name: checkpoints.load(file) for name, file in frozen.items()}
    how = loaded[MAIN].header.preprocessing
    models = {name: load_reference(each, frozen=True, where=name).model for name, each in loaded.items()}
    models["stock"] = load_reference(loaded[MAIN], frozen=False, where="stock").model
    logits: dict[str, list[Floats]] = {name: [] for name in models}
    labels = []
    for images, batch_labels in odd_batches(photographs, how, None):
        labels.append(batch_labels)
        for name, model in models.items():
            logits[name].append(predict(model, images))
    return Measured({name: np.concatenate(parts) for name, parts in logits.items()}, np.concatenate(labels))


def odd_batches(photographs: Path, how: Any, limit: int | None) -> Iterator[tuple[Floats, NDArray[np.int64]]]:
    source = ImageSource(photographs, "odd", limit)
    for batch in source.batches(source.open_labelled(1000, None), how, 20, SILENT):
        assert batch.labels is not None
        yield normalize(batch.pixels, how), batch.labels


@pytest.fixture(scope="module")
def model(frozen: dict[str, Path], photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main variant as ONNX, checked on 8 calibration photographs."""
    output = tmp_path_factory.mktemp("real model") / "x.onnx"
    result = export(frozen[MAIN], output, images=ImageSource(photographs, "even", 8))
    assert result.frozen.parity.passed and result.frozen.parity.n == 8
    return output


@pytest.fixture(scope="module")
def engine(model: Path) -> Path:
    return build(model)


def build(model: Path) -> Path:
    output = model.with_suffix(".ort.onnx")
    manifest = build_ort(model, output)
    assert manifest.parity is not None and manifest.parity.passed
    return output


# --- accuracy --------------------------------------------------------------------------------------------------------


def test_stock_accuracy(measured: Measured) -> None:
    assert len(measured.labels) == 500 and set(measured.labels % 2) == {1}
    assert measured.top1("stock") == pytest.approx(79.0, abs=0.4)


def test_row_entropy_at_4_bits(measured: Measured) -> None:
    assert measured.top1("row-entropy 4 bits") >= measured.top1("stock") - 1.2


def test_sensitivity_at_4_bits(measured: Measured) -> None:
    assert measured.agreement("sensitivity 4 bits") >= 91
    assert abs(measured.top1("sensitivity 4 bits") - measured.top1("stock")) <= 1.0


def test_sensitivity_at_2_bits(measured: Measured) -> None:
    assert measured.agreement("sensitivity 2 bits") >= 89


def test_rows(measured: Measured) -> None:
    assert measured.agreement("rows") >= 93.5
    assert measured.top1("rows") >= measured.top1("stock") - 1.0


def test_entries(measured: Measured) -> None:
    assert measured.agreement("entries") >= 95
    assert measured.top1("entries") >= measured.top1("stock") - 0.5


def test_scores_rank_differently(frozen: dict[str, Path], measured: Measured) -> None:
    heads = {name: checkpoints.load(file).header.freezing.heads for name, file in frozen.items()}
    assert heads["row-entropy 4 bits"] != heads["sensitivity 4 bits"]
    assert all(measured.agreement(name) < 100 for name in VARIANTS)


# --- the ONNX model and the engine -----------------------------------------------------------------------------------


def test_model_is_valid_and_holds_integers_and_no_query_or_key_of_a_frozen_head(
    frozen: dict[str, Path], model: Path
) -> None:
    checkpoint = checkpoints.load(frozen[MAIN])
    proto = onnx.load(model)
    onnx.checker.check_model(
        onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True), full_check=True
    )
    values = {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}
    dequantized = [values[node.input[0]] for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    assert len(dequantized) == len(checkpoint.frozen)
    data = model.read_bytes()
    for item in checkpoint.frozen.values():
        integers = integer_values(item.codes, "squared").reshape(-1, 197)
        assert any(array.dtype == np.uint8 and np.array_equal(array, integers) for array in dequantized)
        assert integers.tobytes() in data
    rows = np.concatenate(
        [each for value in values.values() if value.ndim == 2 for each in (value, value.T) if each.shape[1] == 192]
    )
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    for path, shape in checkpoint.header.attention.items():
        weight = checkpoint.weights[f"{path}.qkv.weight"][: 2 * 192].astype(np.float32)
        weight = weight / np.linalg.norm(weight, axis=1, keepdims=True)
        present = (np.abs(weight @ rows.T).max(axis=1) > 1 - 1e-5).reshape(2, shape.heads, 64).any(axis=(0, 2))
        heads = set(checkpoint.header.freezing.heads.get(path, []))
        assert set(np.flatnonzero(present)) == set(range(shape.heads)) - heads, path
    assert inspect(model).details["integer map constants"] == len(checkpoint.frozen)


def test_engine_computes_the_reference_forward(engine: Path, measured: Measured, photographs: Path) -> None:
    compare(engine, MAIN, N_ENGINE, measured, photographs)


@pytest.mark.parametrize("granularity", ["rows", "entries"])
def test_engine_with_frozen_parts_computes_the_reference_forward(
    granularity: str, frozen: dict[str, Path], measured: Measured, photographs: Path, tmp_path: Path
) -> None:
    export(frozen[granularity], tmp_path / "x.onnx", images=ImageSource(photographs, "even", 8))
    compare(build(tmp_path / "x.onnx"), granularity, 100, measured, photographs)


def compare(engine: Path, variant: str, n: int, measured: Measured, photographs: Path) -> None:
    """The engine's logits for the first `n` odd photographs are those of the variant's reference forward."""
    with open_runner(engine) as runner:
        assert runner.card is not None
        batches = odd_batches(photographs, runner.card.preprocessing, None)
        got = np.concatenate([runner.infer(images) for images, _ in (next(batches) for _ in range(n // 20))])
    wanted = measured.logits[variant][:n]
    assert got.shape == wanted.shape == (n, 1000)
    assert np.array_equal(got.argmax(axis=1), wanted.argmax(axis=1))
    assert np.abs(got - wanted).max() <= 2e-3


def test_evaluate_gives_the_same_figures(engine: Path, measured: Measured, photographs: Path) -> None:
    report = evaluate(engine, ImageSource(photographs, "odd", 50))
    picked = [index * 500 // 50 for index in range(50)]
    assert report.top1 == 100 * np.mean(top_k_hits(measured.logits[MAIN][picked], measured.labels[picked], 1))
    assert report.top5 == 100 * np.mean(top_k_hits(measured.logits[MAIN][picked], measured.labels[picked], 5))
