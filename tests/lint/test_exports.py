"""Our own exports for TensorRT have no error findings, and no warnings but the one that their granularity deserves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import RunCli, only_error
from lint_models import found
from rewriting import initializers
from timm_graphs import Export
from tiny_models import KWARGS, NAME, SWIN_KWARGS, SWIN_NAME, make_model, save_weights

from eamdeploy import export, freeze
from eamdeploy.artifacts.card import ModelCard
from eamdeploy.convert.trt_passes import plan_trt
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import ConfigError
from eamdeploy.graph.model import card_of
from eamdeploy.host.model import ModelSpec
from eamdeploy.images.source import ImageSource
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.vocabulary import Exporter

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (NAME, KWARGS),
    "swin": (SWIN_NAME, {**SWIN_KWARGS, "embed_dim": 32}),  # heads of 16 channels, the least that TensorRT fuses
}
TESTED_BY = {"8.5": ("8.5",), "8.6": ("8.6", "10.3", "11.4"), "10.3": ("10.3", "11.4")}  # versions for one graph
WARNINGS = {"head": set(), "row": set(), "entry": {"attention-mixed"}}


@pytest.fixture(scope="module", params=[(model, each) for model in MODELS for each in WARNINGS], ids="-".join)
def frozen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pictures: Path
) -> tuple[Path, str]:
    """A checkpoint with 4-bit squared maps, and its granularity."""
    kind, granularity = request.param
    name, kwargs = MODELS[kind]
    folder = tmp_path_factory.mktemp("frozen")
    weights = save_weights(make_model(name, {"embed_dim": kwargs["embed_dim"]}), folder / "x.safetensors")
    options = FreezeOptions(sparsity=0.4, granularity=granularity, window_maps="class", score="random")
    checkpoint = folder / "x.eam.safetensors"
    freeze(ModelSpec(name, str(weights), kwargs), ImageSource(pictures, limit=6), checkpoint, options)
    return checkpoint, granularity


@pytest.mark.parametrize("target", TESTED_BY)
def test_our_exports_are_clean(target: str, frozen: tuple[Path, str], pictures: Path, tmp_path: Path) -> None:
    """The parity gate inside `export` compares them with the reference forward."""
    checkpoint, granularity = frozen
    output, twin = tmp_path / "x.onnx", tmp_path / "base.onnx" if granularity == "head" else None
    done = export(
        checkpoint, output, baseline=twin, trt=TrtVersion.parse(target), images=ImageSource(pictures, limit=6)
    )
    assert done.frozen.parity.passed
    model = onnx.load(output)
    assert model.opset_import[0].version == (16 if target == "8.5" else 17)
    for version in TESTED_BY[target]:
        assert {finding.rule for finding in found(model, version)} == WARNINGS[granularity], version
        assert twin is None or found(onnx.load(twin), version) == []
    integers = target == "10.3"
    assert any(item.dtype == np.int8 for item in initializers(model).values()) is integers
    assert ("int8_maps" if integers else "float_maps") in card(model).rewrites


def test_one_graph_is_for_all_versions_from_10_on() -> None:
    plans = [[type(item.rewrite_pass) for item in plan_trt(TrtVersion.parse(text))] for text in TESTED_BY["10.3"]]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("exporter", "batch", "rules"),
    [("dynamo", None, {"expanded-tokens"}), ("torchscript", None, set()), ("dynamo", 2, set())],
)
def test_class_token_of_torchs_exporters(exporter: Exporter, batch: int | None, rules: set[str]) -> None:
    """TensorRT 8.6.0 refused the first and took the second; it was not given the third."""
    stock = Export("vit", exporter, batch, 17).model()
    assert {finding.rule for finding in found(stock, "8.6") if finding.severity == "error"} == rules
    assert "expanded-tokens" not in {finding.rule for finding in found(stock, "10.3")}


def card(model: onnx.ModelProto) -> ModelCard:
    result = card_of(model, "the model")
    assert result is not None
    return result


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, pictures: Path) -> Path:
    output = tmp_path_factory.mktemp("wide") / "x.eam.safetensors"
    options = FreezeOptions(sparsity=0.5, score="random", bits=8)
    freeze(ModelSpec(NAME, str(tiny_weights), KWARGS), ImageSource(pictures), output, options)
    return output


def test_maps_quantized_anew_are_named_and_are_the_references_too(eight_bits: Path, tmp_path: Path) -> None:
    """Squared 8-bit codes need UINT16 and opset 21 for ONNX Runtime; for TensorRT they become INT8."""
    ours, theirs = tmp_path / "trt.onnx", tmp_path / "ort.onnx"
    done = export(eight_bits, ours, trt=TrtVersion.parse("10.3"), batch=1)
    export(eight_bits, theirs, opset=21, batch=1)
    assert done.frozen.parity.passed and done.frozen.rewrites[0] == "requantize_maps"
    made, stock = card(onnx.load(ours)), card(onnx.load(theirs))
    assert "requantize_maps" in made.rewrites and "requantize_maps" not in stock.rewrites
    assert made.freezing == stock.freezing  # what was frozen, as the checkpoint says
    expected, got = (ReferenceSet.load(reference_path(path)).logits for path in (theirs, ours))
    assert 1e-4 < np.abs(expected - got).max() < 0.1 * np.ptp(expected)


def test_the_opset_must_be_one_that_tensorrt_knows(eight_bits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"TensorRT 8\.6 does not know that opset; expected at most 17; got 18"):
        export(eight_bits, tmp_path / "x.onnx", trt=TrtVersion.parse("8.6"), opset=18)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(run_cli: RunCli, eam_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "x.onnx"
    made = run_cli("export", eam_checkpoint, "-o", output, "--target", "trt", "--trt", "10.3", "--batch", 1)
    assert made.code == 0 and "int8_maps" in made.out
    assert run_cli("lint", output, "--trt", "10.3").code == 0
    by_default = run_cli("export", eam_checkpoint, "-o", output, "--target", "trt", "--batch", 1)
    assert by_default.code == 0 and "float_maps" in by_default.out
    assert run_cli("export", eam_checkpoint, "-o", output, "--target", "trt", "--trt", "8.5", "--batch", 1).code == 0
    assert run_cli("lint", output, "--trt", "8.5").code == 0
    wrong = run_cli("export", eam_checkpoint, "-o", output, "--trt", "8.6")
    assert "--trt; expected --target trt beside it" in only_error(wrong, 2)
