"""What a chain of layout operators does to its elements, found by running it instead of by recognising it.

Between a linear layer and an attention product, exporters write the same permutation in many spellings (5-D reshape
and `Split`, or `Slice` and `Squeeze`, or three `Gather`s, with or without shape arithmetic for a dynamic batch).
`probe` feeds element numbers through the real nodes and reads where each one comes out, so that every spelling of the
same permutation looks alike and any other permutation is caught.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime
from numpy.typing import NDArray

from eamdeploy.errors import UnsupportedGraph

LAYOUT_OPS = frozenset(
    {"Reshape", "Transpose", "Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
)
_PROBE_BATCH = 2


@dataclass(frozen=True, eq=False)
class Origin:
    """Where each element of a probed tensor comes from in its source `[B, N, C]`.

    Attributes:
        row: int32, shape of the probed tensor: b·N + n of the source element.
        column: int32, the same shape: its index c.
        source_shape: the shape of its source: B, N and C.
    """

    row: NDArray[np.int32]
    column: NDArray[np.int32]
    source_shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Probe:
    """One question to `probe`: with `source` numbered, what does `target` hold?

    Attributes:
        factor: the product of the constant factors between the two, divided out of the answer.
    """

    source: gs.Tensor
    target: gs.Tensor
    factor: float = 1.0


def probe(graph: gs.Graph, probes: Sequence[Probe]) -> list[Origin]:
    """For each probe, where the elements of its target come from in its source.

    All sources are cut loose from their producers and fed with element numbers at once, so a target must depend on no
    other source through its data. Only layout operators and constant factors may lie between a source and its target.

    Args:
        probes: pairs of tensors of `graph`, both `[B, …]`; the last axis of a source is C.

    Raises:
        UnsupportedGraph: the graph between can't be run on numbers.
    """
    shapes = _measured_shapes(graph, list(dict.fromkeys(p.source.name for p in probes)))
    session = _cut_session(graph, shapes, [p.target.name for p in probes])
    images = _blank_inputs(graph)
    rows: dict[str, NDArray[np.float32]] = {}
    columns: dict[str, NDArray[np.float32]] = {}
    for name, shape in shapes.items():
        numbers = np.divmod(np.arange(np.prod(shape)).reshape(shape), shape[-1])
        rows[name], columns[name] = (part.astype(np.float32) for part in numbers)
    answers = [
        [np.rint(found / p.factor).astype(np.int32) for p, found in zip(probes, _run(session, fed), strict=True)]
        for fed in (images | rows, images | columns)
    ]
    return [Origin(row, column, shapes[p.source.name]) for p, row, column in zip(probes, *answers, strict=True)]


def _measured_shapes(graph: gs.Graph, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The shapes the named tensors have when the graph runs; static inference does not see through every export."""
    session = _session(_with_outputs(graph.copy(), names))
    return {name: value.shape for name, value in zip(names, _run(session, _blank_inputs(graph)), strict=True)}


def _blank_inputs(graph: gs.Graph) -> dict[str, NDArray[np.generic]]:
    """A black image per image of the batch, for every input of `graph`; a dynamic batch becomes 2."""
    return {
        tensor.name: np.zeros(
            [size if isinstance(size, int) else _PROBE_BATCH for size in tensor.shape], dtype=tensor.dtype
        )
        for tensor in graph.inputs
    }


def _cut_session(
    graph: gs.Graph, sources: Mapping[str, tuple[int, ...]], targets: Sequence[str]
) -> onnxruntime.InferenceSession:
    """A session of a copy of `graph` in which `sources` are inputs and `targets` the outputs."""
    copy = graph.copy()
    tensors = copy.tensors()
    for name, shape in sources.items():
        original = tensors[name]
        fed = gs.Variable(name, dtype=np.float32, shape=list(shape))
        for consumer in list(original.outputs):
            consumer.inputs = [fed if tensor is original else tensor for tensor in consumer.inputs]
        original.name = f"{name}/uncut"
        copy.inputs.append(fed)
    return _session(_with_outputs(copy, targets, tensors))


def _with_outputs(graph: gs.Graph, names: Sequence[str], tensors: Mapping[str, gs.Tensor] | None = None) -> gs.Graph:
    tensors = graph.tensors() if tensors is None else tensors
    graph.outputs = [tensors[name] for name in names]
    for output in graph.outputs:
        output.dtype = np.float32
    return graph.cleanup(remove_unused_graph_inputs=True).toposort()


def _session(graph: gs.Graph) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = gs.export_onnx(graph)
    del model.graph.value_info[:]
    with _refusals():
        return onnxruntime.InferenceSession(
            model.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
        )


def _run(session: onnxruntime.InferenceSession, feed: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.float32]]:
    """The outputs of `session`; what it does not read of `feed` is ignored."""
    wanted = {value.name for value in session.get_inputs()}
    with _refusals():
        result: list[NDArray[np.float32]] = session.run(None, {k: v for k, v in feed.items() if k in wanted})
    return result


@contextmanager
def _refusals() -> Iterator[None]:
    """Inside the block, what ONNX Runtime can't load or run is an `UnsupportedGraph`."""
    try:
        yield
    except Exception as err:  # onnxruntime raises many kinds
        raise UnsupportedGraph(f"cannot run the layout around attention on element numbers: {err}") from err
