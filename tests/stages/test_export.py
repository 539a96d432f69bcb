from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from notebook import Notebook
from numpy.typing import NDArray
from tiny_models import (
    FAMILY,
    KWARGS,
    NAME,
    SWIN_FAMILY,
    SWIN_KWARGS,
    SWIN_NAME,
    images,
    make_member,
    make_model,
    save_weights,
)

from eamdeploy import export, freeze
from eamdeploy.artifacts.card import CARD_KEY, ModelCard
from eamdeploy.artifacts.files import digest_file
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.checkpoint import Checkpoint
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.quantizers import integer_values
from eamdeploy.errors import ConfigError, ParityError, UnsupportedGraph
from eamdeploy.host import export_steps
from eamdeploy.host.calibrate import predict
from eamdeploy.host.model import ModelSpec
from eamdeploy.host.reference import load_reference
from eamdeploy.host.stock_export import StockExport, export_stock
from eamdeploy.images.preprocess import normalize
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.passes.base import PlannedPass
from eamdeploy.passes.facts import Parts
from eamdeploy.passes.freeze_heads import AttentionModule
from eamdeploy.passes.order import SWITCHABLE, plan_passes, with_dependents
from eamdeploy.stages import export as exporting
from eamdeploy.vocabulary import GRANULARITIES, Exporter, Granularity

HALF = FreezeOptions(sparsity=0.5, score="random", seed=3)
IMAGES = images(5).numpy()


def run(file: Path, batch: NDArray[np.float32] = IMAGES) -> NDArray[np.float32]:
    """Plain ONNX Runtime, nothing of ours."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": batch})
    return np.asarray(logits)


def reference_logits(checkpoint: Path, *, frozen: bool) -> NDArray[np.float32]:
    return predict(load_reference(checkpoints.load(checkpoint), frozen=frozen, where="x").model, IMAGES)


def card_of(file: Path) -> ModelCard:
    (text,) = [entry.value for entry in onnx.load(file).metadata_props if entry.key == CARD_KEY]
    return ModelCard.parse(text, str(file))


def constants(file: Path) -> dict[str, NDArray[Any]]:
    return {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(file).graph.initializer}


# --- what is written -------------------------------------------------------------------------------------------------


def test_model_and_twin_compute_the_checkpoint_frozen_and_live(eam_checkpoint: Path, eam_model: Path) -> None:
    frozen, live = reference_logits(eam_checkpoint, frozen=True), reference_logits(eam_checkpoint, frozen=False)
    np.testing.assert_allclose(run(eam_model), frozen, atol=5e-5)
    np.testing.assert_allclose(run(eam_model.with_name("base.onnx")), live, atol=5e-5)
    assert np.abs(frozen - live).max() > 0.1


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_file_is_valid_onnx_of_the_asked_opset_and_contract(eam_model: Path, name: str) -> None:
    model = onnx.load(eam_model.with_name(f"{name}.onnx"))
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model, strict_mode=True), full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    (source,), (target,) = model.graph.input, model.graph.output
    dims = [[dim.dim_value or dim.dim_param for dim in end.type.tensor_type.shape.dim] for end in (source, target)]
    assert (source.name, target.name) == ("image", "logits")
    assert isinstance(dims[0][0], str) and dims == [[dims[0][0], 3, 32, 32], [dims[0][0], 10]]


def test_file_holds_the_integers_of_the_frozen_maps_behind_dequantize_linear(
    eam_checkpoint: Path, eam_model: Path
) -> None:
    frozen = checkpoints.load(eam_checkpoint).frozen
    model, values = onnx.load(eam_model), constants(eam_model)
    dequantized = {node.input[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    assert len(dequantized) == len(frozen) == 2
    for path, item in frozen.items():
        integers, scales = integer_values(item.codes, "squared").reshape(-1, 17), item.scales.reshape(-1)
        if path == "blocks.1.attn":  # the classifier reads one row of each map
            integers, scales = integers[::17], scales[::17]
        (name,) = [name for name in dequantized if np.array_equal(values[name], integers)]
        node = dequantized[name]
        assert values[name].dtype == np.uint8
        np.testing.assert_array_equal(values[node.input[1]], scales)
        assert [(attribute.name, attribute.i) for attribute in node.attribute] == [("axis", 0)]
        assert integers.tobytes() in eam_model.read_bytes()
    assert not [value for value in constants(eam_model.with_name("base.onnx")).values() if value.dtype == np.uint8]


def directions(matrix: NDArray[Any]) -> NDArray[np.float64]:
    """Rows of length 1, so that a factor folded into a weight does not hide it."""
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True).clip(1e-12)


def query_and_key_heads_in(file: Path, checkpoint: Checkpoint) -> dict[str, set[int]]:
    """By module, the heads of which any row of the query or key weight stands in the file, in any matrix."""
    matrices = [value for value in constants(file).values() if value.ndim == 2 and value.dtype == np.float32]
    rows = [directions(matrix) for each in matrices for matrix in (each, each.T) if matrix.shape[1] == 48]
    stored = np.concatenate(rows)
    found: dict[str, set[int]] = {}
    for path in checkpoint.header.attention:
        weight = directions(checkpoint.weights[f"{path}.qkv.weight"][:96])
        present = (np.abs(weight @ stored.T) > 1 - 1e-6).any(axis=1).reshape(2, 3, 16).any(axis=(0, 2))
        found[path] = set(np.flatnonzero(present).tolist())
    return found


def test_no_query_or_key_of_a_frozen_head_is_left(eam_checkpoint: Path, eam_model: Path) -> None:
    checkpoint = checkpoints.load(eam_checkpoint)
    everything = {path: {0, 1, 2} for path in checkpoint.header.attention}
    live = {path: heads - set(checkpoint.header.freezing.heads.get(path, [])) for path, heads in everything.items()}
    assert query_and_key_heads_in(eam_model.with_name("base.onnx"), checkpoint) == everything
    assert query_and_key_heads_in(eam_model, checkpoint) == live
    assert sum(map(len, live.values())) == 3


def test_live_heads_are_one_standard_attention(eam_model: Path) -> None:
    operators = Counter(node.op_type for node in onnx.load(eam_model).graph.node)
    assert operators["Softmax"] == 2


def test_card_says_what_a_board_must_know(eam_checkpoint: Path, eam_model: Path) -> None:
    header = checkpoints.load(eam_checkpoint).header
    card, base = card_of(eam_model), card_of(eam_model.with_name("base.onnx"))
    assert (card.timm_model, card.weights, card.num_classes) == (NAME, "tiny.safetensors", 10)
    assert card.preprocessing == header.preprocessing
    assert card.freezing == header.freezing
    assert card.checkpoint_digest == digest_file(eam_checkpoint)
    assert "freeze_heads" in card.rewrites and card.exporter == "dynamo"
    assert {"torch", "onnx", "eamdeploy"} <= card.versions.keys()
    assert base.freezing is None
    assert base.rewrites == [name for name in card.rewrites if name != "freeze_heads"]


def test_reference_set_beside_it_has_the_pictures_and_torchs_logits(
    eam_checkpoint: Path, eam_model: Path, pictures: Path
) -> None:
    checkpoint = checkpoints.load(eam_checkpoint)
    how = checkpoint.header.preprocessing
    chosen = ImageSource(pictures, limit=16)
    for name, frozen in (("tiny", True), ("base", False)):
        reference = ReferenceSet.load(reference_path(eam_model.with_name(f"{name}.onnx")))
        assert reference.source == "16 images of pictures"
        (batch,) = chosen.batches(chosen.open(), how, 16, SILENT)
        np.testing.assert_array_equal(reference.pixels, batch.pixels)
        model = load_reference(checkpoint, frozen=frozen, where="x").model
        np.testing.assert_allclose(reference.logits, predict(model, normalize(batch.pixels, how)), atol=1e-5)


def test_record_of_the_export_describes_the_files(eam_checkpoint: Path, tmp_path: Path) -> None:
    result = export(eam_checkpoint, tmp_path / "x.onnx", exporter="torchscript")
    written = result.frozen
    assert result.baseline is None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.onnx", "x.reference.npz"]
    assert (written.file, written.reference) == (str(tmp_path / "x.onnx"), str(tmp_path / "x.reference.npz"))
    assert (written.digest, written.bytes) == (digest_file(tmp_path / "x.onnx"), (tmp_path / "x.onnx").stat().st_size)
    assert written.nodes == len(onnx.load(tmp_path / "x.onnx").graph.node)
    assert written.exporter == "torchscript" and written.rewrites == card_of(tmp_path / "x.onnx").rewrites
    assert written.parity.passed and written.parity.n == 16 and written.parity.tolerance == "f32-engine"


def test_synthetic_reference_images_vary_and_are_always_the_same(eam_checkpoint: Path, tmp_path: Path) -> None:
    sets = []
    for name in ("a", "b"):
        export(eam_checkpoint, tmp_path / f"{name}.onnx", exporter="torchscript")
        sets.append(ReferenceSet.load(tmp_path / f"{name}.reference.npz"))
    first, second = sets
    assert first.source == "16 synthetic images" and first.pixels.shape == (16, 32, 32, 3)
    np.testing.assert_array_equal(first.pixels, second.pixels)
    assert len(np.unique(first.pixels.reshape(16, -1), axis=0)) == 16
    assert first.pixels.std() > 30
    assert float(first.logits.std(axis=0).min()) > 0.01, "the logits hardly depend on the image"


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exporter", "opset", "written_by"),
    [
        ("auto", 16, "torchscript"),
        ("torchscript", 17, "torchscript"),
        ("torchscript", 18, "torchscript"),
    ],
)
def test_both_exporters_and_every_opset_give_the_same_function(
    eam_checkpoint: Path, tmp_path: Path, exporter: Any, opset: int, written_by: str
) -> None:
    result = export(eam_checkpoint, tmp_path / "x.onnx", opset=opset, exporter=exporter)
    assert result.frozen.exporter == card_of(tmp_path / "x.onnx").exporter == written_by
    model = onnx.load(tmp_path / "x.onnx")
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [opset]
    np.testing.assert_allclose(run(tmp_path / "x.onnx"), reference_logits(eam_checkpoint, frozen=True), atol=5e-5)
    assert ("LayerNormalization" in {node.op_type for node in model.graph.node}) == (opset > 16)


@pytest.mark.parametrize(("exporter", "batch"), [("dynamo", 1), ("torchscript", 1), ("torchscript", 3)])
def test_fixed_batch_is_fixed_and_checked_on_all_reference_images(
    eam_checkpoint: Path, tmp_path: Path, batch: int, exporter: Any
) -> None:
    result = export(eam_checkpoint, tmp_path / "x.onnx", batch=batch, exporter=exporter)
    assert result.frozen.parity.n == 16
    model = onnx.load(tmp_path / "x.onnx")
    for end in (model.graph.input[0], model.graph.output[0]):
        assert end.type.tensor_type.shape.dim[0].dim_value == batch
    got = run(tmp_path / "x.onnx", IMAGES[:batch])
    np.testing.assert_allclose(got, reference_logits(eam_checkpoint, frozen=True)[:batch], atol=5e-5)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_frozen_and_everything_frozen(
    tiny_weights: Path, pictures: Path, tmp_path: Path, sparsity: float
) -> None:
    checkpoint, output = tmp_path / "x.eam.safetensors", tmp_path / "x.onnx"
    spec = ModelSpec(NAME, str(tiny_weights), KWARGS)
    freeze(spec, ImageSource(pictures), checkpoint, replace(HALF, sparsity=sparsity))
    export(checkpoint, output, exporter="torchscript")
    operators = Counter(node.op_type for node in onnx.load(output).graph.node)
    assert (operators["Softmax"], operators["DequantizeLinear"]) == ((2, 0) if sparsity == 0 else (0, 2))
    np.testing.assert_allclose(run(output), reference_logits(checkpoint, frozen=True), atol=5e-5)


@pytest.mark.parametrize("bits", [2, 8])
def test_every_width_of_code_reaches_the_graph(tiny_weights: Path, pictures: Path, tmp_path: Path, bits: Any) -> None:
    checkpoint, output = tmp_path / "x.eam.safetensors", tmp_path / "x.onnx"
    spec = ModelSpec(NAME, str(tiny_weights), KWARGS)
    freeze(spec, ImageSource(pictures), checkpoint, replace(HALF, bits=bits))
    if bits == 8:
        with pytest.raises(ConfigError, match=r"squared 8-bit codes need UINT16.*expected opset 21 or higher; got 17"):
            export(checkpoint, output)
    export(checkpoint, output, opset=17 if bits == 2 else 21, exporter="torchscript")
    integers = {value.dtype for value in constants(output).values() if value.dtype.kind == "u" and value.ndim == 2}
    assert integers == {np.dtype(np.uint8 if bits == 2 else np.uint16)}
    np.testing.assert_allclose(run(output), reference_logits(checkpoint, frozen=True), atol=5e-5)


@pytest.mark.parametrize("kind", FAMILY)
def test_every_kind_of_model_is_exported(kind: str, pictures: Path, tmp_path: Path) -> None:
    name, changes = FAMILY[kind]
    weights = save_weights(make_member(kind), tmp_path / "w.safetensors")
    checkpoint, output = tmp_path / "x.eam.safetensors", tmp_path / "x.onnx"
    freeze(ModelSpec(name, str(weights), {**KWARGS, **changes}), ImageSource(pictures, limit=4), checkpoint, HALF)
    export(checkpoint, output, exporter="torchscript")  # the graphs of both exporters: tests/graph, tests/passes
    np.testing.assert_allclose(run(output), reference_logits(checkpoint, frozen=True), atol=5e-5)


@pytest.mark.parametrize("opset", [16, 17, 20])
def test_rms_norms_are_exported_at_every_opset(opset: int) -> None:
    """Torch has an operator for them, which ONNX has from opset 23."""
    model = make_model(NAME, {"norm_layer": "rmsnorm", "qk_norm": True})
    stock = export_stock(model, (32, 32), batch=2, opset=opset, exporter="torchscript")
    assert [norm for norm in model.modules() if "forward" in vars(norm)] == [], "the model's own norms were changed"
    session = onnxruntime.InferenceSession(stock.model.SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        wanted = model(torch.from_numpy(IMAGES[:2])).numpy()
    np.testing.assert_allclose(session.run(None, {"image": IMAGES[:2]})[0], wanted, atol=5e-5)


def test_auto_takes_the_other_exporter_where_dynamo_writes_an_invalid_graph() -> None:
    """Its Split of opset 18 is brought down to 17 with an attribute that 17 does not know."""
    model = make_model("vit_giant_patch14_dinov2")
    assert export_stock(model, (32, 32), batch=None, opset=17).exporter == "torchscript"
    with pytest.raises(UnsupportedGraph, match=r"dynamo exporter wrote an invalid graph at opset 17: .*num_outputs"):
        export_stock(model, (32, 32), batch=None, opset=17, exporter="dynamo")


def test_auto_takes_the_other_exporter_where_dynamo_cannot_write_the_opset(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = make_member("average pooling")  # its ReduceMean of opset 18 is not converted to 17
    model.blocks[0].attn.fused_attn, model.blocks[1].attn.fused_attn = True, False
    assert export_stock(model, (32, 32), batch=None, opset=17).exporter == "torchscript"
    with pytest.raises(UnsupportedGraph, match=r"dynamo.*expected 17; got 18\. Try another --exporter or --opset"):
        export_stock(model, (32, 32), batch=None, opset=17, exporter="dynamo")
    assert [block.attn.fused_attn for block in model.blocks] == [True, False], "the model's own kernels were changed"
    assert capfd.readouterr() == ("", ""), "the exporters write to the terminal"


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With an earlier export in it."""
    for name in ("x.onnx", "x.reference.npz", "base.onnx", "base.reference.npz"):
        (tmp_path / name).write_text(f"old {name}")
    return tmp_path


def assert_untouched(folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir() if file.is_file()) == [
        "base.onnx",
        "base.reference.npz",
        "x.onnx",
        "x.reference.npz",
    ]
    assert all(file.read_text() == f"old {file.name}" for file in folder.iterdir() if file.is_file())


def stock_of(change: Callable[[Any], None]) -> Callable[..., StockExport]:
    """`export_stock` of a model that `change` has tampered with."""

    def tampered(model: Any, *arguments: Any, **options: Any) -> StockExport:
        copy = deepcopy(model)  # the checkpoint's own weights share memory with `model`
        change(copy)
        return export_stock(copy, *arguments, **options)

    return tampered


def shift_one_logit(model: Any) -> None:
    model.head.bias.data[3] += 0.01


def replace_values(model: Any) -> None:
    other = make_model(seed=8)
    model.blocks[1].attn.qkv.weight.data[96:] = other.blocks[1].attn.qkv.weight.data[96:]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (shift_one_logit, ParityError, r"parity of the exported graph.*f32-engine.*0\.01.*class 3"),
        (replace_values, UnsupportedGraph, r"freeze_heads failed.*no attention.*value weights of blocks\.1\.attn"),
    ],
    ids=["parity", "unaccounted head"],
)
def test_a_graph_that_is_not_the_checkpoints_is_not_written(
    eam_checkpoint: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], None],
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(exporting, "export_stock", stock_of(change))
    with pytest.raises(kind, match=message):
        export(eam_checkpoint, folder / "x.onnx", baseline=folder / "base.onnx", exporter="torchscript")
    assert_untouched(folder)


def test_every_frozen_head_is_accounted_for(
    eam_checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan_without_freezing(modules: list[AttentionModule], has: Parts, *_: Any) -> list[PlannedPass[Any]]:
        return plan_passes([replace(module, frozen=None) for module in modules], has)

    monkeypatch.setattr(export_steps, "plan_passes", plan_without_freezing)
    with pytest.raises(UnsupportedGraph, match=r"frozen heads of blocks\.0\.attn are not in .*heads \[1\]"):
        export(eam_checkpoint, folder / "x.onnx", exporter="torchscript")
    assert_untouched(folder)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("left_out", [("class_token_only",), ("canonical_attention",), tuple(SWITCHABLE)], ids=len)
def test_a_frozen_model_is_exact_without_its_passes(
    tmp_path: Path, tiny_weights: Path, pictures: Path, granularity: Granularity, left_out: tuple[str, ...]
) -> None:
    """Every frozen row is accounted for, those that only class_token_only would leave away among them."""
    checkpoint, model, base = tmp_path / "x.eam.safetensors", tmp_path / "x.onnx", tmp_path / "base.onnx"
    options = replace(HALF, granularity=granularity)
    freeze(ModelSpec(NAME, str(tiny_weights), KWARGS), ImageSource(pictures, limit=4), checkpoint, options)
    notebook = Notebook()
    result = export(checkpoint, model, baseline=base, without=left_out, observer=notebook)
    missing = with_dependents(left_out)
    not_exact = {"fold_value_bias"} if granularity == "entry" else set()  # where rows mix frozen and live entries
    assert result.frozen.rewrites == card_of(model).rewrites
    assert set(result.frozen.rewrites) == {*SWITCHABLE, "freeze_heads"} - missing - not_exact
    assert set(card_of(base).rewrites) == SWITCHABLE.keys() - missing
    assert f"left out of the passes: {', '.join(sorted(missing))}" in notebook.notes
    np.testing.assert_allclose(run(model), reference_logits(checkpoint, frozen=True), atol=5e-5)
    np.testing.assert_allclose(run(base), reference_logits(checkpoint, frozen=False), atol=5e-5)


@pytest.mark.parametrize("left_out", [(), ("class_token_only",), ("gather_tokens",)], ids=str)
def test_a_swin_with_a_window_larger_than_its_image_is_exported(
    tmp_path: Path, pictures: Path, left_out: tuple[str, ...]
) -> None:
    checkpoint, model, base = tmp_path / "x.eam.safetensors", tmp_path / "x.onnx", tmp_path / "base.onnx"
    name, changes = SWIN_FAMILY["swin, a window larger than the image"]
    weights = save_weights(make_model(name, changes), tmp_path / "swin.safetensors")
    spec = ModelSpec(name, str(weights), {**SWIN_KWARGS, **changes})
    freeze(spec, ImageSource(pictures, limit=4), checkpoint, replace(HALF, granularity="row"))
    result = export(checkpoint, model, baseline=base, without=left_out)
    assert set(left_out).isdisjoint(result.frozen.rewrites)
    np.testing.assert_allclose(run(model), reference_logits(checkpoint, frozen=True), atol=5e-5)
    np.testing.assert_allclose(run(base), reference_logits(checkpoint, frozen=False), atol=5e-5)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_shift_by_more_than_the_image_has_is_exported(exporter: Exporter) -> None:
    """Of 6 tokens, where an image of the second stage has 4 × 4."""
    model = make_model(SWIN_NAME, {"always_partition": True, "window_size": 12})
    shifts = [module.shift_size for module in model.modules() if hasattr(module, "shift_size")]
    stock = export_stock(model, (32, 32), batch=5, opset=18, exporter=exporter).model
    assert [module.shift_size for module in model.modules() if hasattr(module, "shift_size")] == shifts
    assert (6, 6) in shifts
    session = onnxruntime.InferenceSession(stock.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": IMAGES})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(torch.from_numpy(IMAGES)).numpy(), atol=5e-5)


def test_a_pass_that_does_not_exist_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no pass nonsense"):
        export(tmp_path / "absent.eam.safetensors", tmp_path / "x.onnx", without=["nonsense"])


def test_a_file_that_cannot_be_written_leaves_all_of_them_as_they_were(eam_checkpoint: Path, folder: Path) -> None:
    (folder / "base.reference.npz").unlink()
    (folder / "base.reference.npz").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write \S*base\.reference\.npz; .*an existing folder"):
        export(eam_checkpoint, folder / "x.onnx", baseline=folder / "base.onnx", exporter="torchscript")
    (folder / "base.reference.npz").rmdir()
    (folder / "base.reference.npz").write_text("old base.reference.npz")
    assert_untouched(folder)


def test_outputs_that_would_replace_each_other_or_the_checkpoint_are_refused(
    eam_checkpoint: Path, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=r"the baseline would replace the model"):
        export(eam_checkpoint, folder / "x.onnx", baseline=folder / "." / "x.onnx")
    copy = folder / "copy.eam.safetensors"
    copy.write_bytes(eam_checkpoint.read_bytes())
    for output, baseline in ((copy, None), (folder / "x.onnx", copy)):
        with pytest.raises(ConfigError, match=r"copy\.eam\.safetensors would replace the input"):
            export(copy, output, baseline=baseline)
    assert copy.read_bytes() == eam_checkpoint.read_bytes()
    copy.unlink()
    assert_untouched(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 15}, "opset out of range; expected 16 … 22; got 15"),
        ({"opset": 23}, "opset out of range; expected 16 … 22; got 23"),
        ({"batch": 0}, "batch can't be exported; .*at least 1 image; got 0"),
    ],
    ids=["opset too low", "opset too high", "batch"],
)
def test_options_that_cannot_be_met_are_refused(
    eam_checkpoint: Path, folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(eam_checkpoint, folder / "x.onnx", **options)
    assert_untouched(folder)


def test_bad_reference_picture_is_an_error_or_left_out(eam_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    some.mkdir()
    for index, file in enumerate(sorted(pictures.iterdir())[:4]):
        (some / file.name).write_bytes(file.read_bytes() if index else b"no picture")
    output = tmp_path / "x.onnx"
    with pytest.raises(ConfigError, match=r"cannot use image \S*000\.png"):
        export(eam_checkpoint, output, images=ImageSource(some), exporter="torchscript")
    assert not output.exists()
    export(eam_checkpoint, output, images=ImageSource(some, skip_bad=True), exporter="torchscript")
    assert ReferenceSet.load(reference_path(output)).source == "3 images of some"


# --- the stock export --------------------------------------------------------------------------------


def test_the_stock_export_is_what_torch_wrote_with_a_card(eam_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "stock.onnx"
    result = export(eam_checkpoint, tmp_path / "x.onnx", stock=file, exporter="torchscript")
    live = load_reference(checkpoints.load(eam_checkpoint), frozen=False, where="x")
    wrote = export_stock(live.model, (32, 32), batch=None, opset=17, exporter="torchscript").model
    assert onnx.load(file).graph == wrote.graph
    card = card_of(file)
    assert (card.rewrites, card.freezing, card.exporter) == ([], None, "torchscript")
    assert result.stock is not None and result.stock.digest == digest_file(file)
    assert result.stock.nodes == result.stock.nodes_stock == len(wrote.graph.node)
    assert result.stock.parity.passed and result.baseline is None
    np.testing.assert_allclose(run(file), reference_logits(eam_checkpoint, frozen=False), atol=5e-5)


def test_the_stock_export_takes_normalized_images_even_where_the_model_takes_pixels(
    eam_checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "stock.onnx"
    output = tmp_path / "x.onnx"
    export(eam_checkpoint, output, stock=file, exporter="torchscript", fold_preprocess=True)
    assert card_of(output).takes_pixels and not card_of(file).takes_pixels
    np.testing.assert_allclose(run(file), reference_logits(eam_checkpoint, frozen=False), atol=5e-5)


def test_the_stock_export_replaces_neither_model(eam_checkpoint: Path, tmp_path: Path) -> None:
    model, twin = tmp_path / "x.onnx", tmp_path / "base.onnx"
    for stock, other in ((model, "model"), (twin, "baseline")):
        with pytest.raises(ConfigError, match=rf"the stock export would replace the {other}.*--stock"):
            export(eam_checkpoint, model, baseline=twin, stock=stock)
    assert list(tmp_path.iterdir()) == []
