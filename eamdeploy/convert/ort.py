"""The ONNX model that ONNX Runtime gets, in one of the forms of `ort_form`.

A board that converts needs the packages onnx and onnx-graphsurgeon; one that builds the exported form needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from eamdeploy.passes.base import Pass, PlannedPass, run_passes
from eamdeploy.passes.float_maps import FloatMaps
from eamdeploy.passes.fused_attention import FusedAttention
from eamdeploy.passes.integer_map_products import IntegerMapProducts, frozen_values
from eamdeploy.passes.quantize_products import QuantizeProducts, Range, calibrated_tensors


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

    Returns:
        names of the passes that changed something.
    """
    done: list[str] = []
    if ranges is not None:
        done += _specialise_maps(graph, ranges)
    if form.fused_attention:
        done.append(_run_required(graph, FusedAttention(), f"{where} has no live attention that can be fused"))
    if ranges is not None:
        rewrite = QuantizeProducts(ranges, unsigned=True, for_pairs=True)
        done.append(_run_required(graph, rewrite, f"{where} has no product that could be INT8"))
    return done


def _specialise_maps(graph: gs.Graph, ranges: Mapping[str, Range]) -> list[str]:
    """Frozen maps are integers in their products, others floats, as each run would dequantize those."""
    plan = [PlannedPass(each, expected=None) for each in (IntegerMapProducts(ranges), FloatMaps())]
    done = [result.name for result in run_passes(graph, plan) if result.rewritten]
    fold_constants(graph)  # with the reshapes and gathers that floats go through
    return done


def _run_required(graph: gs.Graph, rewrite: Pass[Any], otherwise: str) -> str:
    """The pass has changed `graph`; its name. `otherwise` says that it found nothing."""
    (result,) = run_passes(graph, [PlannedPass(rewrite, expected=None)])
    if not result.rewritten:
        reasons = "; ".join(sorted({skip.reason for skip in result.skipped}))
        raise UnsupportedGraph(otherwise, got=reasons or None)
    return result.name


def _require_unquantized(model: onnx.ModelProto, where: str) -> None:
    if any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in model.graph.node):
        raise ConfigError(f"{where} is quantized already", hint="Leave --int8 out.")
