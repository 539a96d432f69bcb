"""`freeze --rank`: from photographs to proved graphs of heads of low rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from command_line import RunCli, only_error
from lint_models import found
from rewriting import initializers
from tiny_models import KWARGS, NAME, SWIN_KWARGS, SWIN_NAME, TOKENS, make_model, save_weights

from eamdeploy import analyze, export, freeze
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.kinds import AUTO_KINDS
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.records import Checkpoint
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import ConfigError
from eamdeploy.host.model import ModelSpec
from eamdeploy.host.reference import load_reference
from eamdeploy.images.source import ImageSource
from eamdeploy.stages.freeze import read_shares
from eamdeploy.stages.inspect import inspect
from eamdeploy.vocabulary import Bits, Exporter

FAST = FreezeOptions(sparsity=0.7, score="row-entropy", rank="4")


@pytest.fixture
def spec(tiny_weights: Path) -> ModelSpec:
    return ModelSpec(NAME, str(tiny_weights), KWARGS)


@pytest.fixture
def source(pictures: Path) -> ImageSource:
    return ImageSource(pictures, limit=6)


@pytest.fixture
def swin(tmp_path: Path) -> ModelSpec:
    weights = save_weights(make_model(SWIN_NAME), tmp_path / "swin.safetensors")
    return ModelSpec(SWIN_NAME, str(weights), SWIN_KWARGS)


def frozen_heads(made: Checkpoint) -> dict[str, list[int | None]]:
    freezing = made.header.freezing
    return {p: [freezing.rank_of(p, h) for h in heads] for p, heads in freezing.heads.items()}


def test_every_chosen_head_has_the_rank(spec: ModelSpec, source: ImageSource, tmp_path: Path) -> None:
    output = tmp_path / "x.eam.safetensors"
    header = freeze(spec, source, output, FAST)
    made = checkpoints.load(output)
    assert made.header == header and not made.frozen
    assert {rank for ranks in frozen_heads(made).values() for rank in ranks} == {4}
    assert header.freezing.low_rank == {4: 4} and header.freezing.sparsity == 4 / 6
    whole = freeze(spec, source, tmp_path / "w.eam.safetensors", replace(FAST, rank="none"))
    assert whole.freezing.heads == header.freezing.heads, "the maps decide, not the kind"
    assert whole.freezing.cost is not None and header.freezing.cost is not None
    assert whole.freezing.cost != header.freezing.cost
    assert read_shares(output) == {p: [1] * len(h) for p, h in header.freezing.heads.items()}
    details = inspect(output).details
    assert details["frozen map bytes"] == 0
    assert details["factor bytes"] == 4 * 2 * TOKENS * 4 // 2  # mix and pool, 4 bits a code
    assert "with rank 4" in str(details["heads of low rank"])


def test_more_rank_is_nearer_to_the_map(spec: ModelSpec, source: ImageSource, tmp_path: Path) -> None:
    """Up to what 8 bits can say, rank N is the whole map."""
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = {}
    for rank in ("none", "1", "4", str(TOKENS)):
        output = tmp_path / f"{rank}.eam.safetensors"
        freeze(spec, source, output, replace(FAST, rank=rank, bits=8))
        model = load_reference(checkpoints.load(output), frozen=True, where="x").model
        with torch.inference_mode():
            logits[rank] = model(images).numpy()
    far = [np.abs(logits[r] - logits["none"]).mean() for r in ("1", "4", str(TOKENS))]
    assert far[0] > 1.5 * far[1] and far[1] > 5 * far[2]


def test_auto_weighs_what_each_kind_costs_and_saves(spec: ModelSpec, source: ImageSource, tmp_path: Path) -> None:
    options = FreezeOptions(sparsity=0.7, rank="auto", score_images=4)
    freeze(spec, source, tmp_path / "x.eam.safetensors", options)
    made = checkpoints.load(tmp_path / "x.eam.safetensors")
    kinds = [rank for ranks in frozen_heads(made).values() for rank in ranks]
    assert len(kinds) == 4 and set(kinds) <= {*AUTO_KINDS}
    assert any(kind is not None for kind in kinds)
    again = freeze(spec, source, tmp_path / "y.eam.safetensors", options)
    assert again == made.header, "the same input gives the same kinds"
    assert analyze(spec, source, options).frozen == made.header.freezing.heads


@pytest.mark.parametrize("rank", ["18", "1000"])
def test_ranks_above_the_tokens_are_refused_before_the_images_are_read(
    spec: ModelSpec, tmp_path: Path, rank: str
) -> None:
    nowhere = ImageSource(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"the rank of blocks\.0\.attn; expected a number in 1…17"):
        freeze(spec, nowhere, tmp_path / "x.eam.safetensors", replace(FAST, rank=rank))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_shows_kinds(run_cli: RunCli, tiny_weights: Path, pictures: Path, tmp_path: Path) -> None:
    kwargs = [f"--model-kwargs={name}={value}" for name, value in KWARGS.items()]
    common = ("freeze", "--model", NAME, "--weights", tiny_weights, *kwargs, "--data", pictures)
    output = tmp_path / "x.eam.safetensors"
    options = ("--score", "row-entropy", "--sparsity", 0.5, "--images", 4, "-o", output)
    made = run_cli(*common, *options, "--rank", 2, "--heatmap", tmp_path / "x.svg")
    assert made.code == 0 and "*r2" in made.out and "3 of 6 heads (3 with rank 2)" in made.out
    assert "(r2: with that rank)" in (tmp_path / "x.svg").read_text()
    wrong = run_cli(*common, *options, "--rank", "some")
    assert "expected none, auto or a number from 1 on; got some" in only_error(wrong, 2)


TARGETS: tuple[tuple[Exporter, int | None, int], ...] = (
    ("torchscript", None, 17),
    ("dynamo", 1, 18),
    ("torchscript", 2, 21),
    ("dynamo", None, 20),
)


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("options", [FAST, replace(FAST, sparsity=1.0, rank="2", bits=2)], ids=str)
def test_every_export_is_proved(
    kind: str, options: FreezeOptions, request: Any, source: ImageSource, tmp_path: Path
) -> None:
    """The gate inside `export` compares with the reference forward."""
    spec = request.getfixturevalue("spec" if kind == "vit" else "swin")
    checkpoint, output = tmp_path / "x.eam.safetensors", tmp_path / "x.onnx"
    freeze(spec, source, checkpoint, replace(options, window_maps="class"))
    for exporter, batch, opset in TARGETS:
        done = export(checkpoint, output, batch=batch, opset=opset, exporter=exporter, images=source)
        assert done.frozen.parity.passed
    live = [node for node in onnx.load(output).graph.node if node.op_type == "Softmax"]
    assert bool(live) is (options.sparsity < 1)


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("version", ["8.5", "8.6", "10.3"])
def test_tensorrts_exports_are_clean(
    kind: str, version: str, request: Any, source: ImageSource, tmp_path: Path
) -> None:
    spec = request.getfixturevalue("spec" if kind == "vit" else "swin")
    checkpoint, output = tmp_path / "x.eam.safetensors", tmp_path / "x.onnx"
    bits: Bits = 8 if version == "10.3" else 4  # floats of 8 squared bits need UINT16 constants first
    freeze(spec, source, checkpoint, replace(FAST, window_maps="window", bits=bits, rank="3"))
    done = export(checkpoint, output, trt=TrtVersion.parse(version), images=source)
    assert done.frozen.parity.passed
    model = onnx.load(output)
    assert {finding.rule for finding in found(model, version) if finding.severity == "error"} == set()
    stored = [a.dtype for name, a in initializers(model).items() if "/mix" in name or "/pool" in name]
    assert any(dtype == np.int8 for dtype in stored) is (version == "10.3")
