"""Freezing with windows, and of rows and entries, against torch's `FrozenAttention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from attention_graphs import (
    GRID_IMAGES,
    POSITION_BIAS,
    WEIGHTS,
    Floats,
    H,
    N,
    WindowBlock,
    Windows,
    run_unoptimized,
    window_mask,
)
from numpy.typing import NDArray
from rewriting import changed, initializers, ops, rewrite, same
from timm_graphs import Export, images_of, modules_of, planned_modules, random_maps, sites_of, timm_model, torch_logits

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.frozen import IntegerMaps
from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.host.sites import AttentionSite, window_maps
from eamdeploy.parity.gate import TOLERANCES, compare
from eamdeploy.passes.base import run_passes
from eamdeploy.passes.canonical_attention import CanonicalAttention
from eamdeploy.passes.freeze_heads import AttentionModule, FreezeHeads, check_accounted
from eamdeploy.passes.order import plan_passes
from eamdeploy.vocabulary import WINDOW_MAPS, WindowMaps

Granularity = Literal["head", "row", "entry"]
PARTS: tuple[Granularity, ...] = ("row", "entry")
EXPORTS = {variant: Export(variant, "torchscript", None, 17) for variant in ("vit", "qk-norm", "swin-many")}
CASES = [
    *(("vit", part, "shared") for part in PARTS),
    *(("qk-norm", part, "shared") for part in PARTS),
    *(("swin-many", part, mode) for part in ("head", *PARTS) for mode in WINDOW_MAPS),
]


def mixed_mask(heads: int, tokens: int, granularity: Granularity, seed: int) -> NDArray[np.bool_] | None:
    """[heads, N] or [heads, N, N]: of the first head one piece, of the last all, of others any share."""
    if granularity == "head":
        return None
    rng = np.random.default_rng(seed)
    mask = rng.random((heads, tokens) if granularity == "row" else (heads, tokens, tokens)) < 0.4
    mask[0] = False
    mask[(0, 0) if granularity == "row" else (0, 0, 1)] = True
    mask[-1] = True
    return mask


def site_maps(site: AttentionSite, granularity: Granularity, mode: WindowMaps, seed: int) -> IntegerMaps:
    """Maps of all heads but the second: one of partly frozen heads and a whole one, or more of them."""
    heads = (0, *range(2, site.heads))
    windows = window_maps(site, mode) or (0,)
    return random_maps(heads, site.tokens, seed, windows, mixed_mask(len(heads), site.tokens, granularity, seed))


@cache
def plan(variant: str, granularity: Granularity, mode: WindowMaps) -> dict[int, IntegerMaps]:
    """What is frozen, by module: of a ViT in all of them, of a Swin in all but the first."""
    sites = list(enumerate(sites_of(variant)))[variant.startswith("swin") :]
    return {index: site_maps(site, granularity, mode, index) for index, site in sites}


@cache
def canonical(variant: str) -> onnx.ModelProto:
    """The export after the passes in front of freezing that keep every bias."""
    graph = EXPORTS[variant].graph()
    passes = plan_passes(modules_of(variant))
    names = [each.rewrite_pass.name for each in passes]
    run_passes(graph, passes[: names.index("canonical_attention") + 1])
    return to_model(graph)


@cache
def frozen(variant: str, granularity: Granularity, mode: WindowMaps) -> onnx.ModelProto:
    maps = plan(variant, granularity, mode)
    graph = to_graph(canonical(variant))
    rewrite(graph, FreezeHeads(modules_of(variant, maps)), len(maps))
    return to_model(graph)


@cache
def reference(variant: str, granularity: Granularity, mode: WindowMaps) -> Floats:
    return torch_logits(variant, plan(variant, granularity, mode), 3)


@pytest.mark.parametrize(("variant", "granularity", "mode"), CASES)
def test_frozen_parts_compute_what_the_reference_forward_does(
    variant: str, granularity: Granularity, mode: WindowMaps
) -> None:
    expected = reference(variant, granularity, mode)
    assert same(expected, frozen(variant, granularity, mode), images_of(variant, 3))
    check_accounted(frozen(variant, granularity, mode), modules_of(variant, plan(variant, granularity, mode)))


def test_every_case_is_another_function() -> None:
    """Else the parity above would prove nothing."""
    for variant in EXPORTS:
        logits = [torch_logits(variant, {}, 3), *(reference(*case) for case in CASES if case[0] == variant)]
        for one, other in combinations(logits, 2):
            assert not compare(one, other, TOLERANCES["f32-reassoc"]).passed


@pytest.mark.parametrize(
    ("variant", "batch", "granularity"), [("swin-many", 1, "row"), ("swin-padded", 2, "entry"), ("qk-norm", 2, "row")]
)
def test_all_passes_together_compute_the_same_at_a_fixed_batch(
    variant: str, batch: int, granularity: Granularity
) -> None:
    maps = plan(variant, granularity, "class")
    modules = planned_modules(variant, maps)
    graph = Export(variant, "torchscript", batch, 17).graph()
    results = {result.name: result.rewritten for result in run_passes(graph, plan_passes(modules))}
    assert results["freeze_heads"] == len(maps)
    model = to_model(graph)
    check_accounted(model, modules)
    assert same(torch_logits(variant, maps, batch), model, images_of(variant, batch))


@pytest.mark.parametrize("granularity", PARTS)
def test_second_run_finds_no_module_left(granularity: Granularity) -> None:
    maps = plan("swin-many", granularity, "class")
    graph = to_graph(frozen("swin-many", granularity, "class"))
    before = to_model(graph).SerializeToString(deterministic=True)
    result = rewrite(graph, FreezeHeads(modules_of("swin-many", maps)), 0)
    assert sum("has the value weights of" in skip.reason for skip in result.skipped) == len(maps)
    assert to_model(graph).SerializeToString(deterministic=True) == before


# --- what the graph holds --------------------------------------------------------------------------------------------


def swin_weights(head: int, module: int) -> tuple[Floats, Floats, Floats]:
    """Query, key and value rows [d,D] of a head of the Swin with many windows."""
    site = sites_of("swin-many")[module]
    rows = timm_model("swin-many").get_submodule(site.path).qkv.weight.detach().numpy()
    query, key, value = rows.reshape(3, site.heads, -1, rows.shape[1])[:, head]
    return query, key, value


def columns_held(model: onnx.ModelProto, rows: Floats) -> int:
    """How many of `rows` [d,D] are a column of some weight."""
    matrices = [a for a in initializers(model).values() if a.dtype == np.float32 and a.ndim >= 2]
    flat = [np.swapaxes(a, -1, -2).reshape(-1, a.shape[-2]) for a in matrices]
    return sum(any((m == row).all(axis=1).any() for m in flat if m.shape[1] == len(row)) for row in rows)


@pytest.mark.parametrize("mode", WINDOW_MAPS)
def test_wholly_frozen_heads_leave_no_softmax_bias_mask_query_or_key(mode: WindowMaps) -> None:
    sites = sites_of("swin-many")
    maps = {
        i: random_maps(tuple(range(site.heads)), site.tokens, i, window_maps(site, mode) or ())
        for i, site in enumerate(sites)
        if i > 0
    }
    graph = to_graph(canonical("swin-many"))
    rewrite(graph, FreezeHeads(modules_of("swin-many", maps)), 3)
    model = to_model(graph)
    assert ops(model)["Softmax"] == 1 and not ops(model)["Cast"]
    biases = [a.shape for a in initializers(model).values() if a.dtype == np.float32 and a.shape[2:] == (12, 12)]
    assert biases == [(1, 4, 12, 12)], "the first module's"
    for module, site in enumerate(sites):
        for head in range(site.heads):
            query, key, value = swin_weights(head, module)
            left = [columns_held(model, rows) for rows in (query, key, value)]
            assert left == ([len(value)] * 3 if module == 0 else [0, 0, len(value)])
    assert same(torch_logits("swin-many", maps, 3), model, images_of("swin-many", 3))


@pytest.mark.parametrize(("granularity", "kept"), [("head", False), ("row", True), ("entry", True)])
def test_query_and_key_of_a_head_stay_as_long_as_part_of_it_is_live(granularity: Granularity, kept: bool) -> None:
    model = frozen("swin-many", granularity, "class")
    for module in (1, 2, 3):
        first, live, last = (swin_weights(head, module) for head in (0, 1, 3))
        size = len(live[0])
        assert [columns_held(model, rows) for rows in first] == ([size] * 3 if kept else [0, 0, size])
        assert [columns_held(model, rows) for rows in live] == [size] * 3
        assert [columns_held(model, rows) for rows in last] == [0, 0, size]


def test_frozen_rows_have_no_scores() -> None:
    """Only as many rows as the head with the most live ones has."""
    graph = to_graph(frozen("swin-many", "row", "shared"))
    site = sites_of("swin-many")[1]
    mask = plan("swin-many", "row", "shared")[1].mask
    assert mask is not None
    partial = [head for head in mask if not head.all()]
    live = max(int((~head).sum()) for head in partial)
    shape = graph.tensors()[f"{site.path}/softmax_partial"].shape
    assert shape[-3:] == [len(partial), live, site.tokens]


def test_maps_are_stored_once_for_all_windows_that_share_them() -> None:
    sizes = {}
    for mode in WINDOW_MAPS:
        constants = initializers(frozen("swin-many", "head", mode))
        sizes[mode] = constants[f"{sites_of('swin-many')[1].path}/map_integers"].size
    site = sites_of("swin-many")[1]
    assert site.classes is not None and len(set(site.classes)) == 4 and site.n_windows == 12
    one = 3 * site.tokens**2
    assert sizes == {"shared": one, "class": 4 * one, "window": 12 * one}


# --- the checks notice -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", WINDOW_MAPS)
@pytest.mark.parametrize("granularity", PARTS)
def test_changed_integer_is_noticed(granularity: Granularity, mode: WindowMaps) -> None:
    model, modules = (
        frozen("swin-many", granularity, mode),
        modules_of("swin-many", plan("swin-many", granularity, mode)),
    )
    for kind, heads in (("rows" if granularity == "row" else "entries", r"\[0, 2\]"), ("map", r"\[3\]")):
        name = f"{modules[2].path}/{kind}_integers"
        for place in ((0, 0), (3, 1), (-1, -1)):
            wrong = changed(model, name, add_at(place, 1))
            with pytest.raises(UnsupportedGraph, match=rf"frozen heads of {modules[2].path} are not in.*heads {heads}"):
                check_accounted(wrong, modules)


def add_at(place: tuple[int, ...], amount: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def change(values: NDArray[Any]) -> NDArray[Any]:
        values[place] = values[place] + np.array(amount, values.dtype)
        return values

    return change


@pytest.mark.parametrize(
    ("granularity", "name", "place", "amount"),
    [
        ("row", "rows_integers", (0, 2), 99),
        ("row", "rows_scales", (0,), 0.1),
        ("row", "q_partial_weight", (0, 0, 0), 1),
        ("row", "k_partial_weight", (0, 0), 1),
        ("row", "bias_partial", (0, 0, 0, 0), 2),
        ("row", "map_integers", (0, 0), 99),
        ("row", "proj_weight", (0, 0), 0.1),
        ("entry", "entries_integers", (0, 1), 99),
        ("entry", "entries_scales", (0,), 0.1),
        ("entry", "v_partial_weight", (0, 0), 0.1),
        ("entry", "bias_partial", (0, 0, 0, 0), 2),
    ],
)
def test_perturbation_fails_the_parity(
    granularity: Granularity, name: str, place: tuple[int, ...], amount: float
) -> None:
    model = frozen("swin-many", granularity, "class")
    wrong = changed(model, f"{sites_of('swin-many')[1].path}/{name}", add_at(place, amount))
    assert not same(reference("swin-many", granularity, "class"), wrong, images_of("swin-many", 3))


def test_other_mask_fails_the_parity() -> None:
    model = frozen("swin-many", "entry", "class")
    wrong = changed(model, f"{sites_of('swin-many')[1].path}/entries_live", lambda mask: np.roll(mask, 1, axis=-1))
    assert not same(reference("swin-many", "entry", "class"), wrong, images_of("swin-many", 3))


@pytest.mark.parametrize(
    "name", ["x_live_rows_indices", "rows_in_order_indices", "context_frozen_rows_maps_by_window_indices"]
)
def test_other_order_of_rows_or_windows_fails_the_parity(name: str) -> None:
    model = frozen("swin-many", "row", "class")
    wrong = changed(model, f"{sites_of('swin-many')[1].path}/{name}", lambda indices: np.roll(indices, 1, axis=-1))
    assert not same(reference("swin-many", "row", "class"), wrong, images_of("swin-many", 3))


# --- near misses -----------------------------------------------------------------------------------------------------


def refused(change: Callable[[IntegerMaps], IntegerMaps], granularity: Granularity = "row") -> str:
    """Why the second module can't be frozen with these maps."""
    maps = plan("swin-many", granularity, "class")[1]
    modules = modules_of("swin-many", {1: change(maps)})
    with pytest.raises(UnsupportedGraph, match="pass freeze_heads failed") as caught:
        rewrite(to_graph(canonical("swin-many")), FreezeHeads(modules), 1)
    return str(caught.value)


@pytest.mark.parametrize(
    ("granularity", "change", "got"),
    [
        ("row", lambda m: replace(m, windows=m.windows[:-1]), "got 11 windows"),
        ("head", lambda m: replace(m, windows=(0,)), "got 1 windows"),
        ("head", lambda m: replace(m, windows=(0,) * 12), r"got 12 windows, integers [3, 4, 12, 12]"),
        ("row", lambda m: replace(m, integers=m.integers[:, :2]), "integers [3, 2, 12, 12]"),
        ("row", lambda m: replace(m, scales=m.scales[..., :-1]), "scales [3, 4, 11]"),
        ("row", lambda m: replace(m, mask=m.mask[:, :-1]), "mask [3, 11]"),
        ("entry", lambda m: replace(m, mask=m.mask[:2]), "mask [2, 12, 12]"),
        ("entry", lambda m: replace(m, mask=m.mask[..., :5]), "mask [3, 12, 5]"),
    ],
)
def test_maps_that_do_not_fit_the_windows_are_refused(
    granularity: Granularity, change: Callable[[IntegerMaps], IntegerMaps], got: str
) -> None:
    message = refused(change, granularity)
    assert f"the frozen maps of {sites_of('swin-many')[1].path} do not fit the graph; expected 12 windows" in message
    assert got in message


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["head", *PARTS])
@pytest.mark.parametrize("windows", [(0, 0, 0, 0), (0, 1, 1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("batch", [1, "batch"])
def test_window_block_computes_what_numpy_says(
    batch: int | str, windows: tuple[int, ...], granularity: Granularity
) -> None:
    block = WindowBlock(Windows(shift=(1, 2)), POSITION_BIAS, window_mask(4, (0, 1, 1, 2)))
    maps = random_maps((0, 2), N, 5, windows, mixed_mask(2, N, granularity, 5))
    graph = to_graph(block.model(batch))
    rewrite(graph, CanonicalAttention(), 1)
    rewrite(graph, FreezeHeads([AttentionModule("block", WEIGHTS.value_rows, maps)]), 1)
    images = GRID_IMAGES[: 1 if batch == 1 else 2]
    assert same(block.forward(images, maps), to_model(graph), images)


def test_numpys_window_block_is_the_graphs() -> None:
    block = WindowBlock(Windows(shift=(1, 2)), POSITION_BIAS, window_mask(4))
    assert same(block.forward(GRID_IMAGES), block.model(), GRID_IMAGES)
    assert np.abs(run_unoptimized(block.model(), GRID_IMAGES)).max() > 0.1 and H == 3
