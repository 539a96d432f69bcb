"""The ONNX model that ONNX Runtime gets, in one of the forms of `ort_form`.

A board that converts needs the packages onnx and onnx-graphsurgeon; one that builds the exported form needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_graphsurgeon as gs

from eamdeploy.artifacts.card import ModelCard
from eamdeploy.artifacts.onnx_files import ModelData
from eamdeploy.convert.ort_form import OrtForm
from eamdeploy.convert.ort_int8 import dynamic_int8
from eamdeploy.convert.ranges import Calibration, measure_ranges
from eamdeploy.errors import ConfigError, UnsupportedGraph
from eamdeploy.graph.model import card_of, fold_constants, parse_model, to_graph, to_model, with_card
from eamdeploy.graph.weights import serialize
from eamdeploy.observer import SILENT, Observer
from eamdeploy.passes.base import run_passes
from eamdeploy.passes.float_maps import FloatMaps
from eamdeploy.passes.fused_attention import FusedAttention
from eamdeploy.passes.integer_map_products import frozen_values
from eamdeploy.passes.order import plan_ort
from eamdeploy.passes.quantize_products import QuantizeProducts, Range, calibrated_tensors

_REQUIRED = {
    FusedAttention.name: "no live attention that can be fused",
    QuantizeProducts.name: "no product that could be INT8",
}
"""Passes that make a form what it is, and what a model lacks in which such a pass finds nothing."""


def convert(
    data: ModelData, form: OrtForm, where: str, calibration: Calibration | None = None, observer: Observer = SILENT
) -> ModelData:
    """The model in that form; its card names what was done among the rewrites.

    Args:
        data: an ONNX model.
        where: what messages call it.
        calibration: images that tell the ranges of activations, for static INT8.

    Raises:
        ConfigError: it is quantized already, has nothing to quantize, or can't be calibrated.
        UnsupportedGraph: it has no live attention that can be fused.
        EngineError: it is no ONNX model, or ONNX Runtime's quantizer or calibrator fails.
    """
    if form.is_exported:
        return data
    model = parse_model(data, f"can't convert {where}")
    card = card_of(model, where)
    if form.int8:
        _require_unquantized(model, where)
    done: list[str] = []
    if form.fused_attention or form.int8 == "static":
        graph = to_graph(model)
        # measured before any pass: the calibrator knows no fused attention
        ranges = _ranges(graph, card, calibration, where, observer) if form.int8 == "static" else None
        done += _rewrite(graph, form, ranges, where)
        model = to_model(graph)
    if form.int8 == "dynamic":
        model = dynamic_int8(model, where)
        done.append("dynamic_int8")
    if card is not None:
        model = with_card(model, card.model_copy(update={"rewrites": [*card.rewrites, *done]}))
    return serialize(model)


def _ranges(
    graph: gs.Graph, card: ModelCard | None, calibration: Calibration | None, where: str, observer: Observer
) -> Mapping[str, Range]:
    if card is None or calibration is None:
        raise ConfigError(
            f"{where} can't be calibrated",
            expected="a model with a card, to preprocess by, and images",
            hint="Calibrate a model that eamdeploy exported, with --calib-data.",
        )
    tensors = list(dict.fromkeys([*calibrated_tensors(graph), *frozen_values(graph)]))
    return measure_ranges(to_model(graph), tensors, card.preprocessing, calibration, observer).ranges


def _rewrite(graph: gs.Graph, form: OrtForm, ranges: Mapping[str, Range] | None, where: str) -> list[str]:
    """`graph` has fused attention, if the form asks for it, and static INT8, if there are ranges.

    With static INT8, frozen maps are integers in their products and floats elsewhere: what a run
    would dequantize each time.

    Returns:
        names of the passes that changed something.
    """
    done: list[str] = []
    for planned in plan_ort(fused_attention=form.fused_attention, ranges=ranges):
        (result,) = run_passes(graph, [planned])
        if result.rewritten:
            done.append(result.name)
        elif result.name in _REQUIRED:
            reasons = "; ".join(sorted({skip.reason for skip in result.skipped}))
            raise UnsupportedGraph(f"{where} has {_REQUIRED[result.name]}", got=reasons or None)
        if result.name == FloatMaps.name:
            fold_constants(graph)  # with the reshapes and gathers that floats go through
    return done


def _require_unquantized(model: onnx.ModelProto, where: str) -> None:
    if any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in model.graph.node):
        raise ConfigError(f"{where} is quantized already", hint="Leave --int8 out.")
