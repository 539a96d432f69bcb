"""Edits of single nodes, and questions to them, that more than one place has."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_graphsurgeon as gs


def redirect(old: gs.Tensor, new: gs.Tensor, readers: Iterable[gs.Node] | None = None) -> None:
    """`readers` read `new` where they read `old`; all readers of `old` if None."""
    for reader in list(old.outputs if readers is None else readers):
        reader.inputs = [new if tensor is old else tensor for tensor in reader.inputs]


def bypass(node: gs.Node) -> None:
    """The readers of `node` read its first input instead."""
    redirect(node.outputs[0], node.inputs[0])


def reduced_axes(node: gs.Node) -> list[int] | None:
    """The axes that a Reduce node names, as attribute or as constant input; None for all or computed ones."""
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) == 2 and isinstance(node.inputs[1], gs.Constant):
        axes = node.inputs[1].values.tolist()
    return None if axes is None else [int(axis) for axis in axes]
