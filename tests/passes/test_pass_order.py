from __future__ import annotations

import pytest
from timm_graphs import Export, planned_modules, random_maps, timm_model, tokens_of

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.model import to_graph
from eamdeploy.host.attention import parts
from eamdeploy.passes.base import run_passes
from eamdeploy.passes.order import Parts, plan_passes


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
