from __future__ import annotations

import re
from functools import cache

import onnx
import pytest
from attention_graphs import Floats
from rewriting import same
from timm_graphs import Export, images_of, planned_modules, random_maps, timm_model, tokens_of, torch_logits

from eamdeploy.errors import ConfigError, UnsupportedGraph
from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.host.attention import parts
from eamdeploy.passes import order
from eamdeploy.passes.base import run_passes
from eamdeploy.passes.order import SWITCHABLE, Parts, plan_passes, with_dependents


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


def test_plan_expects_what_the_model_is_known_to_have_besides() -> None:
    plan = plan_passes(planned_modules("vit"), Parts(embeddings=1, layer_scales=4))
    expected = {p.rewrite_pass.name: p.expected for p in plan}
    assert (expected["add_position"], expected["fold_layer_scale"]) == (1, 4)
    unknown = {p.rewrite_pass.name: p.expected for p in plan_passes(planned_modules("vit"))}
    assert unknown["add_position"] is unknown["fold_layer_scale"] is None


@pytest.mark.parametrize("variant", ["vit", "distilled", "registers", "layer-scale", "avg-pool", "swin"])
def test_every_variant_has_the_parts_that_its_class_says(variant: str) -> None:
    graph = to_graph(Export(variant, "torchscript", None, 17).model())
    has = parts(timm_model(variant))
    run_passes(graph, plan_passes(planned_modules(variant), has))
    assert has == Parts(
        embeddings=int(variant not in ("avg-pool", "swin")), layer_scales=4 if variant == "layer-scale" else 0
    )


def test_another_number_of_places_is_an_error() -> None:
    graph = to_graph(Export("vit", "torchscript", None, 17).model())
    with pytest.raises(UnsupportedGraph, match=r"pass fold_layer_scale failed.*expected 4 places; got 0"):
        run_passes(graph, plan_passes(planned_modules("vit"), Parts(layer_scales=4)))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_the_plan_fits_what_torch_exports(exporter: str) -> None:
    export = Export("vit", "dynamo", None, 18) if exporter == "dynamo" else Export("vit", "torchscript", None, 17)
    maps = random_maps((0, 2), tokens_of("vit"))
    results = run_passes(to_graph(export.model()), plan_passes(planned_modules("vit", {0: maps})))
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


def test_the_table_of_the_docstring_is_what_the_code_says() -> None:
    rows = re.findall(r"^\| (\w+) +\| (\w+|-) +\|", order.__doc__ or "", re.MULTILINE)
    needs = {name: None if needed == "-" else needed for name, needed in rows if name not in order._NOT_SWITCHABLE}
    assert list(needs.items()) == list(SWITCHABLE.items())
    maps = random_maps((1,), tokens_of("vit"))
    planned = [each.rewrite_pass.name for each in plan_passes(planned_modules("vit", {0: maps}))]
    assert planned == [name for name, _ in rows if name != "fold_preprocess"]


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
    graph = to_graph(export.model())
    plan = plan_passes(planned_modules(export.variant), parts(timm_model(export.variant)), without=without)
    places = {result.name: result.rewritten for result in run_passes(graph, plan)}
    return to_model(graph), places
