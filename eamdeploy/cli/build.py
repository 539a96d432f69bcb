"""Commands that build engines under the parity gate: build-ort, build-trt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eamdeploy.cli import options, show
from eamdeploy.cli.console import print_result
from eamdeploy.engines.trt.request import KeepFp32
from eamdeploy.errors import ConfigError
from eamdeploy.vocabulary import ProviderName


def build_ort(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Exported ONNX model.")],
    images: options.CalibrationArguments,
    output: options.Output,
    threads: options.Threads = None,
    provider: Annotated[
        ProviderName | None,
        typer.Option(
            help="Execution provider of ONNX Runtime that runs it; doctor lists what is here.",
            show_default="cpu; with --tune all that are here",
        ),
    ] = None,
    fused_attention: Annotated[
        bool, typer.Option("--fused-attention", help="Live attention as ONNX Runtime's own MultiHeadAttention.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Linear layers in INT8; activations as they come, or by --calib-data.")
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Try all forms that may be fastest here, and keep the one that is.")
    ] = False,
    reference: options.Reference = None,
    check: options.Check = True,
    verify: options.Verify = True,
    min_agreement: options.MinAgreement = None,
    as_json: options.AsJson = False,
) -> None:
    """Build an ONNX Runtime engine and prove that it computes what the model means (exit 3 if not)."""
    from eamdeploy.convert.ort_form import forms_for
    from eamdeploy.stages.build_ort import build_ort as run_build

    calibration = images.calibration
    forms = forms_for(
        None if provider is None else [provider],
        fused_attention=fused_attention,
        int8=int8,
        calibrated=calibration is not None,
        tune=tune,
    )
    with context.obj as terminal:
        result = run_build(
            model,
            output,
            threads=threads,
            forms=forms,
            calibration=calibration,
            reference=reference,
            check=check,
            verify=verify,
            min_agreement=min_agreement,
            observer=terminal,
        )
    print_result(result, show.manifest(result), as_json=as_json)


def build_trt(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Exported ONNX model.")],
    images: options.CalibrationArguments,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Engine to write, *.plan; it appears whole or not at all.")
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Compute in FP16 where that is faster.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in BF16 instead; TensorRT 10.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Linear layers and live attention in INT8, or what the model's own Q/DQ say.")
    ] = False,
    keep_fp32: Annotated[
        KeepFp32,
        typer.Option(help="What stays FP32 with --fp16 or --bf16; auto: LayerNorms that are spelled out."),
    ] = "auto",
    workspace: options.Workspace = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="Measurements kept between builds; builds at the same time may share it.")
    ] = None,
    min_batch: options.MinBatch = None,
    opt_batch: options.OptBatch = None,
    max_batch: options.MaxBatch = None,
    builder_level: Annotated[
        int | None, typer.Option(help="0 (quick build) to 5 (long search).", show_default="TensorRT's own, 3")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Also for newer TensorRT: 8.6 to 10, 10 to 11.")
    ] = False,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="For any GPU from Ampere; can cost fused kernels.")
    ] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Run it later as one recorded CUDA graph.")] = False,
    layer_profile: Annotated[bool, typer.Option("--layer-profile", help="Time every layer of the engine.")] = False,
    baseline: Annotated[Path | None, typer.Option(help="Engine of the unfrozen twin, to note its size.")] = None,
    reference: options.Reference = None,
    check: options.Check = True,
    verify: options.Verify = True,
    min_agreement: options.MinAgreement = None,
    save_onnx: Annotated[
        Path | None, typer.Option(help="Also write the ONNX model that TensorRT's parser gets.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the builder would be asked; needs no GPU.")
    ] = False,
    trt: Annotated[
        str | None, typer.Option(help="With --dry-run: for that TensorRT, which need not be installed.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Build a TensorRT engine for this machine's GPU and prove that it classifies like the model (exit 3 if not)."""
    from eamdeploy.engines.trt.request import TrtOptions
    from eamdeploy.stages.build_trt import build_trt as run_build
    from eamdeploy.stages.build_trt import plan_trt_build

    asked = TrtOptions(
        precision=options.parse_precision(fp16=fp16, bf16=bf16),
        int8=int8,
        keep_fp32=keep_fp32,
        workspace_bytes=options.parse_bytes("--workspace", workspace),
        timing_cache=timing_cache,
        min_batch=min_batch,
        opt_batch=opt_batch,
        max_batch=max_batch,
        builder_level=builder_level,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        cuda_graph=cuda_graph,
        layer_profile=layer_profile,
    )
    version = options.parse_dry_run(dry_run=dry_run, trt=trt)
    calibration = images.calibration
    if dry_run:
        with context.obj as terminal:
            request = plan_trt_build(
                model, asked, version, calibration=calibration, onnx_output=save_onnx, observer=terminal
            )
        print_result(request, show.builder_request(request), as_json=as_json)
        return
    if output is None:
        raise ConfigError("build-trt needs a place for the engine", expected="--output FILE.plan, or --dry-run")
    with context.obj as terminal:
        result = run_build(
            model,
            output,
            asked,
            reference=reference,
            check=check,
            verify=verify,
            min_agreement=min_agreement,
            calibration=calibration,
            baseline=baseline,
            onnx_output=save_onnx,
            observer=terminal,
        )
    print_result(result, show.manifest(result), as_json=as_json)
