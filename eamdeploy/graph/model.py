"""Load an ONNX model for editing, and turn it back into one that `onnx.checker` accepts.

The rest of `graph` and all passes work on an onnx-graphsurgeon graph (`gs.Graph`): tensors know their producer
(`tensor.inputs`) and consumers (`tensor.outputs`), constants hold numpy arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnx_graphsurgeon.logger import G_LOGGER

from eamdeploy.artifacts.card import CARD_KEY, ModelCard
from eamdeploy.artifacts.onnx_files import ModelData
from eamdeploy.errors import EngineError, UnsupportedGraph
from eamdeploy.graph.running import fill_in_shapes
from eamdeploy.graph.texts import has_only_text
from eamdeploy.graph.weights import check_model, deserialize, has_data_elsewhere, infer_shapes

Graph: TypeAlias = gs.Graph
"""An editable graph, for rooms that only pass it on."""

_ORT_FATAL, _ORT_WARNING = 4, 2


def parse_model(data: ModelData, what: str, hint: str | None = None) -> onnx.ModelProto:
    """The model that `data` is, with all its weights.

    Args:
        what: what can't be done without it, for the message; `hint`: what to try.

    Raises:
        EngineError: it is no valid ONNX model, or keeps data in a file that `data` has not.
    """
    try:
        model = deserialize(data)
    except Exception as err:  # protobuf's own exception is in a package that we don't depend on
        raise EngineError(f"{what}: it is damaged or no ONNX model", hint=hint) from err
    if not has_only_text(model):
        raise EngineError(f"{what}: it is damaged, it has names or other texts that are no UTF-8", hint=hint)
    if has_data_elsewhere(model):
        raise EngineError(f"{what}: it keeps data in a second file", hint=hint)
    try:  # or what comes after it ends in errors of any kind
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        reason = str(err).strip().partition("\n")[0]
        raise EngineError(f"{what}: it is damaged or no valid ONNX model: {reason}", hint=hint) from err
    return model


def to_graph(model: onnx.ModelProto) -> gs.Graph:
    """An editable copy of `model` with constants folded, shapes known and nodes in topological order.

    Folding turns an exporter's `Constant`, `Identity` and shape arithmetic into initializers, so that what follows sees
    one spelling of either exporter. Quantize and dequantize nodes are never folded.

    Raises:
        UnsupportedGraph: shapes that inference can't tell can't be measured either.
    """
    with _quiet():
        graph = gs.import_onnx(infer_shapes(model))
    fold_constants(graph)
    with _quiet():
        fill_in_shapes(graph)
    return graph


def copy_of(graph: gs.Graph) -> gs.Graph:
    """A graph to be rewritten on its own; weights are shared, so none may be written into.

    onnx-graphsurgeon 0.6's own copy forgets which program made the model.
    """
    copy = graph.copy()
    copy.producer_name, copy.producer_version = graph.producer_name, graph.producer_version
    return copy


def fold_constants(graph: gs.Graph) -> None:
    """`graph` computes nothing from constants alone, but for what it dequantizes; dead nodes are gone, the others in
    topological order.
    """
    with _quiet():
        graph.fold_constants()
        graph.cleanup().toposort()


def to_model(graph: gs.Graph) -> onnx.ModelProto:
    """`graph` as a model that passes `onnx.checker` with full shape inference.

    Raises:
        UnsupportedGraph: the checker refuses it; the message is the checker's.
    """
    with _quiet():
        model = gs.export_onnx(graph)
    del model.graph.value_info[:]
    try:
        inferred = infer_shapes(model, strict=True)
        check_model(inferred)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise UnsupportedGraph(f"the rewritten graph is not valid ONNX: {err}") from err
    return inferred


def with_card(model: onnx.ModelProto, card: ModelCard) -> onnx.ModelProto:
    """A copy of `model` whose metadata holds `card` under `CARD_KEY`, in place of any earlier one."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.metadata_props[:]
    for entry in model.metadata_props:
        if entry.key != CARD_KEY:
            copy.metadata_props.add(key=entry.key, value=entry.value)
    copy.metadata_props.add(key=CARD_KEY, value=card.model_dump_json())
    copy.producer_name = "eamdeploy"
    return copy


def card_of(model: onnx.ModelProto, where: str) -> ModelCard | None:
    """The card in `model`'s metadata, or None if it carries none."""
    for entry in model.metadata_props:
        if entry.key == CARD_KEY:
            return ModelCard.parse(entry.value, where)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block, graphsurgeon does not print on stdout, nor the sessions it folds constants in on stderr."""
    onnxruntime.set_default_logger_severity(_ORT_FATAL)
    try:
        with G_LOGGER.suppress():
            yield
    finally:
        onnxruntime.set_default_logger_severity(_ORT_WARNING)  # its default; onnxruntime can't be asked
