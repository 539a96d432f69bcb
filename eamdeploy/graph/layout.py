"""What a chain of layout operators does to its elements, found by running it instead of by recognising it.

Between a linear layer and an attention product, exporters write the same permutation in many spellings (5-D reshape
and `Split`, or `Slice` and `Squeeze`, or three `Gather`s, with or without shape arithmetic for a dynamic batch).
`probe` feeds element numbers through the real nodes and reads where each one comes out, so that every spelling of the
same permutation looks alike and any other permutation is caught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.graph.running import blank_inputs, cut_session, measured_shapes, run

LAYOUT_OPS = frozenset(
    {"Reshape", "Transpose", "Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
)
PADDING = -1


@dataclass(frozen=True, eq=False)
class Origin:
    """Where each element of a probed tensor comes from in its source `[…, C]`.

    Attributes:
        row: int32, shape of the probed tensor: number of the source's row (its index without the last axis, flat), or
            `PADDING` where the element does not depend on the source.
        column: int32, the same shape: its index c.
        offset: float32, the same shape: the constant added on the way.
        source_shape: the shape of its source.
    """

    row: NDArray[np.int32]
    column: NDArray[np.int32]
    offset: NDArray[np.float32]
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
    other source through its data. Only layout operators, constant factors and constant addends may lie between a source
    and its target.

    Args:
        probes: pairs of tensors of `graph`, both `[B, …]`; the last axis of a source is C.

    Raises:
        UnsupportedGraph: the graph between can't be run on numbers.
    """
    shapes = measured_shapes(graph, list(dict.fromkeys(p.source.name for p in probes)))
    session = cut_session(graph, shapes, [p.target.name for p in probes])
    images = blank_inputs(graph)
    zeros, rows, columns = ({name: _numbers(shape, i) for name, shape in shapes.items()} for i in range(3))
    offsets = run(session, images | zeros)
    with np.errstate(invalid="ignore"):  # an offset of -inf leaves no number
        answers = [
            [
                np.rint((found - offset) / p.factor).astype(np.int32) - 1  # 0 is kept for what depends on no element
                for p, found, offset in zip(probes, run(session, images | fed), offsets, strict=True)
            ]
            for fed in (rows, columns)
        ]
    return [
        Origin(row, column, offset, shapes[p.source.name])
        for p, row, column, offset in zip(probes, *answers, offsets, strict=True)
    ]


def _numbers(shape: tuple[int, ...], kind: int) -> NDArray[np.float32]:
    """float32 of `shape`: 0 everywhere (0), the number of each row (1), or of each column (2), counted from 1."""
    if kind == 0:
        return np.zeros(shape, np.float32)
    row, column = np.divmod(np.arange(np.prod(shape)).reshape(shape), shape[-1])
    return np.asarray((row if kind == 1 else column) + 1, np.float32)
