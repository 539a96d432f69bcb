"""Heads of low rank beside live and frozen ones, against torch's `FrozenAttention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any

import attention_graphs
import numpy as np
import onnx
import pytest
from rewriting import changed, initializers, ops, rewrite, rewritten, same
from timm_graphs import (
    HEAD_DIM,
    D,
    Export,
    ManyFactors,
    images_of,
    modules_of,
    planned_modules,
    random_factors,
    random_maps,
    sites_of,
    timm_model,
    torch_logits,
)

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.frozen import IntegerFactors, IntegerMaps
from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.host.sites import window_maps
from eamdeploy.parity.gate import TOLERANCES, compare
from eamdeploy.passes.base import PlannedPass, run_passes
from eamdeploy.passes.freeze_heads import AttentionModule, FreezeHeads, check_accounted
from eamdeploy.passes.order import plan_passes
from eamdeploy.vocabulary import WindowMaps

# of every module the heads with a map, and ranks with their heads; others are live
Kinds = tuple[tuple[tuple[int, ...], dict[int, tuple[int, ...]]], ...]

PLANS: dict[str, Kinds] = {
    "live, map, rank 4": (((0,), {4: (1,)}), ((2,), {1: (0,)})),
    "live, rank 1, rank 4": (((), {1: (0,), 4: (2,)}), ((), {4: (1,)})),
    "map, rank 1, rank 4": (((1,), {1: (2,), 4: (0,)}), ((0, 1), {2: (2,)})),
    "low rank alone": (((), {4: (0, 1, 2)}), ((), {1: (1,), 3: (0, 2)})),
    "one module": (((), {}), ((), {2: (0, 1, 2)})),
}
SWIN_PLAN: Kinds = (((), {}), ((1,), {1: (0,), 4: (3,)}), ((), {4: (0, 1, 2, 3)}), ((2,), {4: (0,)}))
EXPORTS = (
    *(Export(v, "torchscript", None, 17) for v in ("vit", "qk-norm", "no-qkv-bias", "avg-pool")),
    *(Export(v, "dynamo", None, 18) for v in ("vit", "distilled", "layer-scale")),
    Export("vit", "torchscript", 2, 16),
    Export("vit", "dynamo", 2, 18, fused=True),
)
SWIN_EXPORTS = (
    Export("swin-many", "torchscript", None, 17),
    Export("swin-many", "torchscript", 1, 17),
    Export("swin-many", "dynamo", None, 18),
)


def planned(variant: str, kinds: Kinds, mode: WindowMaps = "shared") -> tuple[dict[int, IntegerMaps], ManyFactors]:
    maps, factors = {}, {}
    for index, (site, (whole, ranks)) in enumerate(zip(sites_of(variant), kinds, strict=True)):
        windows = window_maps(site, mode) or (0,)
        if whole:
            maps[index] = random_maps(whole, site.tokens, index, windows)
        groups = [random_factors(heads, site.tokens, rank, 10 * index + rank, windows) for rank, heads in ranks.items()]
        if groups:
            factors[index] = tuple(groups)
    return maps, factors


@cache
def reference(variant: str, plan: str, mode: WindowMaps = "shared") -> Any:
    maps, factors = planned(variant, SWIN_PLAN if plan == "swin" else PLANS[plan], mode)
    return torch_logits(variant, maps, 2, factors)


def all_passes(
    export: Export, modules: list[AttentionModule], without: frozenset[str] = frozenset()
) -> onnx.ModelProto:
    graph = export.graph()
    run_passes(graph, plan_passes(modules, without=without))
    model = to_model(graph)
    check_accounted(model, modules)
    return model


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("export", EXPORTS, ids=str)
def test_exports_compute_what_the_reference_forward_does(export: Export, plan: str) -> None:
    modules = planned_modules(export.variant, *planned(export.variant, PLANS[plan]))
    n = export.batch or 2
    model = all_passes(export, modules)
    assert same(reference(export.variant, plan)[:n], model, images_of(export.variant)[:n])


@pytest.mark.parametrize("mode", ["shared", "class", "window"])
@pytest.mark.parametrize("export", SWIN_EXPORTS, ids=str)
def test_windows_have_their_own_factors(export: Export, mode: WindowMaps) -> None:
    modules = planned_modules(export.variant, *planned(export.variant, SWIN_PLAN, mode))
    n = export.batch or 2
    model = all_passes(export, modules)
    assert same(reference(export.variant, "swin", mode)[:n], model, images_of(export.variant)[:n])


@pytest.mark.parametrize("left_out", ["fold_value_bias", "class_token_only", "canonical_attention"])
def test_it_is_exact_without_the_other_passes(left_out: str) -> None:
    from eamdeploy.passes.order import with_dependents

    without, plan = with_dependents([left_out]), "live, rank 1, rank 4"
    make = modules_of if "class_token_only" in without else planned_modules
    model = all_passes(EXPORTS[0], make("vit", *planned("vit", PLANS[plan])), without)
    assert same(reference("vit", plan), model, images_of("vit"))


def test_every_plan_is_another_function() -> None:
    """Else the parity above would prove nothing."""
    logits = [torch_logits("vit", {}), *(reference("vit", plan) for plan in PLANS)]
    modes: tuple[WindowMaps, ...] = ("shared", "class", "window")
    windows = [torch_logits("swin-many", {}), *(reference("swin-many", "swin", m) for m in modes)]
    for each in (logits, windows):
        for one, other in combinations(each, 2):
            assert not compare(one, other, TOLERANCES["f32-reassoc"]).passed


def frozen_vit(plan: str) -> onnx.ModelProto:
    return all_passes(EXPORTS[0], planned_modules("vit", *planned("vit", PLANS[plan])))


def test_a_perturbed_constant_fails_the_parity() -> None:
    plan = "live, map, rank 4"
    model, prefix = frozen_vit(plan), "blocks.0.attn/"
    assert same(reference("vit", plan), model, images_of("vit"))

    def nudge(values: Any) -> Any:
        middle = tuple(size // 2 for size in values.shape)
        values[middle] += 40 if values.dtype == np.uint8 else values.dtype.type(0.1)
        return values

    names = ("pool_integers", "pool_scales", "mix.4_integers", "v_pooled.1_weight", "o_pooled.1_weight")
    for name in names:
        assert not same(reference("vit", plan), changed(model, prefix + name, nudge), images_of("vit")), name


def shapes_of(model: onnx.ModelProto, block: int) -> dict[str, tuple[int, ...]]:
    prefix = f"blocks.{block}.attn/"
    constants = initializers(model).items()
    return {name.removeprefix(prefix): a.shape for name, a in constants if name.startswith(prefix)}


def test_heads_of_low_rank_have_no_map_and_no_weights_for_all_tokens() -> None:
    shapes = shapes_of(frozen_vit("map, rank 1, rank 4"), 0)
    assert "q_weight" not in shapes and "v_weight" not in shapes
    assert shapes["v_frozen_weight"] == (D, HEAD_DIM) and shapes["proj_weight"] == (HEAD_DIM, D)
    assert shapes["map_integers"] == (17, 17), "of the one head with a whole map"
    assert shapes["pool_integers"] == (5, 17)
    assert shapes["mix.1_integers"] == (17, 1) and shapes["mix.4_integers"] == (17, 4)
    assert shapes["v_pooled.0_weight"] == (D, HEAD_DIM)
    assert shapes["o_pooled.0_weight"] == (HEAD_DIM, D)


def test_a_layer_of_low_rank_alone_has_no_attention() -> None:
    model = frozen_vit("low rank alone")
    counts = ops(model)
    assert counts["Softmax"] == 0 and counts["Transpose"] <= 1  # that of the patches
    for block in range(2):
        names = {name.partition("_")[0] for name in shapes_of(model, block)}
        assert names <= {"pool", "mix.4", "mix.1", "mix.3", "pooled", "v", "o"}, names
    assert not [a for a in initializers(model).values() if a.shape[-2:] == (17, 17)]
    value = timm_model("vit").blocks[0].attn.proj.weight.detach().numpy().T
    assert not any(np.array_equal(a, value) for a in initializers(model).values())


def test_only_read_rows_of_the_mix_are_there() -> None:
    shapes = shapes_of(frozen_vit("live, map, rank 4"), 1)
    assert shapes["mix.1_integers"] == (1, 1) and shapes["pool_integers"] == (1, 17)


def test_a_second_run_changes_nothing() -> None:
    modules = planned_modules("vit", *planned("vit", PLANS["live, map, rank 4"]))
    graph = to_graph(frozen_vit("live, map, rank 4"))
    before = to_model(graph).SerializeToString(deterministic=True)
    rewrite(graph, FreezeHeads(modules), 0)
    assert to_model(graph).SerializeToString(deterministic=True) == before


def test_one_matrix_where_it_has_fewer_weights() -> None:
    weights = attention_graphs.WEIGHTS  # biased
    group = random_factors((0, 2), attention_graphs.N, 2)
    module = AttentionModule("m", weights.value_rows, None, factors=(group,))
    stock = attention_graphs.Spelling().model()
    model, _ = rewritten(stock, FreezeHeads([module]), 1)
    shapes = {name: a.shape for name, a in initializers(model).items()}
    channels = attention_graphs.D  # at most twice the head's 5
    assert shapes["m/vo_pooled.0_weight"] == (channels, channels)
    assert shapes["m/vo_pooled.0_bias"] == (channels,)
    mix, pool = group.mix * group.mix_scales[..., None], group.pool * group.pool_scales[..., None]
    maps = dict(zip(group.heads, (mix @ pool)[:, 0], strict=True))
    assert same(attention_graphs.forward([weights], [maps]), model, attention_graphs.IMAGES)


# --- near misses ---------------------------------------------------------------------------------


def group() -> IntegerFactors:
    return random_factors((1,), 17, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: replace(g, heads=(3,)), r"some of \[0, 2\], each once; got \[3\]"),
        (lambda g: replace(g, heads=(1,)), r"some of \[0, 2\], each once; got \[1\]"),
        (lambda g: random_factors((0,), 16, 2), "the factors of rank 2 of blocks.0.attn do not fit"),
        (lambda g: random_factors((0,), 17, 2, windows=(0, 1)), "the factors of rank 2"),
        (lambda g: replace(g, heads=(0, 2)), "the factors of rank 2"),
    ],
)
def test_factors_that_do_not_fit_are_refused(change: Callable[[IntegerFactors], IntegerFactors], message: str) -> None:
    maps = {0: random_maps((1,), 17)}
    modules = modules_of("vit", maps, {0: (change(group()),)})
    with pytest.raises(UnsupportedGraph, match=message):
        run_passes(EXPORTS[0].graph(), [PlannedPass(FreezeHeads(modules), 1)])


def test_factors_that_are_not_in_the_file_are_missed() -> None:
    plan = "live, map, rank 4"
    modules = planned_modules("vit", *planned("vit", PLANS[plan]))
    model = frozen_vit(plan)
    check_accounted(model, modules)
    for name in ("pool_integers", "mix.4_integers"):
        other = changed(model, f"blocks.0.attn/{name}", lambda a: a[::-1])
        with pytest.raises(UnsupportedGraph, match=r"frozen heads of blocks\.0\.attn are not in"):
            check_accounted(other, modules)


def test_operators_of_a_mixed_layer() -> None:
    counts = ops(frozen_vit("live, map, rank 4"))
    assert counts["Softmax"] == 2 and counts["DequantizeLinear"] == 6
