"""A model with linear layers in INT8, for ONNX Runtime on a CPU: activations are quantized at every inference.

Before:  y = MatMul(x, W)
After:   y = s·z·MatMulInteger(q(x), integers) with the range of x, and so s, found anew each time
Shapes:  x [.., K]  W [K, N]  z [N], one scale for each column
Exact:   no: 8 bits; held to the reference's first classes by the gate

Made by ONNX Runtime's own quantizer. Dynamic, not static: on CPUs static INT8 (QDQ) is hardly faster than FP32, as its
activations go back and forth between integers and floats around everything that is no product. The classifier stays
FP32, as it decides and costs nothing; so do the patch embedding, whose ConvInteger is slower, and the products of
attention.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from eamdeploy.errors import ConfigError, EngineError
from eamdeploy.graph.linear import is_classifier
from eamdeploy.graph.model import card_of, with_card
from eamdeploy.ort_tools import import_tool

NAME = "dynamic_int8"


def dynamic_int8(data: bytes, where: str) -> bytes:
    """The model with its linear layers in INT8; its card names that among the rewrites.

    Args:
        data: a serialized ONNX model.
        where: what messages call it.

    Raises:
        ConfigError: it is quantized already, or has no linear layer to quantize.
        EngineError: it is no ONNX model, or ONNX Runtime's quantizer fails.
    """
    try:
        model = onnx.load_model_from_string(data)
    except Exception as err:  # protobuf's own exception is in a package that we don't depend on
        raise EngineError(f"can't quantize {where}: it is damaged or no ONNX model") from err
    if any(node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for node in model.graph.node):
        raise ConfigError(f"{where} is quantized already", hint="Leave --int8 out.")
    names = _linear_layers(model)
    if not names:
        raise ConfigError(f"{where} has no linear layer that could be INT8", expected="MatMul with a constant matrix")
    quantized = _quantize(model, names, where)
    card = card_of(model, where)
    if card is not None:
        quantized = with_card(quantized, card.model_copy(update={"rewrites": [*card.rewrites, NAME]}))
    return bytes(quantized.SerializeToString())


def _linear_layers(model: onnx.ModelProto) -> list[str]:
    graph = gs.import_onnx(model)
    return [
        node.name
        for node in graph.nodes
        if node.op == "MatMul"
        and isinstance(node.inputs[1], gs.Constant)
        and node.inputs[1].values.ndim == 2
        and not is_classifier(graph, node)
    ]


def _quantize(model: onnx.ModelProto, names: list[str], where: str) -> onnx.ModelProto:
    quantize = import_tool("quantization.quantize")
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # it recommends a preprocessing that the exporter has done
    try:
        with tempfile.TemporaryDirectory() as scratch:
            source, target = Path(scratch) / "model.onnx", Path(scratch) / "int8.onnx"
            onnx.save(model, source)
            quantize.quantize_dynamic(
                str(source),
                str(target),
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=names,
                per_channel=True,
                weight_type=quantize.QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )
            return onnx.load(target)
    except (RuntimeError, ValueError) as err:
        raise EngineError(f"ONNX Runtime can't quantize {where}: {str(err).partition(chr(10))[0]}") from err
    finally:
        logging.getLogger().setLevel(level)
