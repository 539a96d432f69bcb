from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import onnx
import pytest
import timm_graphs
from attention_graphs import IMAGES, Floats, GraphBuilder, N, Stack, forward, make_weights, run_unoptimized
from numpy.typing import NDArray
from onnx import numpy_helper
from timm_graphs import (
    DEPTH,
    EXPORTS,
    HEAD_DIM,
    D,
    Export,
    H,
    modules_of,
    random_maps,
    timm_model,
    tokens_of,
    torch_logits,
)

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.frozen import IntegerMaps
from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.parity.gate import TOLERANCES, compare
from eamdeploy.passes.base import PassResult, PlannedPass, run_passes
from eamdeploy.passes.canonical_attention import CanonicalAttention
from eamdeploy.passes.freeze_heads import AttentionModule, FreezeHeads, check_accounted

Plan = Mapping[int, tuple[int, ...]]

VIT = Export("vit", "torchscript", 2, 17)
PLANS: Sequence[Plan] = (
    {0: (1,)},
    {1: (0, 2)},
    {0: (0, 1, 2)},
    {0: (2,), 1: (0, 1)},
    {0: (0, 1, 2), 1: (0, 1, 2)},
)
MIXED: Plan = {0: (0, 2), 1: (1,)}
BESIDE_LIVE, INSTEAD_OF_LIVE = 8, 9 - 18  # nodes that freezing some heads of a module, or all of them, adds


def maps_of(plan: Plan, variant: str = "vit") -> dict[int, IntegerMaps]:
    return {block: random_maps(heads, tokens_of(variant), seed=block) for block, heads in plan.items()}


def reference_logits(plan: Plan, variant: str = "vit") -> Floats:
    """What torch says of the model with `maps_of` this plan."""
    return _logits(variant, tuple(plan.items()))


@cache
def _logits(variant: str, plan: tuple[tuple[int, tuple[int, ...]], ...]) -> Floats:
    return torch_logits(variant, maps_of(dict(plan), variant))


def freeze(stock: onnx.ModelProto, modules: Sequence[AttentionModule]) -> tuple[onnx.ModelProto, PassResult]:
    """`stock` made canonical, with every frozen module of `modules` frozen."""
    graph = to_graph(stock)
    frozen = sum(module.frozen is not None for module in modules)
    canonical, freezing = PlannedPass(CanonicalAttention(), len(modules)), PlannedPass(FreezeHeads(modules), frozen)
    result = run_passes(graph, [canonical, freezing])[1]
    return to_model(graph), result


def freeze_vit(plan: Plan) -> tuple[onnx.ModelProto, PassResult]:
    return freeze(VIT.model(), modules_of("vit", maps_of(plan)))


def assert_parity(reference: Floats, model: onnx.ModelProto, images: Floats) -> None:
    report = compare(reference, run_unoptimized(model, images), TOLERANCES["f32-reassoc"])
    assert report.passed, report


def initializers(model: onnx.ModelProto) -> dict[str, NDArray[np.generic]]:
    return {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}


# --- it computes what the checkpoint means ---------------------------------------------------------------------------


@pytest.mark.parametrize("export", EXPORTS, ids=str)
def test_frozen_exports_compute_what_the_reference_forward_does(export: Export) -> None:
    maps = maps_of(MIXED, export.variant)
    model, result = freeze(export.model(), modules_of(export.variant, maps))
    assert (result.name, result.rewritten, result.skipped) == ("freeze_heads", 2, ())
    n = export.batch or len(timm_graphs.IMAGES)
    assert_parity(reference_logits(MIXED, export.variant)[:n], model, timm_graphs.IMAGES[:n])


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("export", [VIT, Export("qk-norm", "dynamo", None, 18)], ids=str)
def test_any_choice_of_heads_computes_what_the_reference_forward_does(export: Export, plan: Plan) -> None:
    maps = maps_of(plan, export.variant)
    model, _ = freeze(export.model(), modules_of(export.variant, maps))
    assert_parity(reference_logits(plan, export.variant), model, timm_graphs.IMAGES)


def test_freezing_changes_the_logits() -> None:
    """Else the parity above would prove nothing."""
    for plan in PLANS:
        live, frozen = reference_logits({}), reference_logits(plan)
        assert not compare(live, frozen, TOLERANCES["f32-reassoc"]).passed


@pytest.mark.parametrize("seed", range(5))
def test_random_maps_compute_what_numpy_says(seed: int) -> None:
    weights = [make_weights(seed, (False,) * 3), make_weights(seed + 100, (False,) * 3)]
    maps = [random_maps((1,), N, seed), random_maps((0, 2), N, seed + 100)]
    modules = [AttentionModule(f"m{i}", w.value_rows, m) for i, (w, m) in enumerate(zip(weights, maps, strict=True))]
    model, _ = freeze(Stack(tuple(weights), batch="batch").model(), modules)
    assert_parity(forward(weights, [by_head(m) for m in maps]), model, IMAGES)


def by_head(maps: IntegerMaps) -> dict[int, Floats]:
    return dict(zip(maps.heads, maps.integers * maps.scales[..., None], strict=True))


@pytest.mark.parametrize("position", [0, 1])
def test_shared_weights_are_not_overwritten_and_equal_modules_are_told_apart_by_order(position: int) -> None:
    weights = make_weights(0, (False,) * 3)
    maps = random_maps((1,), N)
    modules = [AttentionModule(f"m{i}", weights.value_rows, maps if i == position else None) for i in range(2)]
    stock = Stack((weights, weights)).model()
    assert len([a for a in initializers(stock).values() if np.array_equal(a, weights.out)]) == 1
    expected = forward([weights] * 2, [by_head(maps) if i == position else {} for i in range(2)])
    model, _ = freeze(stock, modules)
    assert_parity(expected, model, IMAGES)


def test_equal_modules_keep_each_its_own_maps() -> None:
    weights = make_weights(0, (False,) * 3)
    maps = [random_maps((1,), N, 1), random_maps((1,), N, 2)]
    modules = [AttentionModule(f"m{i}", weights.value_rows, m) for i, m in enumerate(maps)]
    model, _ = freeze(Stack((weights, weights)).model(), modules)
    assert_parity(forward([weights] * 2, [by_head(m) for m in maps]), model, IMAGES)


def test_perturbed_weight_or_map_fails_the_parity() -> None:
    reference = reference_logits(MIXED)
    model, _ = freeze_vit(MIXED)
    assert_parity(reference, model, timm_graphs.IMAGES)
    prefix = "blocks.0.attn/"
    for name in ("q_weight", "k_weight", "v_weight", "v_frozen_weight", "proj_weight", "map_scales", "map_integers"):
        perturbed = changed(model, prefix + name, lambda a: a + (40 if a.dtype == np.uint8 else a.dtype.type(0.1)))
        report = compare(reference, run_unoptimized(perturbed, timm_graphs.IMAGES), TOLERANCES["f32-reassoc"])
        assert not report.passed, name


def changed(
    model: onnx.ModelProto, name: str, change: Callable[[NDArray[np.generic]], NDArray[np.generic]]
) -> onnx.ModelProto:
    """A copy of `model` in which the initializer's element in the middle is changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = next(item for item in copy.graph.initializer if item.name == name)
    values = numpy_helper.to_array(tensor).copy()
    middle = tuple(size // 2 for size in values.shape)
    values[middle] = change(values[middle])
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return copy


# --- what the graph holds, and what it no longer does ----------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_only_modules_with_live_heads_have_a_softmax_and_it_stands_in_one_plain_attention(plan: Plan) -> None:
    model, result = freeze_vit(plan)
    all_frozen = sum(len(heads) == H for heads in plan.values())
    delta = sum(INSTEAD_OF_LIVE if len(heads) == H else BESIDE_LIVE for heads in plan.values())
    assert result.nodes_after - result.nodes_before == delta
    writes = {name: node for node in model.graph.node for name in node.output}
    reads = Counter(name for node in model.graph.node for name in node.input)
    readers = {name: node for node in model.graph.node for name in node.input}
    softmaxes = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == DEPTH - all_frozen
    for softmax in softmaxes:
        scores, context = writes[softmax.input[0]], readers[softmax.output[0]]
        query, keys = (writes[name] for name in scores.input)
        assert [n.op_type for n in (query, keys, scores, context)] == ["Mul", "Transpose", "MatMul", "MatMul"]
        assert reads[scores.output[0]] == reads[softmax.output[0]] == reads[context.output[0]] == 1
        behind = readers[context.output[0]]
        assert behind.op_type in ("Concat", "Transpose")
        if behind.op_type == "Concat":
            assert behind.input[0] == context.output[0], "live heads come first"


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_maps_are_integers_behind_a_dequantize_bit_for_bit(plan: Plan) -> None:
    model, _ = freeze_vit(plan)
    constants = initializers(model)
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(nodes) == len(plan)
    stored = {node.name.partition("/")[0]: [constants[name] for name in node.input] for node in nodes}
    for block, maps in maps_of(plan).items():
        integers, scales, zero_points = stored[f"blocks.{block}.attn"]
        assert integers.dtype == np.uint8
        np.testing.assert_array_equal(integers, maps.integers.reshape(-1, maps.integers.shape[-1]))
        np.testing.assert_array_equal(scales, maps.scales.reshape(-1))
        assert zero_points.dtype == np.uint8 and not zero_points.any()
    float_maps = [a for a in constants.values() if a.dtype == np.float32 and a.shape[-2:] == (17, 17)]
    assert not float_maps


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_no_query_or_key_weight_of_a_frozen_head_is_left(plan: Plan) -> None:
    model, _ = freeze_vit(plan)
    for block in range(DEPTH):
        qkv = timm_model("vit").blocks[block].attn.qkv.weight.detach().numpy().reshape(3, H, HEAD_DIM, D)
        bias = timm_model("vit").blocks[block].attn.qkv.bias.detach().numpy().reshape(3, H, HEAD_DIM)
        for head in range(H):
            frozen = head in plan.get(block, ())
            for rows, biases in zip(qkv[:2, head], bias[:2, head], strict=True):
                assert vectors_held(model, rows) == (0 if frozen else HEAD_DIM)
                assert values_held(model, biases) == (0 if frozen else HEAD_DIM)
            assert vectors_held(model, qkv[2, head]) == HEAD_DIM, "values stay"


def vectors_held(model: onnx.ModelProto, vectors: Floats) -> int:
    """How many of `vectors` [k,D] are a row or a column of some weight."""
    matrices = [a for a in initializers(model).values() if a.dtype == np.float32 and a.ndim == 2]
    rows = [m for m in (*matrices, *(m.T for m in matrices)) if m.shape[1] == vectors.shape[1]]
    held = [(m[:, None] == vectors).all(axis=2).any(axis=0) for m in rows]
    return int(np.any(held, axis=0).sum())


def values_held(model: onnx.ModelProto, values: Floats) -> int:
    """How many of `values` are in some bias."""
    biases = np.concatenate([a for a in initializers(model).values() if a.dtype == np.float32 and a.ndim == 1])
    return int(np.isin(values, biases).sum())


def test_weights_have_the_size_of_the_heads_they_serve() -> None:
    shapes = {name: array.shape for name, array in initializers(freeze_vit({0: (0, 2)})[0]).items()}
    live, frozen = HEAD_DIM, 2 * HEAD_DIM
    assert [shapes[f"blocks.0.attn/{name}_weight"] for name in ("q", "k", "v", "v_frozen", "proj")] == [
        (D, live),
        (D, live),
        (D, live),
        (D, frozen),
        (H * HEAD_DIM, D),
    ]


def test_second_run_finds_nothing_and_changes_nothing() -> None:
    modules = modules_of("vit", maps_of(MIXED))
    model, _ = freeze_vit(MIXED)
    graph = to_graph(model)
    before = to_model(graph).SerializeToString(deterministic=True)
    (result,) = run_passes(graph, [PlannedPass(FreezeHeads(modules), 0)])
    assert result.rewritten == 0 and len(result.skipped) == 2 * DEPTH  # its softmax, and the module it was
    assert to_model(graph).SerializeToString(deterministic=True) == before


# --- near misses -----------------------------------------------------------------------------------------------------


def frozen_module(maps: IntegerMaps | None = None) -> AttentionModule:
    """The first module of the ViT."""
    return modules_of("vit", {0: maps or random_maps((1,), tokens_of("vit"))})[0]


def refused(module: AttentionModule) -> str:
    """Why the ViT's first module can't be frozen like this; nothing of the graph is changed."""
    graph = VIT.graph()
    before = to_model(graph).SerializeToString(deterministic=True)
    with pytest.raises(UnsupportedGraph, match="pass freeze_heads failed") as caught:
        run_passes(graph, [PlannedPass(FreezeHeads([module, *modules_of("vit")[1:]]), 1)])
    assert to_model(graph).SerializeToString(deterministic=True) == before
    return str(caught.value)


def swap_heads(rows: Floats) -> Floats:
    return rows.reshape(H, HEAD_DIM, D)[[1, 0, 2]].reshape(H * HEAD_DIM, D)


@pytest.mark.parametrize(
    "change",
    [lambda w: w + np.float32(1e-6), swap_heads, lambda w: w[:-1], lambda w: np.full_like(w, np.nan), lambda w: w.T],
    ids=["other values", "heads swapped", "a row short", "nan", "transposed"],
)
def test_module_with_other_value_weights_is_not_found(change: Callable[[Floats], Floats]) -> None:
    module = frozen_module()
    message = refused(replace(module, value_weight=change(module.value_weight)))
    assert "expected 1 places; got 0" in message
    assert "no attention of the graph has the value weights of blocks.0.attn" in message


@pytest.mark.parametrize(
    "heads", [(3,), (-1,), (0, 3), (), (1, 1), (2, 0)], ids=["3", "-1", "0 3", "none", "twice", "descending"]
)
def test_heads_that_the_module_does_not_have_are_refused(heads: tuple[int, ...]) -> None:
    maps = replace(random_maps((0,) * len(heads), tokens_of("vit")), heads=heads)
    message = refused(frozen_module(replace(maps)))
    assert (
        f"frozen heads of blocks.0.attn do not fit the graph; expected some of 0…2, ascending; got {list(heads)}"
        in message
    )


@pytest.mark.parametrize("tokens", [16, 18])
def test_maps_of_another_number_of_tokens_are_refused(tokens: int) -> None:
    message = refused(frozen_module(random_maps((1,), tokens)))
    assert "do not fit the graph; expected 1 windows, integers [1, 1, 17, 17] and scales [1, 1, 17]" in message
    assert f"got 1 windows, integers [1, 1, {tokens}" in message


def test_maps_and_scales_of_other_counts_than_the_heads_are_refused() -> None:
    maps = random_maps((0, 1), tokens_of("vit"))
    assert "integers [2, 1, 17, 17] and" in refused(frozen_module(replace(maps, heads=(0,))))
    assert "integers [2, 1, 17, 17] and scales [1, 1, 17]" in refused(
        frozen_module(replace(maps, scales=maps.scales[:1]))
    )


def test_module_that_the_graph_computes_otherwise_is_refused_with_the_reason() -> None:
    weights = make_weights()
    g = GraphBuilder()
    scores = g.op("Relu", g.op("MatMul", g.queries(), g.keys()))
    merged = g.merge_heads(g.op("MatMul", g.op("Softmax", scores, axis=-1), g.values()))
    graph = to_graph(g.classify(g.project(merged)))
    module = AttentionModule("other", weights.value_rows, random_maps((1,), N))
    with pytest.raises(
        UnsupportedGraph, match=r"come from Relu.*no attention of the graph has the value weights of other"
    ):
        run_passes(graph, [PlannedPass(FreezeHeads([module]), 1)])


# --- every frozen head is accounted for ------------------------------------------------------------------------------


def test_frozen_model_accounts_for_every_head() -> None:
    for plan in PLANS:
        check_accounted(freeze_vit(plan)[0], modules_of("vit", maps_of(plan)))
    check_accounted(VIT.model(), modules_of("vit"))


MISSING = r"frozen heads of blocks\.1\.attn are not in the exported graph; expected the integer maps of heads \[1\]"


def test_head_that_was_never_frozen_is_named() -> None:
    with pytest.raises(UnsupportedGraph, match=rf"{MISSING}; got 0 other"):
        check_accounted(VIT.model(), modules_of("vit", maps_of({1: (1,)})))
    with pytest.raises(UnsupportedGraph, match=rf"{MISSING}; got 1 other"):
        check_accounted(freeze_vit({0: (0, 2)})[0], modules_of("vit", maps_of(MIXED)))


def test_changed_integer_is_noticed() -> None:
    model, _ = freeze_vit(MIXED)
    with pytest.raises(UnsupportedGraph, match=MISSING):
        wrong = changed(model, "blocks.1.attn/map_integers", lambda integers: np.bitwise_xor(integers, 1))
        check_accounted(wrong, modules_of("vit", maps_of(MIXED)))


def test_integers_that_nothing_dequantizes_do_not_count() -> None:
    model, _ = freeze_vit(MIXED)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.name.startswith("blocks.1"):
            node.op_type = "Cast"
    with pytest.raises(UnsupportedGraph, match=MISSING):
        check_accounted(model, modules_of("vit", maps_of(MIXED)))


def test_integers_of_another_type_do_not_count() -> None:
    model, _ = freeze_vit(MIXED)
    maps = maps_of(MIXED)
    maps[1] = replace(maps[1], integers=maps[1].integers.astype(np.uint16))
    with pytest.raises(UnsupportedGraph, match=MISSING):
        check_accounted(model, modules_of("vit", maps))
