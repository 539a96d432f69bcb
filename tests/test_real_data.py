"""The main job on real DeiT-Tiny weights and 1000 photographs: even images calibrate, odd images measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from eamdeploy import build_ort, export, freeze
from eamdeploy.accuracy import same_top1, top_k_hits
from eamdeploy.artifact import Preprocessing
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.quantizers import integer_values
from eamdeploy.engines.registry import open_runner
from eamdeploy.folder import open_folder
from eamdeploy.host.calibrate import predict
from eamdeploy.host.freezing import FreezeOptions, Score
from eamdeploy.host.model import ModelSpec, PreprocessingOverrides
from eamdeploy.host.reference import load_reference
from eamdeploy.images import iter_batches, normalize
from eamdeploy.source import ImageSource

STOCK_TOP1 = 79.0
ENGINE_IMAGES = 200
Freeze = Callable[[Score, int], Path]


@pytest.fixture(scope="module")
def odd(shared_data: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The 500 odd images, normalized [500, 3, 224, 224], and their labels."""
    imagenet = Preprocessing(size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), crop_pct=0.875)
    folder = open_folder(shared_data / "imagenet_sample", 1000, split="odd")
    batches = list(iter_batches(folder, imagenet, 50))
    pixels = np.concatenate([batch.pixels for batch in batches])
    return normalize(pixels, imagenet), np.concatenate([batch.labels for batch in batches if batch.labels is not None])


@pytest.fixture(scope="module")
def frozen(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Freeze:
    """Makes the checkpoint of a score and a width, 20 % of heads, squared, from the even images; each only once."""
    folder = tmp_path_factory.mktemp("real")

    def make(score: Score, bits: int) -> Path:
        path = folder / f"{score}-{bits}.eam.safetensors"
        if not path.exists():
            freeze(
                ModelSpec("deit_tiny_patch16_224", str(shared_data / "deit_tiny_patch16_224.fp16.safetensors")),
                ImageSource(shared_data / "imagenet_sample", split="even"),
                path,
                FreezeOptions(score=score, bits=bits, score_images=64),  # type: ignore[arg-type]
                overrides=PreprocessingOverrides(crop_pct=0.875),
            )
        return path

    return make


@pytest.fixture(scope="module")
def stock(frozen: Freeze, odd: tuple[NDArray[np.float32], Any]) -> NDArray[np.float32]:
    """Logits [500, 1000] of the unfrozen model for the odd images."""
    return _logits(frozen("row-entropy", 4), odd[0], live=True)


def _logits(checkpoint: Path, images: NDArray[np.float32], *, live: bool = False) -> NDArray[np.float32]:
    torch.set_num_threads(2)
    model = load_reference(checkpoints.load(checkpoint), frozen=not live, where=str(checkpoint)).model
    return np.concatenate([predict(model, images[start : start + 20]) for start in range(0, len(images), 20)])


def _top1(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    return 100 * float(top_k_hits(logits, labels, 1).mean())


def test_stock_model_has_the_accuracy_it_is_known_for(
    stock: NDArray[np.float32], odd: tuple[Any, NDArray[np.int64]]
) -> None:
    assert _top1(stock, odd[1]) == pytest.approx(STOCK_TOP1, abs=0.4)


@pytest.mark.parametrize(
    ("score", "bits", "least_agreement", "most_lost"),
    [("sensitivity", 4, 91.0, 1.0), ("row-entropy", 4, 0.0, 1.2), ("sensitivity", 2, 89.0, 100.0)],
)
def test_a_fifth_of_the_heads_frozen_keeps_agreement_and_accuracy(
    score: Score,
    bits: int,
    least_agreement: float,
    most_lost: float,
    frozen: Freeze,
    stock: NDArray[np.float32],
    odd: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> None:
    checkpoint = frozen(score, bits)
    assert sum(map(len, checkpoints.load(checkpoint).header.freezing.heads.values())) == 7  # 19.4 % of 36
    logits = _logits(checkpoint, odd[0])
    assert 100 * float(same_top1(stock, logits).mean()) >= least_agreement
    assert (
        _top1(logits, odd[1]) >= _top1(stock, odd[1]) - most_lost - 1e-9
    )  # percentages of 500 are not exact in binary


@pytest.fixture(scope="module")
def exported(frozen: Freeze, shared_data: Path) -> Path:
    """The ONNX model of the 4-bit row-entropy checkpoint, with real reference images."""
    checkpoint = frozen("row-entropy", 4)
    model = checkpoint.with_name("real.onnx")
    export(checkpoint, model, images=ImageSource(shared_data / "imagenet_sample", split="even"))
    return model


def test_engine_equals_the_reference_forward_on_real_images(
    exported: Path, frozen: Freeze, odd: tuple[NDArray[np.float32], Any]
) -> None:
    engine = exported.with_suffix(".ort.onnx")
    manifest = build_ort(exported, engine, threads=2)
    assert manifest.parity is not None and manifest.parity.passed
    images = odd[0][:ENGINE_IMAGES]
    expected = _logits(frozen("row-entropy", 4), images)
    with open_runner(engine, threads=2) as runner:
        got = np.concatenate([runner.infer(images[start : start + 20]) for start in range(0, len(images), 20)])
    assert (got.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert np.abs(got - expected).max() <= 2e-3


def test_onnx_holds_the_integers_and_no_query_or_key_of_a_frozen_head(exported: Path, frozen: Freeze) -> None:
    model = onnx.load(str(exported))
    onnx.checker.check_model(model, full_check=True)
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    dequantized = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    columns = np.concatenate(
        [c.T for c in constants.values() if c.ndim == 2 and c.dtype == np.float32 and len(c) == 192]
    )
    in_file = {column.tobytes() for column in columns}
    checkpoint = checkpoints.load(frozen("row-entropy", 4))
    for path, maps in checkpoint.frozen.items():
        integers = integer_values(maps.codes, "squared").reshape(-1, 197)
        stored = [constants[name] for name in dequantized if constants[name].shape == integers.shape]
        assert any(item.dtype == np.uint8 and np.array_equal(item, integers) for item in stored), path
        rows = checkpoint.weights[f"{path}.qkv.weight"].reshape(3, 3, 64, 192)  # q, k, v; head; d; D
        for head in range(3):
            present = [all(row.tobytes() in in_file for row in rows[kind, head]) for kind in range(3)]
            is_live = head not in maps.heads
            assert present == [is_live, is_live, True], (path, head)


def test_frozen_maps_make_the_file_smaller_than_its_unfrozen_twin(exported: Path, frozen: Freeze) -> None:
    """7 heads: 2·64 rows of 192 floats gone from each, 197·197 bytes and 197 scales added."""
    twin = exported.with_name("twin.onnx")
    export(frozen("row-entropy", 4), exported.with_name("again.onnx"), baseline=twin)
    saved = twin.stat().st_size - exported.stat().st_size
    exact = 7 * (2 * 64 * (192 + 1) * 4 - 197 * (197 + 4 + 1))
    assert saved == pytest.approx(exact, abs=20_000)  # node names and metadata differ
