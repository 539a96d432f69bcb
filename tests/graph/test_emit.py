from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from attention_graphs import HEAD_DIM, POSITION_BIAS, B, C, H, N, Spelling, WindowBlock, Windows
from timm_graphs import random_maps

from eamdeploy.graph.attention import Attention, find_attention
from eamdeploy.graph.emit import emit_attention, is_canonical
from eamdeploy.graph.emit_parts import emit_maps
from eamdeploy.graph.frozen import IntegerMaps
from eamdeploy.graph.model import to_graph
from eamdeploy.graph.writer import GraphWriter

ALL_LIVE = Counter(MatMul=5, Add=3, Reshape=4, Transpose=4, Mul=1, Softmax=1)
FROZEN_BESIDE = Counter(MatMul=2, Add=1, Reshape=2, Transpose=1, DequantizeLinear=1, Concat=1)
ALL_FROZEN = Counter(MatMul=2, Add=1, Reshape=3, Transpose=2, DequantizeLinear=1)


def maps(*heads: int, dtype: type[np.unsignedinteger] = np.uint8) -> IntegerMaps:
    rng = np.random.default_rng(3)
    integers = rng.integers(1, np.iinfo(dtype).max, (len(heads), 1, N, N), dtype, endpoint=True)
    return IntegerMaps(heads, integers, rng.uniform(0.1, 1, (len(heads), 1, N)).astype(np.float32))


def located(spelling: Spelling) -> tuple[gs.Graph, Attention]:
    graph = to_graph(spelling.model())
    (attention,) = find_attention(graph)
    assert isinstance(attention, Attention)
    return graph, attention


def emit(spelling: Spelling, frozen: IntegerMaps | None) -> tuple[list[gs.Node], gs.Tensor]:
    """The new nodes, and what they write."""
    graph, attention = located(spelling)
    before = len(graph.nodes)
    result = emit_attention(GraphWriter(graph, "new"), attention, frozen)
    return graph.nodes[before:], result


def ops(nodes: list[gs.Node]) -> Counter[str]:
    return Counter(node.op for node in nodes)


@pytest.mark.parametrize(
    ("frozen", "expected"),
    [(None, ALL_LIVE), (maps(1), ALL_LIVE + FROZEN_BESIDE), (maps(0, 1, 2), ALL_FROZEN)],
    ids=["live", "mixed", "frozen"],
)
def test_nothing_but_the_canonical_nodes_is_written(frozen: IntegerMaps | None, expected: Counter[str]) -> None:
    assert ops(emit(Spelling(), frozen)[0]) == expected


def test_linear_layers_without_any_bias_stay_without() -> None:
    assert ops(emit(Spelling(biased=(False,) * 3), None)[0]) == ALL_LIVE - Counter(Add=3)


@pytest.mark.parametrize("batch", [B, "batch"])
@pytest.mark.parametrize("frozen", [None, maps(0, 2)], ids=["live", "mixed"])
def test_shapes_are_written_down_and_have_four_dimensions_at_most(batch: int | str, frozen: IntegerMaps | None) -> None:
    nodes, merged = emit(Spelling(batch=batch), frozen)
    shapes = {tensor.name: tensor.shape for node in nodes for tensor in node.outputs}
    assert all(len(shape) <= 4 for shape in shapes.values())
    assert all(name.startswith("new/") for name in [*shapes, *(node.name for node in nodes)])
    live = H if frozen is None else 1
    assert merged.shape == [batch, N, C]
    assert shapes["new/scores"] == shapes["new/softmax"] == [batch, live, N, N]
    assert shapes["new/k_transposed"] == [batch, live, HEAD_DIM, N]


def test_live_heads_come_first() -> None:
    nodes, _ = emit(Spelling(), maps(0))
    (concat,) = [node for node in nodes if node.op == "Concat"]
    assert concat.attrs == {"axis": 1}
    assert [tensor.shape[1] for tensor in concat.inputs] == [2, 1]
    assert concat.inputs[0].inputs[0].inputs[0].inputs[0].op == "Softmax"


def test_the_original_stays_as_it_is() -> None:
    graph, attention = located(Spelling())
    before = [(node, list(node.inputs), list(node.outputs)) for node in graph.nodes]
    emit_attention(GraphWriter(graph, "new"), attention, maps(1))
    for node, (original, inputs, outputs) in zip(graph.nodes, before, strict=False):
        assert node is original
        assert all(a is b for a, b in zip([*node.inputs, *node.outputs], [*inputs, *outputs], strict=True))


@pytest.mark.parametrize("norm", ["layer", "layer-spelled"])
def test_norms_are_copied_node_by_node_and_share_their_constants(norm: str) -> None:
    graph, attention = located(Spelling(norm=norm))  # type: ignore[arg-type]
    before = len(graph.nodes)
    emit_attention(GraphWriter(graph, "new"), attention, maps(1))
    for prefix, original in (("new/q_norm", attention.query_norm), ("new/k_norm", attention.key_norm)):
        assert original is not None
        copied = [node for node in graph.nodes[before:] if node.name.startswith(prefix)]
        assert [(node.op, node.attrs) for node in copied] == [(node.op, node.attrs) for node in original.nodes]
        for new, old in zip(copied, original.nodes, strict=True):
            for new_input, old_input in zip(new.inputs, old.inputs, strict=True):
                assert (new_input is old_input) == isinstance(old_input, gs.Constant)
        assert copied[-1].outputs[0].shape == [B, 2, N, HEAD_DIM]


@pytest.mark.parametrize(("dtype", "opset"), [(np.uint8, 17), (np.uint16, 21)])
def test_maps_are_stored_bit_for_bit_and_come_back_as_integers_times_scales(
    dtype: type[np.unsignedinteger], opset: int
) -> None:
    frozen = maps(0, 2, dtype=dtype)
    graph = gs.Graph(opset=opset, ir_version=10)
    writer = GraphWriter(graph, "new")
    values = emit_maps(writer, "map", frozen.integers, frozen.scales)
    stored = graph.tensors()["new/map_integers"].values
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, frozen.integers.reshape(-1, N))
    graph.outputs = [values]
    session = onnxruntime.InferenceSession(
        gs.export_onnx(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(
        session.run(None, {})[0].swapaxes(0, 1), frozen.integers.astype(np.float32) * frozen.scales[..., None]
    )


@pytest.mark.parametrize("norm", [None, "layer", "rms-spelled"])
@pytest.mark.parametrize("batch", [B, "batch"])
def test_what_is_written_is_canonical_and_the_exporters_spelling_is_not(norm: str | None, batch: int | str) -> None:
    graph, attention = located(Spelling(norm=norm, batch=batch))  # type: ignore[arg-type]
    assert not is_canonical(attention)
    attention.projection.inputs[0] = emit_attention(GraphWriter(graph, "new"), attention, None)
    (again,) = find_attention(graph.cleanup().toposort())
    assert isinstance(again, Attention) and is_canonical(again)
    np.testing.assert_array_equal(again.query.weight, attention.query.weight)
    assert again.scale == pytest.approx(attention.scale, rel=1e-6)


# --- parts of maps, and windows --------------------------------------------------------------------------------------

PARTIAL_ROWS = Counter(
    # q of live rows, k, v, scores, and the products of live and of frozen rows with v
    {"MatMul": 6, "Add": 3, "Mul": 1, "Softmax": 1, "DequantizeLinear": 1, "Concat": 1, "Gather": 2, "Transpose": 3}
) + Counter(Reshape=6)
PARTIAL_ENTRIES = Counter(MatMul=5, Add=4, Reshape=5, Transpose=4, Mul=2, Softmax=1, Cast=1, DequantizeLinear=1)


def partial_maps(kind: str, windows: tuple[int, ...] = (0,)) -> IntegerMaps:
    """Every head with a row or entry frozen, the first with two."""
    mask = np.zeros((H, N) if kind == "rows" else (H, N, N), np.bool_)
    mask[:, 2] = mask[0, 4] = True
    return random_maps((0, 1, 2), N, 1, windows, mask)


@pytest.mark.parametrize(("kind", "expected"), [("rows", PARTIAL_ROWS), ("entries", PARTIAL_ENTRIES)])
def test_partly_frozen_heads_are_written_together(kind: str, expected: Counter[str]) -> None:
    nodes, merged = emit(Spelling(batch="batch"), partial_maps(kind))
    assert ops(nodes) == expected
    assert merged.shape == ["batch", N, C]
    assert all(len(tensor.shape) <= 4 for node in nodes for tensor in node.outputs)


def test_only_as_many_rows_are_scored_as_the_head_with_most_live_ones_has() -> None:
    nodes, _ = emit(Spelling(), partial_maps("rows"))
    shapes = {tensor.name: tensor.shape for node in nodes for tensor in node.outputs}
    assert shapes["new/softmax_partial"] == [B, H, N - 1, N]
    assert shapes["new/context_frozen_rows"] == [B, H, 2, HEAD_DIM]


@pytest.mark.parametrize("batch", [1, 2, "batch"])
@pytest.mark.parametrize("windows", [(0, 0, 0, 0), (0, 1, 1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["rows", "entries", "heads"])
def test_windows_are_split_off_the_batch_only_where_they_use_different_maps(
    kind: str, windows: tuple[int, ...], batch: int | str
) -> None:
    graph = to_graph(WindowBlock(Windows(), POSITION_BIAS).model(batch))
    (attention,) = find_attention(graph)
    assert isinstance(attention, Attention) and attention.windows == 4
    before = len(graph.nodes)
    frozen = random_maps((0, 1, 2), N, 1, windows) if kind == "heads" else partial_maps(kind, windows)
    emit_attention(GraphWriter(graph, "new"), attention, frozen)
    nodes = graph.nodes[before:]
    most = 5 if len(set(windows)) > 1 and batch != 1 else 4
    assert max(len(tensor.shape) for node in nodes for tensor in node.outputs) == most
    chosen = [node for node in nodes if node.name.endswith("_by_window")]
    assert len(chosen) == (windows == (0, 1, 1, 2)), "neither one map for all nor one for each needs choosing"
    integers = next(t for node in nodes if node.op == "DequantizeLinear" for t in node.inputs[:1])
    rows = {"rows": 2, "entries": N, "heads": N}[kind]
    assert integers.values.shape == ((max(windows) + 1) * H * rows, N)
