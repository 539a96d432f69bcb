"""Every granularity, kind of window maps, sparsity, exporter and batch computes what the reference forward does.

`export` itself compares the rewritten graph with torch on real pictures and raises if a top-1 or a logit differs; here
the finished file is compared once more, on ONNX Runtime as a user would run it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from tiny_models import FAMILY, KWARGS, SWIN_FAMILY, SWIN_KWARGS, images, make_model, save_weights

from eamdeploy import export, freeze
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.errors import ParityError
from eamdeploy.host.calibrate import predict
from eamdeploy.host.model import ModelSpec
from eamdeploy.host.reference import load_reference
from eamdeploy.host.stock_export import StockExport, export_stock
from eamdeploy.images.source import ImageSource
from eamdeploy.stages import export as exporting
from eamdeploy.vocabulary import Exporter

GRANULARITIES, WINDOW_MAPS, SPARSITIES = ("head", "row", "entry"), ("shared", "class", "window"), (0.2, 0.5, 1.0)
TARGETS: tuple[tuple[Exporter, int | None], ...] = (
    ("dynamo", None),
    ("torchscript", 4),
    ("torchscript", None),
    ("dynamo", 1),
    ("torchscript", 1),
    ("dynamo", 4),
)
OTHERS = [kind for kind in SWIN_FAMILY if kind != "swin"]
VITS = ("distilled", "registers", "average pooling", "deit-3", "pre-norm")
"""Those of which other tokens are read, or embedded otherwise."""


@pytest.fixture(scope="module", autouse=True)
def stock_exports_made_once() -> Iterator[None]:
    """Torch writes each model once; what differs between the cases below is ours."""

    @cache
    def stock(kind: str, batch: int | None, opset: int, exporter: Exporter) -> tuple[bytes, str]:
        made = export_stock(model_of(kind), size_of(kind), batch=batch, opset=opset, exporter=exporter)
        return made.model.SerializeToString(), made.exporter

    def cached(model: Any, _: object, *, batch: int | None, opset: int, exporter: Exporter) -> StockExport:
        data, name = stock(kind_of(model), batch, opset, exporter)
        return StockExport(onnx.load_from_string(data), name)

    patch = pytest.MonkeyPatch()
    patch.setattr(exporting, "export_stock", cached)
    yield
    patch.undo()


@cache
def model_of(kind: str) -> Any:
    name, changes = {**FAMILY, **SWIN_FAMILY}[kind]
    return make_model(name, changes)


def size_of(kind: str) -> tuple[int, int]:
    height, width = model_of(kind).patch_embed.img_size
    return int(height), int(width)


def kind_of(model: Any) -> str:
    """The kind whose weights `model` has."""
    weight = model.patch_embed.proj.weight
    candidates = [
        kind for kind in ("swin", "vit", *OTHERS, *VITS) if model_of(kind).patch_embed.proj.weight.equal(weight)
    ]
    size = model.patch_embed.img_size
    (found,) = [
        kind for kind in candidates if model_of(kind).patch_embed.img_size == size and str(model_of(kind)) == str(model)
    ]
    return found


@cache
def weights_of(kind: str, folder: Path) -> Path:
    path: Path = save_weights(model_of(kind), folder / f"{len(list(folder.iterdir()))}.safetensors")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def check(kind: str, options: FreezeOptions, targets: Any, pictures: Path, folder: Path, work: Path) -> None:
    """The checkpoint of `options` exports to every target, and the files compute the reference forward."""
    name, changes = {**FAMILY, **SWIN_FAMILY}[kind]
    base = SWIN_KWARGS if name.startswith("swin") else KWARGS
    checkpoint = work / "x.eam.safetensors"
    source = ImageSource(pictures, limit=8)
    freeze(ModelSpec(name, str(weights_of(kind, folder)), {**base, **changes}), source, checkpoint, options)
    shown = images(4, size_of(kind)).numpy()
    reference = load_reference(checkpoints.load(checkpoint), frozen=True, where="x").model
    expected = predict(reference, shown)
    for exporter, batch in targets:
        output = work / "x.onnx"
        done = export(checkpoint, output, batch=batch, opset=18, exporter=exporter, images=source)
        assert done.frozen.parity.passed
        logits = run(output, shown, batch or 4)
        np.testing.assert_allclose(logits, expected, atol=1e-4)
        np.testing.assert_array_equal(logits.argmax(axis=1), expected.argmax(axis=1))


def run(file: Path, shown: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"image": shown[i : i + batch]})[0] for i in range(0, len(shown), batch)]
    return np.concatenate(parts)


CASES = [
    (*case, TARGETS[number % 6 :: 3][:2])
    for number, case in enumerate(itertools.product(GRANULARITIES, WINDOW_MAPS, SPARSITIES))
]


@pytest.mark.parametrize(("granularity", "window_maps", "sparsity", "targets"), CASES)
def test_swin(
    granularity: Any, window_maps: Any, sparsity: float, targets: Any, pictures: Path, folder: Path, tmp_path: Path
) -> None:
    options = FreezeOptions(sparsity=sparsity, granularity=granularity, window_maps=window_maps, score="random")
    check("swin", options, targets, pictures, folder, tmp_path)


def test_swin_with_nothing_frozen(pictures: Path, folder: Path, tmp_path: Path) -> None:
    check("swin", FreezeOptions(sparsity=0, score="random"), TARGETS, pictures, folder, tmp_path)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_swins(kind: str, granularity: Any, pictures: Path, folder: Path, tmp_path: Path) -> None:
    options = FreezeOptions(sparsity=0.5, granularity=granularity, window_maps="class", score="random")
    check(kind, options, TARGETS[1:4:2], pictures, folder, tmp_path)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind", VITS)
def test_other_vits(kind: str, granularity: Any, pictures: Path, folder: Path, tmp_path: Path) -> None:
    options = FreezeOptions(sparsity=0.5, granularity=granularity, score="random")
    targets = TARGETS if granularity == "head" else TARGETS[1:4:2]
    check(kind, options, targets, pictures, folder, tmp_path)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_vit(granularity: Any, sparsity: float, pictures: Path, folder: Path, tmp_path: Path) -> None:
    options = FreezeOptions(sparsity=sparsity, granularity=granularity, score="random")
    check("vit", options, TARGETS[:2], pictures, folder, tmp_path)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_wrong_constant_fails_the_gate(
    granularity: Any, pictures: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the parity above would prove nothing."""
    from eamdeploy.graph import emit_parts

    right = emit_parts.emit_maps

    def wrong(writer: Any, name: str, integers: Any, scales: Any) -> Any:
        return right(writer, name, integers, scales * np.float32(1.5))

    for module in ("emit", "emit_partial"):
        monkeypatch.setattr(f"eamdeploy.graph.{module}.emit_maps", wrong)
    options = FreezeOptions(sparsity=0.5, granularity=granularity, score="random")
    with pytest.raises(ParityError):
        check("swin", options, TARGETS[:1], pictures, folder, tmp_path)
