"""The form of an exported graph that a version of TensorRT takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx

from eamdeploy.engines.trt.versions import TrtVersion, capabilities
from eamdeploy.graph.model import card_of, to_graph, to_model, with_card
from eamdeploy.passes import order
from eamdeploy.passes.base import PlannedPass, run_passes
from eamdeploy.passes.freeze_heads import AttentionModule


def plan_trt(
    version: TrtVersion,
    modules: Sequence[AttentionModule] | None = None,
) -> list[PlannedPass[Any]]:
    """The passes that make of an export for ONNX Runtime what `version` takes.

    Args:
        modules: the attention modules whose frozen maps the graph holds; None where only a file is
            known, and so no number of places.

    Raises:
        ConfigError: TensorRT before 8.5.
    """
    can = capabilities(version)
    return order.plan_trt(
        modules,
        integer_maps=can.integer_maps,
        layer_normalization=can.layer_normalization,
    )


def to_trt(model: onnx.ModelProto, version: TrtVersion) -> onnx.ModelProto:
    """`model` as `version` takes it; the passes that changed something are named in its card.

    `requantize_maps` among them means that rows of frozen maps stand for slightly other values than before. A model
    that already has this form, or that `export` did not write, is returned as it is: the linter says what is wrong
    with it, or where the operator set is too new, which stays.

    Raises:
        ConfigError: TensorRT before 8.5.
        UnsupportedGraph: the rewritten graph is not valid.
    """
    plan = plan_trt(version)
    card = card_of(model, "the model")
    if card is None:
        return model
    graph = to_graph(model)
    applied = [result.name for result in run_passes(graph, plan) if result.rewritten]
    if not applied:
        return model
    return with_card(to_model(graph), card.model_copy(update={"rewrites": [*card.rewrites, *applied]}))
