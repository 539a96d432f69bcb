from __future__ import annotations

import pytest
from timm_graphs import Export, planned_modules, random_maps, tokens_of

from eamdeploy.graph.model import to_graph
from eamdeploy.passes.base import run_passes
from eamdeploy.passes.order import plan_passes


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
