"""Run a part of a graph on ONNX Runtime with its optimizer off, to learn what the graph itself says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.weights import fits_one_file, without_weights

PROBE_BATCH = 2  # images where the batch is dynamic


def images_of(graph: gs.Graph) -> int | None:
    """The fixed number of images of the graph's input, or None where it is dynamic."""
    size = graph.inputs[0].shape[0]
    return size if isinstance(size, int) else None


def measured_shapes(graph: gs.Graph, names: Sequence[str], batch: int = PROBE_BATCH) -> dict[str, tuple[int, ...]]:
    """The shapes the named tensors have when the graph runs; static inference does not see through every export.

    Args:
        batch: images where the graph's batch is dynamic.

    Raises:
        UnsupportedGraph: the graph can't be run.
    """
    (shapes,) = _measured(graph, names, [batch])
    return shapes


def _measured(graph: gs.Graph, names: Sequence[str], batches: Sequence[int]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of the named tensors for each number of images."""
    part = _part_behind(graph, names)
    for name in names:
        shape = f"{name}/measured_shape"
        part.graph.node.append(helper.make_node("Shape", [name], [shape]))
        part.graph.output.append(helper.make_tensor_value_info(shape, onnx.TensorProto.INT64, None))
    session = _session(part)
    found = [run(session, blank_inputs(graph, batch)) for batch in batches]
    return [
        {name: tuple(int(size) for size in shape) for name, shape in zip(names, shapes, strict=True)}
        for shapes in found
    ]


def fill_in_shapes(graph: gs.Graph) -> None:
    """Every float tensor of `graph` has a shape of numbers, but for at most the axes that depend on the batch.

    What static inference did not see is measured, with two different numbers of images where the batch is dynamic.

    Raises:
        UnsupportedGraph: the graph can't be run.
    """
    unknown = [
        tensor
        for node in graph.nodes
        for tensor in node.outputs
        if tensor.dtype == np.float32 and not (tensor.shape and all(isinstance(n, int) for n in tensor.shape[1:]))
    ]
    if not unknown:
        return
    batches = [PROBE_BATCH] if images_of(graph) else [PROBE_BATCH, PROBE_BATCH + 1]
    shapes = _measured(graph, [tensor.name for tensor in unknown], batches)
    for tensor in unknown:
        sizes = zip(shapes[0][tensor.name], shapes[-1][tensor.name], strict=True)
        tensor.shape = [a if a == b else f"{tensor.name}/{axis}" for axis, (a, b) in enumerate(sizes)]


def blank_inputs(graph: gs.Graph, batch: int = PROBE_BATCH) -> dict[str, NDArray[np.generic]]:
    """A black image per image of the batch, for every input of `graph`; a dynamic batch becomes `batch`."""
    return {
        tensor.name: np.zeros([size if isinstance(size, int) else batch for size in tensor.shape], dtype=tensor.dtype)
        for tensor in graph.inputs
    }


def cut_session(
    graph: gs.Graph, sources: Mapping[str, tuple[int, ...]], targets: Sequence[str]
) -> onnxruntime.InferenceSession:
    """A session of the part of `graph` in which `sources`, by name and shape, are inputs and `targets` the outputs."""
    part = _part_behind(graph, targets, frozenset(sources))
    kind = onnx.TensorProto.FLOAT
    part.graph.input.extend(helper.make_tensor_value_info(name, kind, shape) for name, shape in sources.items())
    part.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name in targets)
    return _session(part)


def _part_behind(graph: gs.Graph, targets: Sequence[str], sources: frozenset[str] = frozenset()) -> onnx.ModelProto:
    """The nodes that `targets` are computed with, down to `sources` and the graph's inputs, and no outputs yet.

    The graph is neither copied nor changed: writing out a part of it takes a fraction of the time.
    """
    tensors = graph.tensors()
    needed: set[int] = set()
    pending = [tensors[name] for name in targets]
    while pending:
        tensor = pending.pop()
        for node in () if tensor.name in sources else tensor.inputs:
            if id(node) not in needed:
                needed.add(id(node))
                pending.extend(_read_by(node))
    nodes = [node for node in graph.nodes if id(node) in needed]
    read = {id(tensor) for node in nodes for tensor in _read_by(node)} | {id(tensors[name]) for name in targets}
    inputs = [tensor for tensor in graph.inputs if id(tensor) in read and tensor.name not in sources]
    part = gs.Graph(nodes, inputs, name=graph.name, opset=graph.opset, import_domains=graph.import_domains)
    model: onnx.ModelProto = gs.export_onnx(part)
    del model.graph.value_info[:]
    return model


def _read_by(node: gs.Node) -> list[gs.Tensor]:
    """What `node` reads, by its branches or loops too."""
    inside = [tensor for part in node.subgraphs(recursive=True) for each in part.nodes for tensor in each.inputs]
    outside = [tensor for part in node.subgraphs(recursive=True) for tensor in part.outputs]
    return [*node.inputs, *inside, *outside]


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A session of `model`, with the runtime's optimizer off.

    Raises:
        UnsupportedGraph: ONNX Runtime can't load it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with _refusals():
        if not fits_one_file(model):
            slim = without_weights(model)
            arrays = {item.name: onnx.numpy_helper.to_array(item) for item in slim.weights.values()}
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
            options.add_external_initializers(list(arrays), values)
            model = slim.model
        return onnxruntime.InferenceSession(
            model.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
        )


def run(session: onnxruntime.InferenceSession, feed: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.float32]]:
    """The outputs of `session`; what it does not read of `feed` is ignored.

    Raises:
        UnsupportedGraph: ONNX Runtime can't run it.
    """
    wanted = {value.name for value in session.get_inputs()}
    with _refusals():
        result: list[NDArray[np.float32]] = session.run(None, {k: v for k, v in feed.items() if k in wanted})
    return result


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Exception as err:  # onnxruntime raises many kinds
        raise UnsupportedGraph(f"cannot run a part of the graph on ONNX Runtime: {err}") from err
