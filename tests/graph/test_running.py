from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from attention_graphs import GRID, B, D, GraphBuilder, N, WindowBlock, ints

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.running import blank_inputs, fill_in_shapes, images_of, measured_shapes

DYNAMIC = "batch"


def imported(g: GraphBuilder, *outputs: str) -> gs.Graph:
    """As drawn: no shape is known but the image's."""
    return gs.import_onnx(g.model(dict.fromkeys(outputs)))


@pytest.mark.parametrize(("batch", "images"), [(3, 3), (1, 1), (DYNAMIC, None)])
def test_batch_is_a_number_where_it_is_fixed(batch: int | str, images: int | None) -> None:
    g = GraphBuilder(batch)
    graph = imported(g, g.x)
    assert images_of(graph) == images
    (fed,) = blank_inputs(graph, 5).values()
    assert fed.shape == (images or 5, 3, 2, 3) and not fed.any()


def test_shapes_are_those_the_tensors_have_when_run() -> None:
    g = GraphBuilder(DYNAMIC)
    flat, scalar = g.op("Reshape", g.x, ints(-1, D)), g.op("ReduceMean", g.x, keepdims=0)
    graph = imported(g, flat, scalar)
    before = gs.export_onnx(graph).SerializeToString()
    assert measured_shapes(graph, [flat, scalar]) == {flat: (2 * N, D), scalar: ()}
    assert measured_shapes(graph, [flat], 7) == {flat: (7 * N, D)}
    assert gs.export_onnx(graph).SerializeToString() == before


@pytest.mark.parametrize("batch", [B, DYNAMIC])
def test_every_float_gets_a_shape_of_numbers_but_where_the_batch_decides(batch: int | str) -> None:
    windows = gs.import_onnx(WindowBlock().model(batch))
    fill_in_shapes(windows)
    for tensor in (t for node in windows.nodes for t in node.outputs if t.dtype == np.float32 or t.name == "logits"):
        dynamic = [axis for axis, size in enumerate(tensor.shape) if not isinstance(size, int)]
        assert dynamic == ([0] if batch == DYNAMIC and tensor.shape else []), tensor


def test_batch_may_decide_another_axis_than_the_first() -> None:
    g = GraphBuilder(DYNAMIC, grid=GRID)
    second = g.op("Transpose", g.x, perm=[1, 0, 2])
    graph = imported(g, second)
    graph.tensors()[second].dtype = np.float32
    fill_in_shapes(graph)
    first, batch, last = graph.tensors()[second].shape
    assert (first, last) == (24, D) and isinstance(batch, str)


def test_graph_that_cannot_be_run_is_refused() -> None:
    g = GraphBuilder(DYNAMIC)
    broken = g.op("Reshape", g.x, ints(7, -1))
    with pytest.raises(UnsupportedGraph, match="cannot run a part of the graph on ONNX Runtime"):
        measured_shapes(imported(g, broken), [broken])
