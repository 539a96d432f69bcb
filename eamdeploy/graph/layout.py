"""What a chain of layout operators does to its elements, found by running it instead of by recognising it.

Between a linear layer and an attention product, exporters write the same permutation in many spellings (5-D reshape
and `Split`, or `Slice` and `Squeeze`, or three `Gather`s, with or without shape arithmetic for a dynamic batch).
`probe` feeds element numbers through the real nodes and reads where each one comes out, so that every spelling of the
same permutation looks alike and any other permutation is caught.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Origin:
    """Where each element of a probed tensor comes from in its source `[B, N, C]`.

    Attributes:
        row: int64, shape of the probed tensor: b·N + n of the source element.
        column: int64, the same shape: its index c.
    """

    row: NDArray[np.int64]
    column: NDArray[np.int64]


@dataclass(frozen=True)
class Probe:
    """One question to `probe`: with `source` numbered, what does `target` hold?

    Attributes:
        factor: the product of the constant factors between the two, divided out of the answer.
    """

    source: gs.Tensor
    target: gs.Tensor
    factor: float = 1.0


def probe(graph: gs.Graph, sources: Mapping[str, tuple[int, ...]], probes: Sequence[Probe]) -> list[Origin]:
    """For each probe, where the elements of its target come from in its source.

    All sources are cut loose from their producers and fed with element numbers at once, so a target must depend on no
    other source through its data. Only layout operators and constant factors may lie between a source and its
    target.

    Args:
        sources: for every cut tensor, by name, its shape without the batch dimension; the last axis is C.
        probes: pairs of tensors of `graph`, both `[B, …]`.

    Raises:
        UnsupportedGraph: the graph between can't be run on numbers.
    """
    batch = graph.inputs[0].shape[0] if isinstance(graph.inputs[0].shape[0], int) else _PROBE_BATCH
    session = _cut_session(graph, sources, [p.target.name for p in probes])
    wanted = {value.name for value in session.get_inputs()}
    rows_of: dict[str, NDArray[np.float32]] = {}
    columns_of: dict[str, NDArray[np.float32]] = {}
    for name, shape in sources.items():
        full = (batch, *shape)
        rows, columns = int(np.prod(full[:-1])), full[-1]
        rows_of[name] = np.repeat(np.arange(rows, dtype=np.float32), columns).reshape(full)
        columns_of[name] = np.tile(np.arange(columns, dtype=np.float32), rows).reshape(full)
    fixed = {
        tensor.name: np.zeros((batch, *tensor.shape[1:]), dtype=tensor.dtype)
        for tensor in graph.inputs
        if tensor.name in wanted
    }
    answers = []
    for numbers in (rows_of, columns_of):
        feed = {**fixed, **{name: value for name, value in numbers.items() if name in wanted}}
        try:
            answers.append(session.run(None, feed))
        except Exception as err:  # onnxruntime raises many kinds
            raise UnsupportedGraph(f"cannot run the layout around attention on element numbers: {err}") from err
    return [
        Origin(np.rint(row / p.factor).astype(np.int64), np.rint(column / p.factor).astype(np.int64))
        for p, row, column in zip(probes, *answers, strict=True)
    ]


def _cut_session(
    graph: gs.Graph, sources: Mapping[str, tuple[int, ...]], targets: Sequence[str]
) -> onnxruntime.InferenceSession:
    """A session of a copy of `graph` in which `sources` are inputs and `targets` the outputs."""
    copy = graph.copy()
    tensors = copy.tensors()
    for name in sources:
        original = tensors[name]
        fed = gs.Variable(f"{name}/probe", dtype=np.float32)
        for consumer in list(original.outputs):
            consumer.inputs = [fed if tensor is original else tensor for tensor in consumer.inputs]
        original.name, fed.name = f"{name}/uncut", name
        fed.shape = ["probe_batch", *sources[name]]
        copy.inputs.append(fed)
    copy.outputs = [tensors[name] for name in targets]
    for output in copy.outputs:
        output.dtype = np.float32
    copy.cleanup(remove_unused_graph_inputs=True).toposort()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = gs.export_onnx(copy)
    del model.graph.value_info[:]
    return onnxruntime.InferenceSession(
        model.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
    )
