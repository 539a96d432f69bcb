from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from attention_graphs import GRID_IMAGES, B, Floats, GraphBuilder, WindowBlock, Windows, ints
from rewriting import assert_bit_exact, changed, initializers, left_alone, ops, rewrite, rewritten, serialized
from timm_graphs import Export, images_of

from eamdeploy.graph.model import to_graph, to_model
from eamdeploy.passes.gather_tokens import GatherTokens
from eamdeploy.passes.static_shapes import StaticShapes

DYNAMIC = "batch"
MOVED = frozenset({"Slice", "Concat", "Pad"})
BLOCKS = {
    "partition": (Windows(), 8, 4),
    "shifted": (Windows(shift=(1, 2)), 8 + 12, 4),
    "padded": (Windows((3, 5)), 8 + 2, 4 + 1),
    "shifted and padded": (Windows((3, 5), (1, 1)), 8 + 14, 4 + 1),
}
"""Windows, and how many nodes partition and reverse have before and after the pass."""


def images(windows: Windows) -> Floats:
    return np.ascontiguousarray(GRID_IMAGES[:, :, : windows.grid[0], : windows.grid[1]])


@pytest.mark.parametrize("batch", [B, 1, DYNAMIC])
@pytest.mark.parametrize("kind", BLOCKS)
def test_partition_and_reverse_become_one_gather_each_bit_for_bit(kind: str, batch: int | str) -> None:
    windows, nodes, left = BLOCKS[kind]
    stock = WindowBlock(windows).model(batch)
    before = ops(stock)
    model, result = rewritten(stock, GatherTokens(), 2, StaticShapes())
    assert result.name == "gather_tokens"
    gathers = [a for name, a in initializers(model).items() if name.endswith("/moved_indices")]
    assert len(gathers) == 2
    partition = np.where(windows.tokens() < 0, np.prod(windows.grid), windows.tokens())
    assert any(np.array_equal(indices, partition) for indices in gathers)
    assert result.nodes_before - result.nodes_after == nodes - left
    assert {op: n for op, n in ops(model).items() if op in MOVED} == ({"Pad": 1} if left == 5 else {})
    assert before["Transpose"] - ops(model)["Transpose"] == 2
    assert all(len(t.shape or ()) <= 4 for t in to_graph(model).tensors().values() if "/tokens/" in t.name)
    assert_bit_exact(stock, model, images(windows)[: 1 if batch == 1 else 2])


@pytest.mark.parametrize(
    "export", [Export("swin-padded", "torchscript", 2, 17), Export("swin", "dynamo", None, 18)], ids=str
)
def test_exports_compute_the_same_bit_for_bit(export: Export) -> None:
    stock = export.model()
    model, result = rewritten(stock, GatherTokens(), 9, StaticShapes())
    kinds = Counter(skip.reason for skip in result.skipped)
    assert all(reason.startswith("its chunks are no tokens of") for reason in kinds), "operands of attention"
    assert sum(kinds.values()) == 3 * 4
    assert not {"Concat", "Shape"} & set(ops(model))
    assert_bit_exact(stock, model, images_of(export.variant))


def test_identity_leaves_at_most_a_reshape() -> None:
    g = GraphBuilder(DYNAMIC, grid=(4, 6))
    image = g.op("Reshape", g.op("Relu", g.x), ints(-1, 4, 6, 10))
    there = g.op("Transpose", g.op("Transpose", image, perm=[0, 2, 1, 3]), perm=[0, 2, 1, 3])
    stock = g.classify(g.op("Add", g.x, g.op("Relu", g.op("Reshape", g.op("Relu", there), ints(-1, 24, 10)))))
    model, result = rewritten(stock, GatherTokens(), 1)
    assert result.nodes_after - result.nodes_before == 1 - 3
    assert_bit_exact(stock, model, GRID_IMAGES)


def test_chain_that_ends_as_it_began_leaves_nothing() -> None:
    g = GraphBuilder(DYNAMIC, grid=(4, 6))
    flat = g.op("Reshape", g.op("Reshape", g.op("Relu", g.x), ints(-1, 4, 6, 10)), ints(-1, 24, 10))
    stock = g.classify(g.op("Relu", flat))
    model, result = rewritten(stock, GatherTokens(), 1)
    assert result.nodes_after - result.nodes_before == -2
    assert_bit_exact(stock, model, GRID_IMAGES)


def test_chain_read_halfway_is_gathered_for_either_reader() -> None:
    g = GraphBuilder(DYNAMIC, grid=(4, 6))
    windows = Windows(shift=(1, 1))
    halfway = windows.partition(g, g.op("Relu", g.x))
    read = g.op("Relu", halfway)
    whole = g.op("Add", windows.reverse(g, read), windows.reverse(g, halfway))
    stock = g.classify(whole)
    model, _ = rewritten(stock, GatherTokens(), 3, StaticShapes())
    assert_bit_exact(stock, model, GRID_IMAGES)


def test_other_gather_is_noticed() -> None:
    stock = WindowBlock().model()
    model, _ = rewritten(stock, GatherTokens(), 2)
    for name in [name for name in initializers(model) if name.endswith("/moved_indices")]:
        with pytest.raises(AssertionError):
            assert_bit_exact(stock, changed(model, name, lambda a: np.roll(a, 1)), GRID_IMAGES)


def test_second_run_says_that_all_is_gathered() -> None:
    graph = to_graph(WindowBlock(Windows((3, 5), (1, 1))).model())
    rewrite(graph, GatherTokens(), 2)
    again = rewrite(to_graph(to_model(graph)), GatherTokens(), 0)
    reasons = [skip.reason for skip in again.skipped]
    assert reasons.count("already gathered") == 2
    assert {skip.node for skip in again.skipped} <= {node.name for node in graph.nodes}


def test_what_moves_no_tokens_is_left_alone_with_the_reason() -> None:
    g = GraphBuilder(grid=(4, 6))
    halves = g.op("Transpose", g.op("Reshape", g.op("Relu", g.x), ints(-1, 24, 2, 5)), perm=[0, 2, 1, 3])
    stock = g.classify(g.op("Relu", g.op("Reshape", halves, ints(-1, 24, 10))))
    assert left_alone(stock, GatherTokens()) == ["it moves parts of tokens, or between images"]


def test_graph_without_chains_is_left_as_it_is() -> None:
    g = GraphBuilder()
    graph = to_graph(g.classify(g.op("Relu", g.x)))
    before = serialized(graph)
    assert rewrite(graph, GatherTokens(), 0).skipped == ()
    assert serialized(graph) == before
