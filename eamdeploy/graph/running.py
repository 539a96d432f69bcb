"""Run a part of a graph on ONNX Runtime with its optimizer off, to learn what the graph itself says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from numpy.typing import NDArray

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.nodes import redirect
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
    copy = graph.copy()
    tensors = copy.tensors()
    outputs = []
    for name in names:
        output = gs.Variable(f"{name}/measured_shape", np.int64)
        copy.nodes.append(gs.Node("Shape", output.name, inputs=[tensors[name]], outputs=[output]))
        outputs.append(output)
    copy.outputs = outputs
    shapes = run(session_of(copy), blank_inputs(graph, batch))
    return {name: tuple(int(size) for size in shape) for name, shape in zip(names, shapes, strict=True)}


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
    names = [tensor.name for tensor in unknown]
    two = measured_shapes(graph, names)
    three = two if images_of(graph) else measured_shapes(graph, names, PROBE_BATCH + 1)
    for tensor in unknown:
        sizes = zip(two[tensor.name], three[tensor.name], strict=True)
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
    """A session of a copy of `graph` in which `sources`, by name and shape, are inputs and `targets` the outputs."""
    copy = graph.copy()
    tensors = copy.tensors()
    cut: dict[str, gs.Tensor] = {}
    for name, shape in sources.items():
        original = tensors[name]
        fed = gs.Variable(name, dtype=np.float32, shape=list(shape))
        redirect(original, fed)
        original.name = f"{name}/uncut"
        copy.inputs.append(fed)
        cut[name] = fed
    copy.outputs = [cut.get(name, tensors[name]) for name in targets]
    for output in copy.outputs:
        output.dtype = np.float32
    return session_of(copy)


def session_of(graph: gs.Graph) -> onnxruntime.InferenceSession:
    """A session of what the outputs of `graph` need; `graph` is changed.

    Raises:
        UnsupportedGraph: ONNX Runtime can't load it.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = gs.export_onnx(graph.cleanup(remove_unused_graph_inputs=True).toposort())
    del model.graph.value_info[:]
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
