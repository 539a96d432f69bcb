"""Every form of a model with heads of low rank, for ONNX Runtime and as far as that goes for TensorRT."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from attention_graphs import run_unoptimized
from lint_models import found
from rank_models import packed_plan
from rewriting import initializers
from tiny_models import images

from eamdeploy import build_ort, export
from eamdeploy.convert.ort_form import OrtForm, candidates
from eamdeploy.convert.ranges import Calibration
from eamdeploy.convert.trt import prepare
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import UnsupportedGraph
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT
from eamdeploy.parity.gate import TOLERANCES, compare, reduced_tolerance
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.profiling.timing import Schedule
from eamdeploy.stages.ort_forms import Request, build

QUICK = Schedule(warmup_ms=0, min_seconds=0, min_runs=4, sittings=2)
EXPORTS = {
    "vit": ("vit", None),
    "vit of low rank alone": ("vit of low rank alone", None),
    "swin": ("swin", None),
    "swin, one image": ("swin", 1),
}
MIXED = ("vit", "swin", "swin, one image")
FORMS = candidates(["cpu"], int8=True, calibrated=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Callable[[str], Path]:
    """The model of that name in `EXPORTS`, made once, with its reference set beside it."""

    @cache
    def make(name: str) -> Path:
        plan, batch = EXPORTS[name]
        folder = tmp_path_factory.mktemp("ranks")
        output = folder / "x.onnx"
        source = packed_plan(plan, folder)
        made = export(source, output, batch=batch, images=ImageSource(pictures), opset=17, exporter="torchscript")
        assert made.frozen.parity.passed
        return output

    return make


@pytest.fixture
def calibration(pictures: Path, tmp_path: Path) -> Calibration:
    return Calibration(ImageSource(pictures), cache=tmp_path / "ranges.json")


def nodes_of(model: onnx.ModelProto, part: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if part in node.name]


def quantized_constants(model: onnx.ModelProto) -> Iterator[str]:
    """Tensors that a QuantizeLinear reads, and that depend on constants alone."""
    constant = {item.name for item in model.graph.initializer}
    for node in model.graph.node:
        if set(node.input) - {""} <= constant:
            constant |= set(node.output)
            if node.op_type == "QuantizeLinear":
                yield node.input[0]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("name", MIXED)
def test_every_form_passes_the_gate(
    exported: Callable[[str], Path], calibration: Calibration, tmp_path: Path, name: str, form: OrtForm
) -> None:
    """In one layer live heads, whole maps and ranks; in another low rank alone."""
    engine = tmp_path / "x.ort.onnx"
    images_for_ranges = calibration if form.int8 == "static" else None
    agreement = 75.0 if form.int8 else None
    manifest = build_ort(
        exported(name), engine, forms=[form], threads=1, calibration=images_for_ranges, min_agreement=agreement
    )
    assert manifest.parity is not None and manifest.parity.passed and manifest.parity.n == 16
    model = onnx.load(engine)
    assert bool([n for n in model.graph.node if n.op_type == "MultiHeadAttention"]) is form.fused_attention
    assert not list(quantized_constants(model))
    values = nodes_of(model, "v_pooled.") + nodes_of(model, "vo_pooled.")
    integers = {node.op_type for node in values if node.op_type.startswith("MatMul")}
    assert integers == {"MatMulInteger" if form.int8 == "dynamic" else "MatMul"}


@pytest.mark.parametrize("form", [form for form in FORMS if not form.fused_attention], ids=lambda form: form.name)
def test_a_model_of_low_rank_alone_has_all_forms_but_fused_ones(
    exported: Callable[[str], Path], calibration: Calibration, tmp_path: Path, form: OrtForm
) -> None:
    engine, model = tmp_path / "x.ort.onnx", exported("vit of low rank alone")
    images_for_ranges = calibration if form.int8 == "static" else None
    agreement = 75.0 if form.int8 else None
    manifest = build_ort(model, engine, forms=[form], threads=1, calibration=images_for_ranges, min_agreement=agreement)
    assert manifest.parity is not None and manifest.parity.passed
    assert not [node for node in onnx.load(engine).graph.node if node.op_type == "Softmax"]
    with pytest.raises(UnsupportedGraph, match="has no live attention that can be fused"):
        build_ort(model, engine, forms=[OrtForm(fused_attention=True)], threads=1)


def test_tuning_leaves_out_the_forms_that_there_are_none_of(
    exported: Callable[[str], Path], calibration: Calibration, tmp_path: Path
) -> None:
    for file in (exported("vit of low rank alone"), reference_path(exported("vit of low rank alone"))):
        shutil.copy(file, tmp_path)
    request = Request(
        model=tmp_path / "x.onnx",
        output=tmp_path / "x.ort.onnx",
        threads=1,
        calibration=calibration,
        reference=ReferenceSet.load(reference_path(tmp_path / "x.onnx")),
        reduced=reduced_tolerance(75.0),
    )
    tried = build(request, FORMS, SILENT, QUICK).tried
    assert tried is not None
    for form, told in zip(FORMS, tried, strict=True):
        assert (told.refused is not None) is form.fused_attention, told
        assert (told.p50_ms is None) is form.fused_attention


def test_static_int8_has_integers_in_every_product_of_pooled_tokens(
    exported: Callable[[str], Path], calibration: Calibration, tmp_path: Path
) -> None:
    """Pools and mixes of one rank are UINT8; mixes of several ranks have several scales a row, and are floats."""
    engine = tmp_path / "x.ort.onnx"
    build_ort(
        exported("vit"), engine, forms=[OrtForm(int8="static")], threads=1, calibration=calibration, min_agreement=75
    )
    model = onnx.load(engine)
    made = {name: node for node in model.graph.node for name in node.output}
    constants = initializers(model)

    def operands(name: str) -> list[Any]:
        """The type of each operand: of the integers behind a DequantizeLinear, or of a constant."""
        (product,) = [node for node in model.graph.node if node.op_type == "MatMul" and node.name == name]
        types: list[Any] = []
        for tensor in product.input:
            node = made.get(tensor)
            if node is None:
                types.append(constants[tensor].dtype)
            elif node.op_type == "DequantizeLinear":
                types.append(constants[node.input[2]].dtype)  # that of its zero points
            else:
                types.append(node.op_type)
        return types

    signed = ([np.dtype(np.int8)], [np.dtype(np.uint8)])  # a tensor that is hardly negative is UINT8
    for block, heads in ((0, (2,)), (1, (0, 1, 2))):
        prefix = f"blocks.{block}.attn"
        assert operands(f"{prefix}/pooled")[0] == np.uint8
        for head in heads:
            for part in ("v_pooled", "o_pooled"):
                tokens, weight = operands(f"{prefix}/{part}.{head}")
                assert [tokens] in signed and weight == np.int8, (prefix, part, head)
    assert operands("blocks.0.attn/unpooled")[0] == np.uint8
    assert operands("blocks.1.attn/unpooled") == [np.float32, "Concat"]


TRT: dict[str, tuple[str, TrtOptions]] = {
    "8.5": ("8.5", TrtOptions()),
    "8.6": ("8.6", TrtOptions()),
    "8.6, INT8": ("8.6", TrtOptions(int8=True)),
    "10.3": ("10.3", TrtOptions()),
    "10.3, INT8": ("10.3", TrtOptions(int8=True)),
    "11.4, FP16": ("11.4", TrtOptions(precision="fp16")),
    "11.4, FP16 and INT8": ("11.4", TrtOptions(precision="fp16", int8=True)),
}


@pytest.mark.parametrize("what", TRT)
@pytest.mark.parametrize("name", ["vit", "vit of low rank alone", "swin"])
def test_what_tensorrt_gets_is_clean_and_computes_the_same(
    exported: Callable[[str], Path], calibration: Calibration, name: str, what: str
) -> None:
    """In ONNX Runtime: what TensorRT makes of it needs a GPU."""
    text, options = TRT[what]
    prepared = prepare(exported(name), TrtVersion.parse(text), options, calibration if options.int8 else None, SILENT)
    model = onnx.load_from_string(prepared.data.model)
    assert {finding.rule for finding in found(model, text) if finding.severity == "error"} == set()
    assert not list(quantized_constants(model)), "factors are constants already"
    assert "requantize_maps" not in prepared.changes
    shown = images(8).numpy()
    expected, got = run_unoptimized(onnx.load(exported(name)), shown), run_unoptimized(model, shown)
    if options == TrtOptions():
        assert compare(expected, got, TOLERANCES["f32-engine"]).passed
    else:
        assert np.abs(got - expected).max() < 0.1 * np.ptp(expected)
