"""The ONNX model that TensorRT's parser gets, and the facts about it that the build depends on.

A board that builds needs the packages onnx and onnx-graphsurgeon for this, which are small and pure Python or have
wheels for Arm; one that only runs engines needs neither.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import onnx.version_converter

from eamdeploy.artifacts.card import ModelCard
from eamdeploy.artifacts.onnx_files import ModelData, digest_model, read_model
from eamdeploy.convert.ranges import Calibration, measure_ranges
from eamdeploy.convert.trt_half import HALF_SCALES_OPSET, has_decomposed_norms, to_half
from eamdeploy.convert.trt_passes import to_trt
from eamdeploy.engines.manifest import CalibratedProducts
from eamdeploy.engines.trt.request import FrozenMap, ModelFacts, TrtModel, TrtOptions, kept_kinds, what_stays_fp32
from eamdeploy.engines.trt.versions import TrtVersion, capabilities
from eamdeploy.errors import ConfigError, EngineError, UnsupportedGraph
from eamdeploy.graph.model import card_of, parse_model, to_graph, to_model, with_card
from eamdeploy.graph.operator_set import operator_set
from eamdeploy.graph.weights import fits_one_file, serialize
from eamdeploy.observer import SILENT, Observer
from eamdeploy.passes.base import run_passes
from eamdeploy.passes.order import plan_trt_int8
from eamdeploy.passes.quantize_products import calibrated_tensors

_EXPORT = "Export it with `eamdeploy export`."
_VIEWS = frozenset({"Reshape", "Cast", "Identity", "Transpose", "Unsqueeze", "Expand"})
_TEXT = {
    "requantize_maps": "frozen maps requantized to integers up to 127",
    "int8_maps": "frozen maps as INT8",
    "float_maps": "frozen maps as FP32",
    "decompose_layer_norm": "LayerNormalization decomposed",
}


def prepare(
    path: Path,
    version: TrtVersion,
    options: TrtOptions,
    calibration: Calibration | None = None,
    observer: Observer = SILENT,
) -> TrtModel:
    """The model at `path` in the form that `version` takes: in INT8 if asked, in mixed precision where types decide.

    Args:
        calibration: images that tell the ranges of activations, with `options.int8`; None for a model that is
            quantized already.

    Raises:
        ConfigError: a file can't be read, the version is too old, or calibration is not what this model needs.
        CheckpointError: the card in its metadata is damaged, or a file with its data is too short or elsewhere.
        EngineError: it is no ONNX model, or no image classifier; or calibration failed.
        UnsupportedGraph: the converted graph is not valid.
    """
    original = _load(read_model(path), path)
    card = card_of(original, f"{path}: metadata")
    model = to_trt(original, version)
    new = _rewrites(model, path)[len(card.rewrites) if card else 0 :]
    changes = [_TEXT.get(name, name) for name in new]
    dequantizers = [(node.name, node.output[0]) for node in original.graph.node if node.op_type == "DequantizeLinear"]
    maps = tuple(found for names in dequantizers if (found := _map(model.graph, *names)) is not None)
    calibrated = None
    if calibration is not None:
        model, calibrated = _quantize(model, card, calibration, path, observer)
        changes.append(calibrated.in_words)
    decomposed = has_decomposed_norms(model)
    kept = kept_kinds(what_stays_fp32(options, decomposed_norms=decomposed))
    if options.precision == "fp16" and capabilities(version).strongly_typed == "always":
        if options.int8:
            model = _raise_opset(model)
        model = to_half(model, kept)
        changes.append(f"FP16 tensors, FP32 kept for input, output{''.join(f', {kind}' for kind in kept)}")
    requantized = tuple(_TEXT[name] for name in new if name == "requantize_maps")
    return TrtModel(
        path=path,
        digest=digest_model(path),
        data=serialize(model),
        card=card,
        facts=replace(_facts(model, maps, path, requantized), decomposed_norms=decomposed),
        changes=tuple(changes),
        calibration=calibrated,
    )


def _quantize(
    model: onnx.ModelProto, card: ModelCard | None, calibration: Calibration, path: Path, observer: Observer
) -> tuple[onnx.ModelProto, CalibratedProducts]:
    """`model` with its products in INT8, and what the calibration was."""
    if card is None:
        raise ConfigError(
            f"{path} carries no model card, so calibration images can't be preprocessed",
            hint="Calibrate a model that eamdeploy exported, or quantize this one before.",
        )
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        raise ConfigError(f"{path} is quantized already", hint="Leave the calibration images out.")
    graph = to_graph(model)
    ranges = measure_ranges(to_model(graph), calibrated_tensors(graph), card.preprocessing, calibration, observer)
    (result,) = run_passes(graph, plan_trt_int8(ranges.ranges))
    card = card.model_copy(update={"rewrites": [*card.rewrites, result.name]})
    calibrated = CalibratedProducts(
        products=result.rewritten, method=ranges.method, images=ranges.images, folder=ranges.source
    )
    return with_card(to_model(graph), card), calibrated


def _raise_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` in an operator set that has float16 scales, so that nothing stands between an INT8 product and its Q/DQ.

    Raises:
        UnsupportedGraph: onnx has no converter for one of its operators.
    """
    if operator_set(model) >= HALF_SCALES_OPSET:
        return model
    if not fits_one_file(model):
        raise UnsupportedGraph(
            f"a model of more than 2 GB can't be brought to operator set {HALF_SCALES_OPSET} for INT8",
            hint=f"Export it with --opset {HALF_SCALES_OPSET}.",
        )
    try:
        return onnx.version_converter.convert_version(model, HALF_SCALES_OPSET)
    except RuntimeError as err:
        raise UnsupportedGraph(
            f"an INT8 model for this TensorRT needs operator set {HALF_SCALES_OPSET}: {str(err).strip()}",
            hint=f"Export it with --opset {HALF_SCALES_OPSET}.",
        ) from err


def _load(data: ModelData, path: Path) -> onnx.ModelProto:
    model = parse_model(data, f"can't build from {path}", _EXPORT)
    if len(model.graph.input) != 1 or len(model.graph.output) != 1 or not model.graph.node:
        counts = f"{len(model.graph.input)} inputs and {len(model.graph.output)} outputs"
        raise _unreadable(path, f"it is no image classifier with one input and one output, but has {counts}")
    return model


def _unreadable(path: Path, why: str) -> EngineError:
    return EngineError(f"can't build from {path}: {why}", hint=_EXPORT)


def _rewrites(model: onnx.ModelProto, path: Path) -> list[str]:
    card = card_of(model, f"{path}: metadata")
    return [] if card is None else card.rewrites


def _facts(model: onnx.ModelProto, maps: tuple[FrozenMap, ...], path: Path, requantized: tuple[str, ...]) -> ModelFacts:
    graph = model.graph
    tensor = graph.input[0].type.tensor_type
    shape = tuple(dim.dim_value or None for dim in tensor.shape.dim)
    if tensor.elem_type != onnx.TensorProto.FLOAT or len(shape) != 4 or None in shape[1:]:
        raise _unreadable(path, f"its input has to be float32 [B, 3, height, width], only B may vary; it is {shape}")
    operators = {node.op_type for node in graph.node}
    return ModelFacts(
        input_name=graph.input[0].name,
        input_shape=shape,
        nodes=tuple((node.op_type, node.name) for node in graph.node),
        dequantizes="DequantizeLinear" in operators,
        quantizes="QuantizeLinear" in operators,
        maps=maps,
        requantized=requantized,
    )


def _map(graph: onnx.GraphProto, node_name: str, output: str) -> FrozenMap | None:
    """The frozen map that a node dequantized in the exported file, wherever its values are now; None for activations.

    Args:
        node_name, output: of that node.
    """
    constants = {item.name: item for item in graph.initializer}
    producer = next((node for node in graph.node if output in node.output), None)
    if producer is not None:
        source, tensors = producer.input[0], [output]
    else:  # `float_maps` put a constant in the node's place, named after it
        source = next((name for name in constants if node_name and name.startswith(f"{node_name}/")), "")
        tensors = [source]
    if source not in constants:
        return None
    aliases = {source, *tensors, *([producer.name] if producer is not None else [])}
    while tensors:
        tensor = tensors.pop()
        for node in graph.node:
            if tensor in node.input and node.output[0] not in aliases:
                aliases.add(node.name)
                if node.op_type in _VIEWS:
                    aliases |= set(node.output)
                    tensors += node.output
    return FrozenMap(source, frozenset(aliases - {""}), tuple(constants[source].dims))
