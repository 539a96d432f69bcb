from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from attention_graphs import HEIGHT, WIDTH, B, D, GraphBuilder, N, floats, ints, scalar
from numpy.typing import NDArray

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.layout import LAYOUT_OPS, PADDING, Origin, Probe, probe

DYNAMIC = "batch"


@dataclass(frozen=True)
class Chain:
    """A layout of x [B,N,D], in ONNX and in numpy."""

    draw: Callable[[GraphBuilder], str]
    move: Callable[[NDArray[Any]], NDArray[Any]]


def five_axes(g: GraphBuilder) -> str:
    """[5,B,1,N,2]"""
    return g.op("Transpose", g.op("Reshape", g.x, g.sizes(N, 5, 1, 2)), perm=[2, 0, 3, 1, 4])


CHAINS = {
    "identity": Chain(lambda g: g.op("Identity", g.x), lambda a: a),
    "reshape": Chain(lambda g: g.op("Reshape", g.x, ints(0, 0, 2, -1)), lambda a: a.reshape(B, N, 2, 5)),
    "transpose": Chain(lambda g: g.op("Transpose", g.x, perm=[2, 0, 1]), lambda a: a.transpose(2, 0, 1)),
    "transpose-reversing": Chain(lambda g: g.op("Transpose", g.x), lambda a: a.transpose()),
    "flatten": Chain(lambda g: g.op("Flatten", g.x, axis=2), lambda a: a.reshape(B * N, D)),
    "unsqueeze": Chain(lambda g: g.op("Unsqueeze", g.x, ints(1, 4)), lambda a: a.reshape(B, 1, N, D, 1)),
    "squeeze": Chain(lambda g: g.op("Squeeze", five_axes(g), ints(2)), lambda a: five(a).squeeze(2)),
    "split": Chain(lambda g: g.ops("Split", 2, g.x, ints(3, 7), axis=2)[1], lambda a: a[..., 3:]),
    "slice": Chain(lambda g: g.op("Slice", g.x, ints(9), ints(0), ints(2), ints(-3)), lambda a: a[..., 9:0:-3]),
    "gather": Chain(lambda g: g.op("Gather", g.x, ints(4, 0, 4), axis=1), lambda a: a[:, [4, 0, 4]]),
    "gather-one": Chain(lambda g: g.op("Gather", five_axes(g), np.array(3), axis=0), lambda a: five(a)[3]),
    "shape-arithmetic": Chain(
        lambda g: g.op("Reshape", g.op("Transpose", g.x, perm=[0, 2, 1]), g.sizes(D * N)),
        lambda a: a.transpose(0, 2, 1).reshape(B, -1),
    ),
}


def five(a: NDArray[Any]) -> NDArray[Any]:
    return a.reshape(B, N, 5, 1, 2).transpose(2, 0, 3, 1, 4)


def origins(g: GraphBuilder, *targets: str, factor: float = 1.0) -> list[Origin]:
    """Where the targets' elements come from in x."""
    graph = gs.import_onnx(g.model(dict.fromkeys(targets)))
    tensors = graph.tensors()
    return probe(graph, [Probe(tensors[g.x], tensors[target], factor) for target in targets])


def assert_moved(origin: Origin, move: Callable[[NDArray[Any]], NDArray[Any]], batch: int = B) -> None:
    rows, columns = np.divmod(np.arange(batch * N * D).reshape(batch, N, D), D)
    np.testing.assert_array_equal(origin.row, move(rows))
    np.testing.assert_array_equal(origin.column, move(columns))
    assert origin.source_shape == (batch, N, D)


def test_the_chains_cover_every_layout_operator() -> None:
    drawn = set()
    for chain in CHAINS.values():
        g = GraphBuilder(DYNAMIC)
        before = len(g.nodes)
        chain.draw(g)
        drawn |= {node.op_type for node in g.nodes[before:]}
    assert drawn >= LAYOUT_OPS


@pytest.mark.parametrize("batch", [B, DYNAMIC])
@pytest.mark.parametrize("name", CHAINS)
def test_every_element_is_traced_to_its_source(name: str, batch: int | str) -> None:
    g = GraphBuilder(batch)
    (origin,) = origins(g, CHAINS[name].draw(g))
    assert_moved(origin, CHAINS[name].move)


def test_one_permutation_is_told_from_another() -> None:
    g = GraphBuilder()
    by_token = g.op("Reshape", g.x, ints(B, N, 2, 5))
    right, wrong = origins(g, g.op("Transpose", by_token, perm=[0, 2, 1, 3]), g.op("Reshape", g.x, ints(B, 2, N, 5)))
    assert right.row.shape == wrong.row.shape
    assert_moved(right, lambda a: a.reshape(B, N, 2, 5).transpose(0, 2, 1, 3))
    assert_moved(wrong, lambda a: a.reshape(B, 2, N, 5))
    assert not np.array_equal(right.row, wrong.row) and not np.array_equal(right.column, wrong.column)


@pytest.mark.parametrize("batch", [1, 7])
def test_fixed_batch_is_probed_at_its_size(batch: int) -> None:
    g = GraphBuilder(batch)
    (origin,) = origins(g, g.op("Transpose", g.x, perm=[1, 0, 2]))
    assert_moved(origin, lambda a: a.transpose(1, 0, 2), batch)


@pytest.mark.parametrize("factor", [0.125, 7**-0.5, -3.0, 1e-3])
def test_constant_factor_is_divided_out(factor: float) -> None:
    g = GraphBuilder(40)
    scaled = g.op("Mul", g.op("Transpose", g.x, perm=[0, 2, 1]), scalar(factor))
    (origin,) = origins(g, scaled, factor=factor)
    assert_moved(origin, lambda a: a.transpose(0, 2, 1), 40)


def test_constant_addend_is_the_offset_and_padding_has_no_source() -> None:
    g = GraphBuilder()
    addend = np.arange(D, dtype=np.float32) - 4.5
    padded = g.op("Pad", g.op("Add", g.op("Mul", g.x, scalar(0.25)), addend), ints(0, 1, 0, 0, 0, 0), scalar(7))
    (origin,) = origins(g, padded, factor=0.25)
    np.testing.assert_array_equal(origin.row[:, 0], PADDING)
    np.testing.assert_array_equal(origin.offset, np.broadcast_to(np.vstack([np.full(D, 7), *[addend] * N]), (B, 7, D)))
    inner = Origin(origin.row[:, 1:], origin.column[:, 1:], origin.offset[:, 1:], origin.source_shape)
    assert_moved(inner, lambda a: a)


def test_source_that_is_its_own_target_stays_where_it_is() -> None:
    g = GraphBuilder()
    (origin,) = origins(g, g.x)
    assert_moved(origin, lambda a: a)


def test_sources_are_cut_from_what_writes_them() -> None:
    g = GraphBuilder()
    first = g.op("Transpose", g.x, perm=[0, 2, 1])
    second = g.op("Mul", g.op("Relu", first), floats(-5.0))  # no layout: its values never reach the second target
    target = g.op("Reshape", second, ints(B, D * N))
    graph = gs.import_onnx(g.model({target: None}))
    tensors = graph.tensors()
    one, two = probe(graph, [Probe(tensors[g.x], tensors[first]), Probe(tensors[second], tensors[target])])
    assert_moved(one, lambda a: a.transpose(0, 2, 1))
    np.testing.assert_array_equal(two.row, np.repeat(np.arange(B * D), N).reshape(B, D * N))
    assert two.source_shape == (B, D, N)


def test_probing_leaves_the_graph_as_it_was() -> None:
    g = GraphBuilder(DYNAMIC)
    target = CHAINS["shape-arithmetic"].draw(g)
    graph = gs.import_onnx(g.model({target: None}))
    before = gs.export_onnx(graph).SerializeToString()
    probe(graph, [Probe(graph.tensors()[g.x], graph.tensors()[target])])
    assert gs.export_onnx(graph).SerializeToString() == before


def test_layout_that_fails_on_numbers_is_refused() -> None:
    g = GraphBuilder(DYNAMIC)
    target = g.op("Reshape", g.x, ints(7, -1))  # 2·6·10 elements can't be 7 rows
    with pytest.raises(UnsupportedGraph, match="cannot run a part of the graph on ONNX Runtime"):
        origins(g, target)


def test_operator_that_onnxruntime_lacks_is_refused() -> None:
    image = gs.Variable("image", np.float32, [1, 3, HEIGHT, WIDTH])
    x, moved = gs.Variable("x", np.float32, [1, 6, 3]), gs.Variable("moved", np.float32, [1, 3, 6])
    nodes = [
        gs.Node("NoSuchOperator", inputs=[image], outputs=[x]),
        gs.Node("Transpose", attrs={"perm": [0, 2, 1]}, inputs=[x], outputs=[moved]),
    ]
    graph = gs.Graph(nodes, inputs=[image], outputs=[moved], opset=17, ir_version=8)
    with pytest.raises(UnsupportedGraph, match="NoSuchOperator"):
        probe(graph, [Probe(x, moved)])
