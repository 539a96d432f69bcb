"""A model with linear layers in INT8, for ONNX Runtime on a CPU: activations are quantized at every inference.

Before:  y = MatMul(x, W)
After:   y = s·z·MatMulInteger(q(x), integers) with the range of x, and so s, found anew each time
Shapes:  x [.., K]  W [K, N]  z [N], one scale for each column
Exact:   no: 8 bits; held to the reference's first classes by the gate. The integers' products are, on every processor

Made by ONNX Runtime's own quantizer, but for the integers: its weights of 8 full bits overflow on processors without
VNNI, and its remedy, 7 bits (`reduce_range`), costs more than what `graph.int8_weights` does.

Dynamic, not static: on CPUs static INT8 (QDQ) is hardly faster than FP32, as its activations go back and forth between
integers and floats around everything that is no product. The classifier stays FP32, as it decides and costs nothing; so
do the patch embedding, whose ConvInteger is slower, and the products of attention.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from eamdeploy.artifacts.onnx_output import write_model
from eamdeploy.convert.ort_tools import TOOL_FAILURES, import_tool
from eamdeploy.errors import ConfigError, EngineError
from eamdeploy.graph.int8_weights import LARGEST, integers_of, pair_limits
from eamdeploy.graph.linear import is_classifier
from eamdeploy.graph.weights import fits_one_file, serialize

_SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # for a column of zeros


def dynamic_int8(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """The model with its linear layers in INT8.

    Args:
        where: what messages call it.

    Raises:
        ConfigError: it has no linear layer to quantize.
        EngineError: ONNX Runtime's quantizer fails.
    """
    names = _linear_layers(model)
    if not names:
        raise ConfigError(f"{where} has no linear layer that could be INT8", expected="MatMul with a constant matrix")
    quantized = _quantize(model, names, where)
    _fit_pairs(quantized, model)
    return quantized


def _fit_pairs(quantized: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Weights of `quantized` are integers of which no two products overflow 16 bits, and their scales fit.

    Args:
        model: what it was made of.
    """
    weights = {f"{item.name}_quantized": item for item in model.graph.initializer}
    stored = {item.name: item for item in quantized.graph.initializer}
    for name in {node.input[1] for node in quantized.graph.node if node.op_type == "MatMulInteger"}:
        weight = numpy_helper.to_array(weights[name])
        scales = np.maximum(pair_limits(weight) / LARGEST, _SMALLEST_SCALE).astype(np.float32)
        for part, values in ((name, integers_of(weight, scales)), (f"{weights[name].name}_scale", scales)):
            stored[part].CopyFrom(numpy_helper.from_array(values, part))


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
            write_model(source, serialize(model))
            quantize.quantize_dynamic(
                str(source),
                str(target),
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=names,
                per_channel=True,
                weight_type=quantize.QuantType.QInt8,
                use_external_data_format=not fits_one_file(model),
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )
            return onnx.load(target)
    except TOOL_FAILURES as err:
        raise EngineError(f"ONNX Runtime can't quantize {where}: {str(err).partition(chr(10))[0]}") from err
    finally:
        logging.getLogger().setLevel(level)
