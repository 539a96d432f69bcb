"""The ONNX graph that torch's own exporters make of a timm model, before any rewrite.

Either exporter will do, because the passes find attention by what it computes. `auto` takes `dynamo` where it can: it
is the one torch maintains, and it keeps symbolic shapes, so that a dynamic batch costs one `Shape` node instead of a
chain of shape arithmetic around every reshape. Its operators start at opset 18, and onnx's version converter brings
most but not all of them down to 17 and none to 16, which has no LayerNormalization; there `auto` falls back on
`torchscript`.
"""

from __future__ import annotations

import io
import logging
import operator
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from timm.layers import RmsNorm
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from eamdeploy.artifacts.onnx_files import ONE_FILE_BYTES
from eamdeploy.errors import ConfigError, UnsupportedGraph
from eamdeploy.graph.invariants import INPUT_NAME, OUTPUT_NAME
from eamdeploy.graph.operator_set import operator_set
from eamdeploy.graph.weights import check_model
from eamdeploy.vocabulary import MAX_OPSET, MIN_OPSET, Exporter


@dataclass(frozen=True)
class StockExport:
    """A graph as torch wrote it.

    Attributes:
        exporter: which of torch's exporters wrote it.
    """

    model: onnx.ModelProto
    exporter: str


def export_stock(
    model: nn.Module, image_size: tuple[int, int], *, batch: int | None, opset: int, exporter: Exporter = "auto"
) -> StockExport:
    """`model` as ONNX with input `image` `[B, 3, H, W]` and output `logits`, as torch exports it.

    Args:
        image_size: H and W in pixels.
        batch: fixed B, or None for a dynamic one.

    Raises:
        ConfigError: the opset or the batch is out of range.
        UnsupportedGraph: torch can't export the model, or not at this opset.
    """
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ConfigError("opset out of range", expected=f"{MIN_OPSET} … {MAX_OPSET}", got=opset)
    if batch is not None and batch < 1:
        raise ConfigError("the batch can't be exported", expected="None or at least 1 image", got=batch)
    failures = []
    for name in ("dynamo", "torchscript") if exporter == "auto" else (exporter,):
        try:
            return StockExport(_export(name, model, image_size, batch, opset), name)
        except UnsupportedGraph as err:
            failures.append(err)
    reasons = "; ".join(str(err) for err in failures)
    raise UnsupportedGraph(reasons, hint="Try another --exporter or --opset; 18 suits most models.") from failures[0]


def _export(
    exporter: str, model: nn.Module, image_size: tuple[int, int], batch: int | None, opset: int
) -> onnx.ModelProto:
    # 2, because exporters treat a 1 as a constant even where the batch is declared dynamic
    example = torch.zeros(2 if batch is None else batch, 3, *image_size)
    write = _dynamo if exporter == "dynamo" else _torchscript
    with _unfused(model), _spelled_out_norms(model), _shifts_inside_the_image(model), _quiet():
        try:
            exported = write(model, example, batch, opset)
        except Exception as err:  # torch's exporters raise many kinds
            raise UnsupportedGraph(f"torch's {exporter} exporter failed at opset {opset}: {_first_line(err)}") from err
    version = operator_set(exported)
    if version != opset:
        raise UnsupportedGraph(f"torch's {exporter} exporter wrote another opset", expected=opset, got=version)
    try:
        check_model(exported)  # onnx's version converter leaves what an older opset does not know
    except onnx.checker.ValidationError as err:
        reason = f"torch's {exporter} exporter wrote an invalid graph at opset {opset}: {_first_line(err)}"
        raise UnsupportedGraph(reason) from err
    return exported


def _first_line(err: Exception) -> str:
    return str(err).splitlines()[0] if str(err) else type(err).__name__


def _dynamo(model: nn.Module, example: torch.Tensor, batch: int | None, opset: int) -> onnx.ModelProto:
    shapes = ({0: torch.export.Dim("batch")},) if batch is None else None
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=opset,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None, "torch returns a program when no file is named"
    return program.model_proto


def _torchscript(model: nn.Module, example: torch.Tensor, batch: int | None, opset: int) -> onnx.ModelProto:
    axes = {INPUT_NAME: {0: "batch"}, OUTPUT_NAME: {0: "batch"}} if batch is None else None
    write: Any = partial(
        torch.onnx.export,
        model,
        (example,),
        dynamo=False,
        opset_version=opset,
        input_names=[INPUT_NAME],
        output_names=[OUTPUT_NAME],
        dynamic_axes=axes,
    )
    if sum(4 * value.numel() for value in model.state_dict().values()) > ONE_FILE_BYTES:
        with tempfile.TemporaryDirectory() as scratch:  # torch writes so much to many files, and to a folder only
            file = Path(scratch) / "model.onnx"
            write(str(file))
            return onnx.load(file)
    buffer = io.BytesIO()  # allowed with dynamo=False, whatever the annotation says
    write(buffer)
    return onnx.load_from_string(buffer.getvalue())


@contextmanager
def _unfused(model: nn.Module) -> Iterator[None]:
    """Inside the block, attention is spelled out as products and a softmax instead of one fused operator."""
    modules: list[Any] = [module for module in model.modules() if getattr(module, "fused_attn", False)]
    for module in modules:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in modules:
            module.fused_attn = True


@contextmanager
def _spelled_out_norms(model: nn.Module) -> Iterator[None]:
    """Inside the block, every RMS norm is spelled out in operators that any opset has: torch's own is none of ONNX
    before opset 23.
    """
    norms: list[Any] = [module for module in model.modules() if isinstance(module, RmsNorm)]
    for norm in norms:
        norm.forward = partial(_rms_norm, norm)  # hides the class's method
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _rms_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """`norm(x)`, x ÷ √(mean(x²) + ε) · weight over the last axis.

    Source: `timm.layers.fast_norm.rms_norm`.
    """
    scaled = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + norm.eps)
    return scaled if norm.weight is None else scaled * norm.weight


@contextmanager
def _shifts_inside_the_image(model: nn.Module) -> Iterator[None]:
    """Inside the block, no Swin block shifts its tokens by more than a side has: the TorchScript exporter loses such
    a shift without a word (torch 2.14), and a shift by the remainder is the same one.
    """
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, SwinTransformerBlock)]
    shifts = [block.shift_size for block in blocks]
    for block in blocks:
        block.shift_size = tuple(map(operator.mod, block.shift_size, block.input_resolution))
    try:
        yield
    finally:
        for block, shift in zip(blocks, shifts, strict=True):
            block.shift_size = shift


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside the block, the exporters' progress, warnings about our own choice of exporter, and logs are held back."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            _discarded_stdout(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _discarded_stdout() -> Iterator[None]:
    """Inside the block, nothing reaches file descriptor 1: torch's C++ dumps a graph there that it can't export."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
