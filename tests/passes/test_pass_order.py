from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from attention_graphs import Floats
from rewriting import same
from timm_graphs import (
    EXPORTS,
    SWIN_EXPORTS,
    SWIN_VARIANTS,
    VARIANTS,
    Export,
    images_of,
    planned_modules,
    random_maps,
    sites_of,
    timm_model,
    tokens_of,
    torch_logits,
)
from tiny_models import SWIN_NAME, make_model

from eamdeploy.cli.export import export as export_command
from eamdeploy.errors import ConfigError, UnsupportedGraph
from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.graph.skip import Skip
from eamdeploy.host.attention import attention_sites, parts
from eamdeploy.host.stock_export import export_stock
from eamdeploy.passes import order
from eamdeploy.passes.base import PlannedPass, run_passes
from eamdeploy.passes.facts import Parts
from eamdeploy.passes.fold_preprocess import FoldPreprocess
from eamdeploy.passes.freeze_heads import AttentionModule
from eamdeploy.passes.order import SWITCHABLE, plan_passes, with_dependents
from eamdeploy.passes.rewrites import REWRITES, Target, listing
from eamdeploy.vocabulary import OPTIONAL_PASSES, Exporter

DOCUMENT = Path(order.__file__).parents[2] / "docs" / "architecture.md"


@pytest.mark.parametrize(
    ("frozen_blocks", "expected"),
    [
        ((), [("canonical_attention", 2), ("class_token_only", 1)]),
        ((1,), [("canonical_attention", 2), ("class_token_only", 1), ("freeze_heads", 1)]),
        ((0, 1), [("canonical_attention", 2), ("class_token_only", 1), ("freeze_heads", 2)]),
    ],
)
def test_plan_expects_every_module_to_change(frozen_blocks: tuple[int, ...], expected: list[tuple[str, int]]) -> None:
    maps = random_maps((1,), tokens_of("vit"))
    plan = plan_passes(planned_modules("vit", dict.fromkeys(frozen_blocks, maps)))
    assert [(p.rewrite_pass.name, p.expected) for p in plan if p.expected is not None] == expected


def expected_places(plan: list[PlannedPass[Any]]) -> dict[str, int | None]:
    return {each.rewrite_pass.name: each.expected for each in plan}


NO_WINDOWS = {"token_moves": 0, "reordering_blocks": 0, "reorderings_met": 0, "masks": 0}
VIT = Parts(1, 0, scaled_queries=2, biased_keys=2, biased_values=2, **NO_WINDOWS)
SWIN = Parts(0, 0, scaled_queries=4, biased_keys=4, biased_values=4, token_moves=9)
PARTS = {
    "vit": VIT,
    "distilled": VIT,
    "registers": VIT,
    "layer-scale": replace(VIT, layer_scales=4),
    "avg-pool": replace(VIT, embeddings=0),
    "no-qkv-bias": replace(VIT, biased_keys=0, biased_values=0),
    "qk-norm": replace(VIT, scaled_queries=0, biased_keys=0),
    "qk-rms-norm": replace(VIT, scaled_queries=0, biased_keys=0),
    "swin": replace(SWIN, reordering_blocks=2, reorderings_met=2, masks=1),
    "swin-padded": replace(SWIN, reordering_blocks=0, reorderings_met=0, masks=2),
    "swin-oblong": replace(
        SWIN,
        biased_keys=0,
        biased_values=0,
        reordering_blocks=4,
        reorderings_met=4,
        masks=2,
    ),
    "swin-partitioned": replace(SWIN, reordering_blocks=3, reorderings_met=3, masks=2),
    "swin-larger": replace(SWIN, reordering_blocks=0, reorderings_met=0, masks=2),
    "swin-many": replace(SWIN, reordering_blocks=2, reorderings_met=2, masks=2),
}


def test_families_state_what_their_models_have() -> None:
    assert {variant: parts(timm_model(variant)) for variant in PARTS} == PARTS
    assert PARTS.keys() == {*VARIANTS, *SWIN_VARIANTS}


def test_moves_of_tokens_are_not_counted_among_computed_shapes() -> None:
    plan = plan_passes(planned_modules("swin"), SWIN, without=frozenset({"static_shapes"}))
    places = expected_places(plan)
    assert places["gather_tokens"] is places["window_order"] is places["merge_gathers"] is None
    assert places["canonical_attention"] == places["scale_into_query"] == 4


def test_places_of_a_model_of_which_nothing_is_stated_are_not_known() -> None:
    plan = plan_passes(planned_modules("vit"))
    known = {name for name, number in expected_places(plan).items() if number is not None}
    assert known == {"canonical_attention", "class_token_only"}


ONE_OF_EACH = {(each.variant, each.exporter): each for each in (*EXPORTS, *SWIN_EXPORTS)}


@pytest.mark.parametrize("export", ONE_OF_EACH.values(), ids=str)
def test_every_pass_fires_where_the_model_says(export: Export) -> None:
    """Another number would be an error; what has no number here is the exporter's choice."""
    plan = plan_passes(planned_modules(export.variant), parts(timm_model(export.variant)))
    run_passes(export.graph(), plan)
    unknown = {name for name, number in expected_places(plan).items() if number is None}
    assert unknown == {"static_shapes", "merge_reshapes", "fusable_gelu"}


@pytest.mark.parametrize(
    ("changes", "blocks", "met"),
    [
        ({"window_size": 1}, 0, 0),
        ({"window_size": ((2, 8), (2, 4))}, 2, 2),  # plain and shifted strips
        ({"window_size": ((2, 8), (2, 4)), "depths": (3, 3)}, 2, 0),  # … and a plain one behind
        ({"img_size": 36, "window_size": 3, "num_classes": 3}, 2, 1),  # 9 × 9: merging pads
    ],
    ids=["single tokens", "strips", "strips behind", "odd"],
)
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_windows_that_change_little(
    changes: dict[str, Any],
    blocks: int,
    met: int,
    exporter: Exporter,
) -> None:
    model = make_model(SWIN_NAME, changes)
    has = parts(model)
    assert (has.reordering_blocks, has.reorderings_met) == (blocks, met)
    size = model.patch_embed.img_size
    stock = export_stock(model, size, batch=None, opset=18, exporter=exporter)
    none = np.zeros((0, 0), np.float32)
    modules = [AttentionModule(site.path, none, None) for site in attention_sites(model)]
    run_passes(to_graph(stock.model), plan_passes(modules, has))


# --- a pass that stops firing is an error --------------------------------------------------------


FIRES_ON = {
    **dict.fromkeys(["gather_tokens", "window_order", "merge_gathers", "zero_mask"], "swin"),
    "fold_layer_scale": "layer-scale",
}
FREE = {"static_shapes", "merge_reshapes", "fusable_gelu"}
"""Passes whose number of places is the exporter's choice."""


def fire_less(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The pass of that name overlooks the last place that it would change."""
    (kind,) = [row.kind for row in REWRITES if row.name == name]
    match = kind.match

    def overlook(self: Any, graph: gs.Graph) -> list[Any]:
        found = match(self, graph)
        last = max(index for index, item in enumerate(found) if not isinstance(item, Skip))
        return [*found[:last], *found[last + 1 :]]

    monkeypatch.setattr(kind, "match", overlook)


@pytest.mark.parametrize(
    "name",
    [row.name for row in REWRITES if Target.EVERY_EXPORT in row.targets and row.name not in FREE],
)
def test_a_pass_that_overlooks_a_place_is_an_error(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variant = FIRES_ON.get(name, "vit")
    maps = random_maps((1,), tokens_of(variant), windows=sites_of(variant)[0].classes or (0,))
    fold = FoldPreprocess((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) if name == "fold_preprocess" else None
    plan = plan_passes(planned_modules(variant, {0: maps}), parts(timm_model(variant)), fold)
    number = expected_places(plan)[name]
    assert number
    fire_less(monkeypatch, name)
    graph = Export(variant, "torchscript", None, 17).graph()
    message = rf"pass {name} failed.*expected {number} places; got {number - 1} "
    with pytest.raises(UnsupportedGraph, match=message):
        run_passes(graph, plan)


@pytest.mark.parametrize(
    ("name", "integer_maps"),
    [("requantize_maps", True), ("int8_maps", True), ("float_maps", False)],
)
def test_a_frozen_map_that_tensorrt_would_get_as_it_was_is_an_error(
    name: str, integer_maps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = planned_modules("vit", {0: random_maps((1,), tokens_of("vit"))})
    plan = order.plan_trt(modules, integer_maps=integer_maps, layer_normalization=True)
    assert expected_places(plan)[name] == 1
    fire_less(monkeypatch, name)
    graph = Export("vit", "torchscript", None, 17).graph()
    run_passes(graph, plan_passes(modules, VIT))
    with pytest.raises(UnsupportedGraph, match=rf"pass {name} failed.*expected 1 places; got 0 "):
        run_passes(graph, plan)


@pytest.mark.parametrize("rows", [False, True], ids=["entries", "rows"])
@pytest.mark.parametrize("integer_maps", [True, False])
def test_maps_frozen_in_part_are_counted_as_they_are_stored(integer_maps: bool, rows: bool) -> None:
    tokens = tokens_of("vit")
    mask = np.zeros((2, tokens) if rows else (2, tokens, tokens), np.bool_)
    mask[0, : tokens // 2] = mask[1] = True  # head 1 wholly, and a constant of its own
    modules = planned_modules("vit", {0: random_maps((0, 1), tokens, mask=mask)})
    graph = Export("vit", "torchscript", None, 17).graph()
    run_passes(graph, plan_passes(modules, VIT))
    plan = order.plan_trt(modules, integer_maps=integer_maps, layer_normalization=True)
    assert expected_places(plan)["int8_maps" if integer_maps else "float_maps"] == 2
    run_passes(graph, plan)


def test_another_number_of_places_is_an_error() -> None:
    graph = Export("vit", "torchscript", None, 17).graph()
    with pytest.raises(UnsupportedGraph, match=r"pass fold_layer_scale failed.*expected 4 places; got 0"):
        run_passes(graph, plan_passes(planned_modules("vit"), Parts(layer_scales=4)))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_the_plan_fits_what_torch_exports(exporter: str) -> None:
    export = Export("vit", "dynamo", None, 18) if exporter == "dynamo" else Export("vit", "torchscript", None, 17)
    maps = random_maps((0, 2), tokens_of("vit"))
    results = run_passes(export.graph(), plan_passes(planned_modules("vit", {0: maps})))
    rewritten = {result.name: result.rewritten for result in results}
    assert (rewritten["canonical_attention"], rewritten["class_token_only"], rewritten["freeze_heads"]) == (2, 1, 1)
    assert rewritten["fusable_gelu"] == (2 if exporter == "dynamo" else 0)
    about_windows = ("gather_tokens", "window_order", "merge_gathers", "zero_mask")
    assert not any(rewritten[name] for name in about_windows), "a ViT has no windows"


# --- leaving passes out ----------------------------------------------------------------------------------------------

LEFT_OUT = [
    Export("vit", "torchscript", None, 17),
    Export("vit", "dynamo", None, 18),
    Export("swin", "torchscript", None, 17),
    Export("swin", "dynamo", 1, 18),
]


def test_the_command_line_knows_what_can_be_left_out() -> None:
    assert list(SWITCHABLE) == list(OPTIONAL_PASSES)
    without = get_type_hints(export_command, include_extras=True)["without"]
    assert f": {', '.join(SWITCHABLE)}." in without.__metadata__[0].help


def test_the_documentation_has_the_list_of_rewrites() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    _, rest = text.split("<!-- rewrites: printed from eamdeploy/passes/rewrites.py -->\n")
    assert rest.split("<!-- end of rewrites -->")[0].strip() == listing().strip()


def test_every_pass_stands_in_the_list_once_and_behind_what_it_needs() -> None:
    names = [row.name for row in REWRITES]
    files = {path.stem for path in Path(order.__file__).parent.glob("*.py")}
    assert sorted(names) == sorted(files - {"__init__", "base", "facts", "order", "rewrites"})
    for row in REWRITES:
        assert row.needs is None or names.index(row.needs) < names.index(row.name)
        assert row.effect.endswith(".") and row.places.text


def test_targets_get_their_rows() -> None:
    def names(plan: list[PlannedPass[Any]]) -> list[str]:
        return [each.rewrite_pass.name for each in plan]

    maps = random_maps((1,), tokens_of("vit"))
    planned = names(plan_passes(planned_modules("vit", {0: maps})))
    every = [row.name for row in REWRITES if Target.EVERY_EXPORT in row.targets]
    assert planned == [name for name in every if name != "fold_preprocess"]
    assert names(order.plan_ort(fused_attention=True, ranges=None)) == ["fused_attention"]
    assert names(order.plan_ort(fused_attention=False, ranges={})) == [
        "integer_map_products",
        "float_maps",
        "quantize_products",
    ]
    assert names(order.plan_ort(fused_attention=True, ranges={}))[2] == "fused_attention"
    assert names(order.plan_trt_int8({})) == ["quantize_products"]
    assert expected_places(order.plan_trt(integer_maps=True, layer_normalization=False)) == {
        "requantize_maps": None,
        "int8_maps": None,
        "decompose_layer_norm": None,
    }


def test_a_pass_takes_those_along_that_depend_on_it() -> None:
    assert with_dependents([]) == frozenset()
    assert with_dependents(["merge_gathers", "zero_mask"]) == {"merge_gathers", "zero_mask"}
    assert with_dependents(["gather_tokens"]) == {"gather_tokens", "window_order", "merge_gathers"}
    assert with_dependents(SWITCHABLE) == SWITCHABLE.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("freeze_heads", r"the pass freeze_heads can't be left out; expected some of static_shapes, .*--baseline"),
        ("fold_preprocess", r"the pass fold_preprocess can't be left out.*only runs with --fold-preprocess"),
        ("freeze-heads", r"there is no pass freeze-heads; expected some of static_shapes.*fusable_gelu$"),
    ],
)
def test_what_cannot_be_left_out_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_dependents(["zero_mask", name])


@cache
def logits(variant: str) -> Floats:
    return torch_logits(variant, {}, 2)


@pytest.mark.parametrize("export", LEFT_OUT, ids=str)
def test_every_pass_is_exact_and_its_absence_too(export: Export) -> None:
    whole, places = _rewritten(export, frozenset())
    n = export.batch or 2
    assert same(logits(export.variant)[:n], whole, images_of(export.variant, n))
    for name in SWITCHABLE:
        left_out = with_dependents([name])
        model, others = _rewritten(export, left_out)
        assert others.keys() == places.keys() - left_out
        assert same(logits(export.variant)[:n], model, images_of(export.variant, n)), name
        if not any(places[each] for each in left_out):
            assert model == whole, name


def _rewritten(export: Export, without: frozenset[str]) -> tuple[onnx.ModelProto, dict[str, int]]:
    graph = export.graph()
    plan = plan_passes(planned_modules(export.variant), parts(timm_model(export.variant)), without=without)
    places = {result.name: result.rewritten for result in run_passes(graph, plan)}
    return to_model(graph), places
