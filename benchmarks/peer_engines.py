"""The engines that a user would pick instead of ours, each made the way its own documentation recommends.

All but torch's start from one graph, as torch's dynamo exporter writes it with a dynamic batch: it is the exporter
that torch maintains, and it says the shapes that the tools need (of Swin in the other's graph they can't infer them).
Where a tool offers a choice, the one that was faster for DeiT-Tiny on a processor with AVX-512 VNNI is taken, so that
the peer is at its best: unsigned activations, no INT8 convolution with dynamic ranges, weights frozen for Inductor.
OpenVINO and Inductor compile for the batch size that is timed; ONNX Runtime runs the graph with its dynamic batch, the
same for peers and ours.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from candidates import Engine, Open, Plan, open_onnx
from numpy.typing import NDArray
from safetensors.torch import save_file
from study import Study

from eamdeploy.convert.ort_tools import import_tool
from eamdeploy.errors import host_packages
from eamdeploy.host.calibrate import predict
from eamdeploy.host.stock_export import export_stock
from eamdeploy.parity.accuracy import Predict
from eamdeploy.vocabulary import Exporter

OPSET = 18  # the first that both of torch's exporters write for ViT and Swin
_NOTE = "note.txt"
_BENCH_EXTRA = "Install it with: pip install 'eamdeploy[bench]'."


def stock(study: Study, exporter: Exporter = "dynamo") -> Path:
    """The model exactly as torch exports it."""

    def write(folder: Path) -> None:
        exported = export_stock(study.model, study.how.size, batch=None, opset=OPSET, exporter=exporter)
        onnx.save(exported.model, folder / "model.onnx")

    return study.once(f"stock-{exporter}", write) / "model.onnx"


def stock_engine(exporter: Exporter, study: Study) -> Engine:
    return _on_onnxruntime(study, stock(study, exporter).parent)


def transformer_optimizer(study: Study) -> Engine:
    """What ONNX Runtime's optimizer for transformers makes of it; the note says what it fused."""

    def write(folder: Path) -> None:
        kind = "swin" if study.spec.name.startswith("swin") else "vit"
        with _quiet():
            optimizer = import_tool("transformers.optimizer")
            optimized = optimizer.optimize_model(str(stock(study)), model_type=kind)
            optimized.save_model_to_file(str(folder / "model.onnx"))
        fused = [f"{name} {count}" for name, count in optimized.get_fused_operator_statistics().items() if count]
        (folder / _NOTE).write_text(f"as {kind}: {', '.join(fused)}")

    return _on_onnxruntime(study, study.once("transformer-optimizer", write))


def static_int8(name: str, operators: Sequence[str] | None, study: Study) -> Engine:
    """INT8 by QuantizeLinear and DequantizeLinear; activations unsigned, as VNNI has it, weights per channel."""

    def write(folder: Path) -> None:
        with _quiet():
            tool = import_tool("quantization")
            tool.quantize_static(
                str(_prepared(study)),
                str(folder / "model.onnx"),
                _Reader(study.calibration()),
                quant_format=tool.QuantFormat.QDQ,
                op_types_to_quantize=operators,
                per_channel=True,
                activation_type=tool.QuantType.QUInt8,
                weight_type=tool.QuantType.QInt8,
            )

    return _on_onnxruntime(study, study.once(name, write))


def dynamic_int8(study: Study) -> Engine:
    """Linear layers in INT8, activations by their range in each run; a convolution would be slower than in FP32."""

    def write(folder: Path) -> None:
        with _quiet():
            tool = import_tool("quantization")
            tool.quantize_dynamic(
                str(_prepared(study)), str(folder / "model.onnx"), op_types_to_quantize=["MatMul"], per_channel=True
            )

    return _on_onnxruntime(study, study.once("dynamic-int8", write))


def openvino_fp32(study: Study) -> Engine:
    _import_openvino()
    folder = study.once("openvino-fp32", lambda folder: None)
    return Engine(folder, (stock(study),), stock(study), partial(_open_openvino, stock(study)))


def openvino_int8(study: Study) -> Engine:
    """Quantized by NNCF, with its preset for transformers (SmoothQuant and bias correction among it)."""
    _import_openvino()

    def write(folder: Path) -> None:
        os.environ.setdefault("NNCF_CI", "1")  # otherwise it sends what it does over the network
        with host_packages("OpenVINO INT8", _BENCH_EXTRA), _quiet():
            import nncf
            import openvino
        with _quiet():
            quantized = nncf.quantize(
                openvino.Core().read_model(stock(study)),
                nncf.Dataset(list(study.calibration())),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=study.settings.calibration_images,
            )
            openvino.save_model(quantized, folder / "model.xml", compress_to_fp16=False)

    folder = study.once("openvino-int8", write)
    model = folder / "model.xml"
    return Engine(folder, (model, model.with_suffix(".bin")), stock(study), partial(_open_openvino, model))


def torch_eager(study: Study) -> Engine:
    return _in_torch(study, "torch-eager", partial(_open_eager, study))


def torch_compiled(study: Study) -> Engine:
    """Compiled by Inductor with the weights as constants, which lets it pack them."""
    return _in_torch(study, "torch-compile", partial(_open_compiled, study))


_PRODUCTS = ["MatMul", "Gemm", "Conv"]

PEERS = (
    Plan(
        "stock, TorchScript export", "peer", "onnxruntime", "fp32", partial(stock_engine, "torchscript"), is_stock=True
    ),
    Plan("stock, dynamo export", "peer", "onnxruntime", "fp32", partial(stock_engine, "dynamo"), is_stock=True),
    Plan("ORT transformer optimizer", "peer", "onnxruntime", "fp32", transformer_optimizer),
    Plan("ORT static INT8", "peer", "onnxruntime", "int8", partial(static_int8, "static-int8", None)),
    Plan(
        "ORT static INT8, products only",
        "peer",
        "onnxruntime",
        "int8",
        partial(static_int8, "static-int8-products", _PRODUCTS),
    ),
    Plan("ORT dynamic INT8", "peer", "onnxruntime", "int8", dynamic_int8),
    Plan("torch eager", "peer", "torch", "fp32", torch_eager),
    Plan("torch.compile", "peer", "torch", "fp32", torch_compiled),
    Plan("OpenVINO FP32", "peer", "openvino", "fp32", openvino_fp32),
    Plan("OpenVINO INT8 (NNCF)", "peer", "openvino", "int8", openvino_int8),
)


def _on_onnxruntime(study: Study, folder: Path) -> Engine:
    model, note = folder / "model.onnx", folder / _NOTE
    return Engine(folder, (model,), stock(study), partial(open_onnx, model), note.read_text() if note.exists() else "")


def _prepared(study: Study) -> Path:
    """The graph as ONNX Runtime's quantizers want it; the exporter has inferred the symbolic shapes already."""

    def write(folder: Path) -> None:
        tool = import_tool("quantization.shape_inference")
        tool.quant_pre_process(str(stock(study)), str(folder / "model.onnx"), skip_symbolic_shape=True)

    return study.once("prepared", write) / "model.onnx"


class _Reader:
    """What ONNX Runtime's quantizer reads from: inputs one by one, then None."""

    def __init__(self, images: Iterator[NDArray[np.float32]]) -> None:
        self._images = images

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        images = next(self._images, None)
        return None if images is None else {"image": images}


def _import_openvino() -> None:
    with host_packages("OpenVINO", _BENCH_EXTRA):
        import openvino  # noqa: F401


@contextmanager
def _open_openvino(model: Path, threads: int, batch: int) -> Iterator[Predict]:
    import openvino

    core = openvino.Core()
    network = core.read_model(model)
    shape = network.input(0).partial_shape
    shape[0] = batch
    network.reshape(shape)
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # where a processor has BF16 it would take that
    }
    request = core.compile_model(network, "CPU", hints).create_infer_request()

    def infer(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(request.infer({0: images}, share_inputs=True)[0])

    yield infer


def _in_torch(study: Study, name: str, opened: Open) -> Engine:
    state = {key: value.contiguous() for key, value in study.model.state_dict().items()}
    folder = study.once(name, lambda folder: save_file(state, folder / "model.safetensors"))
    return Engine(folder, (folder / "model.safetensors",), stock(study), opened)


@contextmanager
def _open_eager(study: Study, threads: int, _batch: int) -> Iterator[Predict]:
    with _threads(threads):
        yield partial(predict, copy.deepcopy(study.model))


@contextmanager
def _open_compiled(study: Study, threads: int, batch: int) -> Iterator[Predict]:
    with _threads(threads):
        torch._dynamo.reset()  # so that it is compiled for these threads and this batch alone
        options: dict[str, Any] = {"freezing": True, "cpp.threads": threads}
        compiled: Any = torch.compile(copy.deepcopy(study.model), options=options)
        with _quiet():
            predict(compiled, np.zeros((batch, 3, *study.how.size), np.float32))  # the first call compiles
        yield partial(predict, compiled)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block, warnings, progress bars and logs of the tools are held back."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
