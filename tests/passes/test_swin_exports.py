"""All passes on what torch exports of timm's Swin."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
from attention_graphs import Floats
from rewriting import initializers, ops, same, serialized
from timm_graphs import (
    SWIN_EXPORTS,
    SWIN_VARIANTS,
    Export,
    images_of,
    planned_modules,
    random_maps,
    sites_of,
    timm_model,
    torch_logits,
)

from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.host.attention import parts
from eamdeploy.passes.base import PlannedPass, run_passes
from eamdeploy.passes.canonical_attention import CanonicalAttention
from eamdeploy.passes.freeze_heads import check_accounted
from eamdeploy.passes.gather_tokens import GatherTokens
from eamdeploy.passes.merge_gathers import MergeGathers
from eamdeploy.passes.merge_reshapes import MergeReshapes
from eamdeploy.passes.order import plan_passes
from eamdeploy.passes.static_shapes import StaticShapes
from eamdeploy.passes.window_order import WindowOrder
from eamdeploy.passes.zero_mask import ZeroMask

PLACES = {
    "swin": {"gather_tokens": 9, "window_order": 2, "merge_gathers": 2, "zero_mask": 1},
    "swin-padded": {"gather_tokens": 9, "window_order": 0, "merge_gathers": 0, "zero_mask": 2},
    "swin-oblong": {"gather_tokens": 9, "window_order": 4, "merge_gathers": 4, "zero_mask": 2},
    "swin-partitioned": {"gather_tokens": 9, "window_order": 3, "merge_gathers": 3, "zero_mask": 2},
    "swin-larger": {"gather_tokens": 9, "window_order": 0, "merge_gathers": 0, "zero_mask": 2, "class_token_only": 2},
    "swin-many": {"gather_tokens": 9, "window_order": 2, "merge_gathers": 2, "zero_mask": 2},
}
GATHERS = {"swin": 3, "swin-padded": 9, "swin-oblong": 5, "swin-partitioned": 4, "swin-larger": 10, "swin-many": 7}
"""Gathers of tokens: into windows, from one block's windows to the next one's, patch merging."""
GONE = {"Slice", "Concat", "Split", "Squeeze", "Unsqueeze", "Mod", "Shape", "Range", "Cast", "Expand"}


@cache
def logits(variant: str) -> Floats:
    """What torch says of four images."""
    return torch_logits(variant, {}, 4)


@cache
def rewritten(export: Export) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The export after all passes, and how many places each changed."""
    graph = export.graph()
    results = run_passes(graph, plan_passes(planned_modules(export.variant)))
    return to_model(graph), {result.name: result.rewritten for result in results}


@pytest.mark.parametrize("export", SWIN_EXPORTS, ids=str)
def test_rewritten_export_computes_what_torch_does(export: Export) -> None:
    model, _ = rewritten(export)
    n = export.batch or 3
    assert same(logits(export.variant)[:n], model, images_of(export.variant, n))


@pytest.mark.parametrize("export", SWIN_EXPORTS, ids=str)
def test_every_pass_changes_as_many_places_as_the_model_has(export: Export) -> None:
    _, places = rewritten(export)
    assert {name: places[name] for name in PLACES[export.variant]} == PLACES[export.variant]
    assert places["canonical_attention"] == len(sites_of(export.variant)) == 4
    assert bool(places["static_shapes"]) == (export.exporter == "torchscript")


@pytest.mark.parametrize("granularity", ["head", "row", "entry"])
@pytest.mark.parametrize("batch", [None, 2])
def test_maps_of_a_window_larger_than_the_image_lose_the_rows_of_its_padding(
    batch: int | None, granularity: str
) -> None:
    sites = sites_of("swin-larger")
    assert [site.read_tokens and len(site.read_tokens) for site in sites] == [None, None, 16, 16]
    shape = {"head": None, "row": (2, 36), "entry": (2, 36, 36)}[granularity]
    mask = None if shape is None else np.random.default_rng(5).random(shape) < 0.5
    maps = {index: random_maps((0, 2), 36, index, mask=mask) for index in (2, 3)}
    modules = planned_modules("swin-larger", maps)
    graph = to_graph(Export("swin-larger", "torchscript", batch, 17).model())
    run_passes(graph, plan_passes(modules, parts(timm_model("swin-larger"))))
    model = to_model(graph)
    check_accounted(model, modules)
    assert same(torch_logits("swin-larger", maps), model, images_of("swin-larger"))
    stored = {name: value for name, value in initializers(model).items() if name.endswith("/map_integers")}
    if granularity == "head":
        assert [value.shape for value in stored.values()] == [(2 * 16, 36)] * 2


@pytest.mark.parametrize("export", SWIN_EXPORTS, ids=str)
def test_nothing_of_rolling_partitioning_and_shape_arithmetic_is_left(export: Export) -> None:
    model, _ = rewritten(export)
    counts = ops(model)
    # windows, and an odd grid before patch merging
    padded = {"swin-padded": 5, "swin-larger": 4, "swin-many": 2}.get(export.variant, 0)
    assert not GONE & set(counts) and counts["Pad"] == padded
    most = 4 if export.batch == 1 else 5
    graph = to_graph(model)
    assert max(len(tensor.shape or ()) for tensor in graph.tensors().values()) <= most
    bias = sum(node.name.endswith("_by_window") for node in model.graph.node)
    assert counts["Gather"] == GATHERS[export.variant] + bias
    assert counts["Softmax"] == 4


@pytest.mark.parametrize("variant", ["swin", "swin-padded"])
def test_exporters_and_batches_end_in_the_same_operators(variant: str) -> None:
    exports = [export for export in SWIN_EXPORTS if export.variant == variant]
    for alone in (False, True):
        found = {str(e): ops(rewritten(e)[0]) for e in exports if (e.batch == 1) == alone}
        assert len({tuple(sorted(counts.items())) for counts in found.values()}) <= 1, found
    many = {str(e) for e in exports if e.batch != 1}
    assert len(many) >= 2


def test_all_variants_are_exported() -> None:
    assert {export.variant for export in SWIN_EXPORTS} == set(SWIN_VARIANTS) == set(PLACES)
    assert {export.batch for export in SWIN_EXPORTS} == {None, 1, 2, 4}


@pytest.mark.parametrize("variant", ["swin", "swin-padded", "swin-oblong"])
def test_second_run_of_all_passes_changes_nothing(variant: str) -> None:
    model, _ = rewritten(Export(variant, "torchscript", None, 17))
    graph = to_graph(model)
    before = serialized(graph)
    passes = (StaticShapes(), GatherTokens(), WindowOrder(), MergeGathers(), MergeReshapes(), ZeroMask())
    run_passes(graph, [PlannedPass(each, 0) for each in (*passes, CanonicalAttention())])
    assert serialized(graph) == before
