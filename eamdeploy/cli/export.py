"""Commands about the ONNX model: export, lint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eamdeploy.cli import options, show
from eamdeploy.cli.console import print_result
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import ExitCode, host_packages
from eamdeploy.vocabulary import (
    DEFAULT_OPSET,
    MAX_OPSET,
    MIN_OPSET,
    OPSET_WITHOUT_LAYER_NORMALIZATION,
    OPTIONAL_PASSES,
    Backend,
    Exporter,
)

_PASSES = ", ".join(OPTIONAL_PASSES)


def export(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="EAM checkpoint.")],
    output: options.Output,
    references: options.ReferenceImages,
    baseline: Annotated[
        Path | None, typer.Option(help="Also write the unfrozen twin, through the same passes.")
    ] = None,
    stock: Annotated[
        Path | None, typer.Option(help="Also write the unfrozen model as torch exports it, without any pass.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="Of a recovered checkpoint, the one it was made of: the twin has that one's weights."),
    ] = None,
    batch: Annotated[str, typer.Option(help="'dynamic', or one fixed batch size.")] = "dynamic",
    opset: Annotated[
        int | None,
        typer.Option(
            help=f"ONNX operator set, {MIN_OPSET} to {MAX_OPSET}; default {DEFAULT_OPSET}, or "
            f"{OPSET_WITHOUT_LAYER_NORMALIZATION} for TensorRT 8.5.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        Backend, typer.Option(help="What runs it: ONNX Runtime (UINT8 maps) or TensorRT (INT8 maps).")
    ] = "ort",
    trt: Annotated[
        str | None,
        typer.Option(help="With --target trt: the oldest TensorRT that must take it; default 8.6.", show_default=False),
    ] = None,
    exporter: Annotated[Exporter, typer.Option(help="Which of torch's exporters makes the stock graph.")] = "auto",
    fold_preprocess: Annotated[
        bool, typer.Option("--fold-preprocess", help="Take pixels (uint8) as input: the graph normalizes them itself.")
    ] = False,
    without: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PASS",
            help=f"Leave a pass out, and those that need it; repeatable. The passes: {_PASSES}.",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Time the model against its unfrozen twin on ONNX Runtime here (about 3 s).")
    ] = True,
    verify: options.Verify = True,
    as_json: options.AsJson = False,
) -> None:
    """Export an EAM checkpoint to ONNX: frozen maps as integers, no queries and keys of frozen heads."""
    with host_packages("export"):
        from eamdeploy.stages.export import export as run_export
    with context.obj as terminal:
        result = run_export(
            checkpoint,
            output,
            baseline=baseline,
            stock=stock,
            teacher=teacher,
            batch=options.parse_batch(batch),
            opset=opset,
            exporter=exporter,
            fold_preprocess=fold_preprocess,
            without=without or (),
            trt=options.parse_target(target, trt),
            images=references.source,
            measure=measure,
            verify=verify,
            observer=terminal,
        )
    print_result(result, show.export(result), as_json=as_json)


def lint(
    model: Annotated[Path, typer.Argument(help="Any ONNX model.")],
    trt: Annotated[str, typer.Option(help="Version of TensorRT, e.g. 8.6 or 10.3.0; it need not be installed.")],
    as_json: options.AsJson = False,
) -> None:
    """Check an ONNX model against what a version of TensorRT takes (exit 3 after errors, not after warnings)."""
    with host_packages("lint"):
        from eamdeploy.lint.linter import lint_file
    report = lint_file(model, TrtVersion.parse(trt))
    print_result(report, show.lint(report), as_json=as_json)
    if report.errors:
        raise typer.Exit(ExitCode.GATE_FAILED)
