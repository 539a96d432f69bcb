"""The command line: every command parses its options, calls one function and prints what that returns."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from eamdeploy.artifacts.files import require_output
from eamdeploy.artifacts.records import printable
from eamdeploy.cli import options as options
from eamdeploy.cli import show, show_profile
from eamdeploy.cli.console import Terminal, print_result
from eamdeploy.convert.ranges import CALIBRATION_IMAGES
from eamdeploy.engines.manifest import ProviderName
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import ConfigError, EamDeployError, ExitCode, host_packages
from eamdeploy.images.source import ImageSource, read_class_names

if TYPE_CHECKING:
    from eamdeploy.host.model import ModelSpec, PreprocessingOverrides
    from eamdeploy.host.options import FreezeOptions

app = typer.Typer(
    name="eamdeploy",
    help="Deploy vision transformers with frozen attention maps (EAM) to edge boards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line and exit as DESIGN §9 says: a user's error is one line, a bug of ours a traceback."""
    arguments = options.split_model_kwargs(sys.argv[1:])
    command = typer.main.get_command(app)
    try:
        command(arguments, prog_name="eamdeploy")  # exits by itself: 0, 2 after wrong use, 130 after Ctrl-C
    except EamDeployError as err:
        plain = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
        plain.print(f"error: {printable(' '.join(str(err).split()))}")
        sys.exit(err.exit_code)


def _show_version(wanted: bool) -> None:
    if wanted:
        from eamdeploy import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def configure(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the libraries' own log messages.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show results and errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Deploy vision transformers with frozen attention maps (EAM) to edge boards."""
    del version  # its callback has shown it
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    context.obj = Terminal(quiet=quiet)


Output = Annotated[Path, typer.Option("--output", "-o", help="File to write; it appears whole or not at all.")]
Heatmap = Annotated[Path | None, typer.Option(help="Draw layers × heads with the frozen ones marked: .png or .svg.")]
Sparsity = Annotated[float, typer.Option(help="Frozen ÷ all attention entries, in [0, 1].")]
Score = Annotated[
    Literal["sensitivity", "entropy", "row-entropy", "variance", "random"],
    typer.Option(
        help="What freezing is chosen by, the least for each entry first; sensitivity is the KL of the logits "
        "with pieces frozen, estimated for rows and entries."
    ),
]
Granularity = Annotated[
    Literal["head", "row", "entry"],
    typer.Option(help="What is frozen as one piece: a whole map, one query's row of it, or one value."),
]
WindowMaps = Annotated[
    Literal["shared", "class", "window"],
    typer.Option(help="Swin: one frozen map for all windows, for those with the same shift mask, or for each."),
]
Bins = Annotated[int, typer.Option(help="Bins of the histograms behind the score entropy.")]
Spacing = Annotated[Literal["uniform", "squared"], typer.Option(help="Where the bins' edges lie: i/n or (i/n)².")]
Seed = Annotated[int, typer.Option(help="For --weights random and --score random.")]
ScoreImages = Annotated[
    int | None, typer.Option(help="Images for sensitivity; default 48 for heads, all for rows and entries.")
]


@app.command()
def analyze(
    context: typer.Context,
    model: options.Model,
    data: options.Data,
    output: Output,
    weights: options.Weights = "pretrained",
    model_kwargs: options.ModelKwargs = [],  # noqa: B006 (Typer copies it)
    heatmap: Heatmap = None,
    images: options.Images = None,
    split: options.Split = "all",
    skip_bad: options.SkipBad = False,
    exif_transpose: options.ExifTranspose = False,
    sparsity: Sparsity = 0.2,
    granularity: Granularity = "head",
    window_maps: WindowMaps = "shared",
    score: Score = "entropy",
    bits: options.Bits = 4,
    quantizer: options.Quantizer = "squared",
    bins: Bins = 16,
    spacing: Spacing = "uniform",
    seed: Seed = 0,
    score_images: ScoreImages = None,
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the entropy of every attention head over a folder of images; mark what freeze would take."""
    with host_packages("analyze"):
        from eamdeploy.stages.analyze import analyze as run_analyze
    _require_outputs([output, heatmap], [Path(weights)])
    settings = _freeze_options(
        sparsity, granularity, window_maps, score, bits, quantizer, bins, spacing, seed, score_images
    )
    with context.obj as terminal:
        result = run_analyze(
            _model_spec(model, weights, model_kwargs, seed),
            ImageSource(data, split, images, skip_bad, exif_transpose),
            settings,
            overrides=_overrides(mean, std, crop_pct, interpolation),
            observer=terminal,
        )
    result.write(output)
    if heatmap is not None:
        _draw(result.scores[score], score, result.frozen, result.shares, model, heatmap)
    print_result(result, show.analysis(result), as_json=as_json)


@app.command()
def freeze(
    context: typer.Context,
    model: options.Model,
    data: options.Data,
    output: Output,
    weights: options.Weights = "pretrained",
    model_kwargs: options.ModelKwargs = [],  # noqa: B006
    heatmap: Heatmap = None,
    class_names: options.ClassNames = None,
    images: options.Images = None,
    split: options.Split = "all",
    skip_bad: options.SkipBad = False,
    exif_transpose: options.ExifTranspose = False,
    sparsity: Sparsity = 0.2,
    granularity: Granularity = "head",
    window_maps: WindowMaps = "shared",
    score: Score = "sensitivity",
    bits: options.Bits = 4,
    quantizer: options.Quantizer = "squared",
    bins: Bins = 16,
    spacing: Spacing = "uniform",
    seed: Seed = 0,
    score_images: ScoreImages = None,
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
    as_json: options.AsJson = False,
) -> None:
    """Freeze what depends least on the image; write an EAM checkpoint (*.eam.safetensors)."""
    with host_packages("freeze"):
        from eamdeploy.stages.freeze import freeze as run_freeze
        from eamdeploy.stages.freeze import read_shares
    _require_outputs([output, heatmap], [Path(weights)])
    settings = _freeze_options(
        sparsity, granularity, window_maps, score, bits, quantizer, bins, spacing, seed, score_images
    )
    with context.obj as terminal:
        header = run_freeze(
            _model_spec(model, weights, model_kwargs, seed),
            ImageSource(data, split, images, skip_bad, exif_transpose),
            output,
            settings,
            overrides=_overrides(mean, std, crop_pct, interpolation),
            class_names=read_class_names(class_names),
            observer=terminal,
        )
    if heatmap is not None:
        _draw(header.freezing.scores, score, header.freezing.heads, read_shares(output), model, heatmap)
    print_result(header, show.checkpoint(header), as_json=as_json)


@app.command()
def pack(
    model: options.Model,
    maps: Annotated[
        Path,
        typer.Option(help="Frozen maps, .npz or .safetensors: <module>.heads with .maps or .codes, perhaps .mask."),
    ],
    output: Output,
    weights: options.Weights = "pretrained",
    model_kwargs: options.ModelKwargs = [],  # noqa: B006
    class_names: options.ClassNames = None,
    bits: options.Bits = 4,
    quantizer: options.Quantizer = "squared",
    seed: Seed = 0,
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.Interpolation = None,
    as_json: options.AsJson = False,
) -> None:
    """Pack weights and frozen maps from your own EAM training into an EAM checkpoint."""
    with host_packages("pack"):
        from eamdeploy.host.maps_file import read_maps
        from eamdeploy.stages.pack import pack as run_pack
    _require_outputs([output], [Path(weights), maps])
    width = options.parse_bits(bits)
    header = run_pack(
        _model_spec(model, weights, model_kwargs, seed),
        read_maps(maps, width, quantizer),
        output,
        bits=width,
        quantizer=quantizer,
        overrides=_overrides(mean, std, crop_pct, interpolation),
        class_names=read_class_names(class_names),
    )
    print_result(header, show.checkpoint(header), as_json=as_json)


@app.command()
def export(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="EAM checkpoint.")],
    output: Output,
    baseline: Annotated[
        Path | None, typer.Option(help="Also write the unfrozen twin, through the same passes.")
    ] = None,
    batch: Annotated[str, typer.Option(help="'dynamic', or one fixed batch size.")] = "dynamic",
    opset: Annotated[
        int | None,
        typer.Option(help="ONNX operator set, 16 to 22; default 17, or 16 for TensorRT 8.5.", show_default=False),
    ] = None,
    target: Annotated[
        Literal["ort", "trt"], typer.Option(help="What runs it: ONNX Runtime (UINT8 maps) or TensorRT (INT8 maps).")
    ] = "ort",
    trt: Annotated[
        str | None,
        typer.Option(help="With --target trt: the oldest TensorRT that must take it; default 8.6.", show_default=False),
    ] = None,
    exporter: Annotated[
        Literal["auto", "dynamo", "torchscript"], typer.Option(help="Which of torch's exporters makes the stock graph.")
    ] = "auto",
    fold_preprocess: Annotated[
        bool, typer.Option("--fold-preprocess", help="Take pixels (uint8) as input: the graph normalizes them itself.")
    ] = False,
    without: Annotated[
        list[str] | None, typer.Option(metavar="PASS", help="Leave a pass out, and those that need it; repeatable.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images for the parity reference; synthetic ones by default.")
    ] = None,
    images: options.Images = None,
    split: options.Split = "all",
    skip_bad: options.SkipBad = False,
    exif_transpose: options.ExifTranspose = False,
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
            batch=options.parse_batch(batch),
            opset=opset,
            exporter=exporter,
            fold_preprocess=fold_preprocess,
            without=without or (),
            trt=options.parse_target(target, trt),
            images=None if data is None else ImageSource(data, split, images, skip_bad, exif_transpose),
            measure=measure,
            verify=verify,
            observer=terminal,
        )
    print_result(result, show.export(result), as_json=as_json)


@app.command()
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


@app.command()
def build_ort(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Exported ONNX model.")],
    output: Output,
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
    calib_data: options.CalibData = None,
    calib_images: options.CalibImages = CALIBRATION_IMAGES,
    calib_split: options.Split = "all",
    calib_method: options.CalibMethod = "percentile",
    calib_cache: options.CalibCache = None,
    skip_bad: options.SkipBad = False,
    exif_transpose: options.ExifTranspose = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Try all forms that may be fastest here, and keep the one that is.")
    ] = False,
    reference: Annotated[
        Path | None, typer.Option(help="Reference set of the parity gate; by default the one beside the model.")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Run the parity gate.")] = True,
    verify: options.Verify = True,
    min_agreement: options.MinAgreement = None,
    as_json: options.AsJson = False,
) -> None:
    """Build an ONNX Runtime engine and prove that it computes what the model means (exit 3 if not)."""
    from eamdeploy.convert.ort_form import forms_for
    from eamdeploy.convert.ranges import calibration_with
    from eamdeploy.stages.build_ort import build_ort as run_build

    calibration = calibration_with(
        calib_data,
        calib_images,
        calib_split,
        calib_method,
        calib_cache,
        skip_bad=skip_bad,
        exif_transpose=exif_transpose,
    )
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


@app.command()
def build_trt(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Exported ONNX model.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Engine to write, *.plan; it appears whole or not at all.")
    ] = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Compute in FP16 where that is faster.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in BF16 instead; TensorRT 10.")] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Linear layers and live attention in INT8, or what the model's own Q/DQ say.")
    ] = False,
    calib_data: options.CalibData = None,
    calib_images: options.CalibImages = CALIBRATION_IMAGES,
    calib_split: options.Split = "all",
    calib_method: options.CalibMethod = "percentile",
    calib_cache: options.CalibCache = None,
    skip_bad: options.SkipBad = False,
    exif_transpose: options.ExifTranspose = False,
    keep_fp32: Annotated[
        Literal["auto", "norm-softmax", "norm", "none"],
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
    reference: Annotated[
        Path | None, typer.Option(help="Reference set of the parity gate; by default the one beside the model.")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Run the parity gate.")] = True,
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
    from eamdeploy.convert.ranges import calibration_with
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
    calibration = calibration_with(
        calib_data,
        calib_images,
        calib_split,
        calib_method,
        calib_cache,
        skip_bad=skip_bad,
        exif_transpose=exif_transpose,
    )
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


@app.command()
def evaluate(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="EAM checkpoint or engine.")],
    data: options.Data,
    reference: Annotated[
        Path | None,
        typer.Option(help="Checkpoint or engine to agree with; a checkpoint's default is its own unfrozen model."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON here.")] = None,
    images: options.Images = None,
    split: options.Split = "all",
    skip_bad: options.SkipBad = False,
    exif_transpose: options.ExifTranspose = False,
    class_order: options.LabelOrder = None,
    class_names: options.LabelNames = None,
    threads: options.Threads = None,
    verify: options.Verify = True,
    check: options.CheckHere = True,
    as_json: options.AsJson = False,
) -> None:
    """Measure top-1 and top-5 where there are labels, and agreement and KL against a reference."""
    from eamdeploy.stages.evaluate import evaluate as run_evaluate

    _require_outputs([output], [model])
    names = read_class_names(class_names)
    source = ImageSource(data, split, images, skip_bad, exif_transpose, class_order, names)
    with context.obj as terminal:
        result = run_evaluate(
            model, source, reference=reference, threads=threads, verify=verify, check=check, observer=terminal
        )
    if output is not None:
        result.write(output)
    print_result(result, show.evaluation(result), as_json=as_json)


@app.command()
def profile(
    context: typer.Context,
    engines: Annotated[list[Path], typer.Argument(help="Engines, or any ONNX models.")],
    baseline: Annotated[
        Path | None, typer.Option(help="What the speed-ups are against; takes turns with the rest.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON here.")] = None,
    device: Annotated[
        list[str],
        typer.Option(
            help="What they run on: cpu, cuda, jetson, or other machines as ssh://user@host:port, side by side.",
            show_default="found out",
        ),
    ] = [],  # noqa: B006 (Typer copies it)
    remote_command: Annotated[
        str, typer.Option(help="What runs eamdeploy on the other machines, e.g. '~/venv/bin/eamdeploy'.")
    ] = "eamdeploy",
    ssh_config: Annotated[
        Path | None, typer.Option(help="Configuration of ssh, in place of yours; as `ssh -F`.")
    ] = None,
    threads: options.Threads = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in one inference.")] = 1,
    streams: Annotated[int, typer.Option(min=1, help="Also measure throughput with that many inferences at once.")] = 1,
    warmup_ms: Annotated[float, typer.Option(help="Warm-up of every engine in each sitting.")] = 200.0,
    min_seconds: Annotated[float, typer.Option(help="Time every engine for at least this long.")] = 3.0,
    min_runs: Annotated[int, typer.Option(help="… and at least this often.")] = 50,
    sittings: Annotated[int, typer.Option(min=1, help="How often the engines are loaded anew for that.")] = 6,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Measure memory and cold start in a process of its own.")
    ] = True,
    power: Annotated[
        bool, typer.Option("--power/--no-power", help="Measure power and energy where the device has sensors.")
    ] = True,
    power_seconds: Annotated[float, typer.Option(help="… for twice this long with every engine.")] = 5.0,
    layer_profile: Annotated[bool, typer.Option("--layer-profile", help="Also time every layer.")] = False,
    check: options.CheckHere = True,
    as_json: options.AsJson = False,
) -> None:
    """Measure latency, throughput, memory and power here; engines take turns, so that ratios can be trusted."""
    from eamdeploy.devices.provenance import usable_cores
    from eamdeploy.profiling.timing import Schedule
    from eamdeploy.stages.profile import Extras
    from eamdeploy.stages.profile import profile as run_profile

    _require_outputs([output], engines)
    local, machines = options.parse_devices(device)
    schedule = Schedule(warmup_ms, min_seconds, min_runs, sittings)
    extras = Extras(fresh=memory, streams=streams, layers=layer_profile, power=power, power_seconds=power_seconds)
    if machines:
        _profile_remote(context, machines, engines, baseline, remote_command, ssh_config, output, as_json=as_json)
        return
    result = run_profile(
        engines,
        baseline,
        threads=threads or usable_cores(),
        batch=batch,
        device=local,
        schedule=schedule,
        extras=extras,
        check=check,
        observer=context.obj,  # not as a block: a bar that moves would disturb what is measured
    )
    if output is not None:
        result.write(output)
    print_result(result, show_profile.profile(result), as_json=as_json)


def _profile_remote(
    context: typer.Context,
    machines: list[str],
    engines: list[Path],
    baseline: Path | None,
    remote_command: str,
    ssh_config: Path | None,
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """What the machines gave is written and shown, and then it is an error if one gave nothing."""
    from eamdeploy.remote.profile import profile_remote

    with context.obj as terminal:
        result = profile_remote(
            machines,
            engines,
            baseline,
            options.profile_options(context),
            remote_command=remote_command,
            ssh_config=ssh_config,
            observer=terminal,
        )
    if output is not None:
        result.write(output)
    print_result(result, show_profile.machines(result.profiles), as_json=as_json)
    result.require_all()


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="JSON of the other commands, run.json, EAM checkpoints.")],
    output: Output,
    markdown: Annotated[Path | None, typer.Option(help="Also write it as Markdown.")] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.", show_default="the models")] = None,
    verify: options.Verify = True,
    as_json: options.AsJson = False,
) -> None:
    """Show what was frozen, what it cost and what it gained, on one HTML page that needs no network."""
    from eamdeploy.stages.report import report as run_report

    result = run_report(files, output, markdown=markdown, title=title, verify=verify)
    print_result(result, show.report(result), as_json=as_json)


@app.command()
def run(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML configuration, see docs/usage.md.")],
    force: Annotated[bool, typer.Option("--force", help="Run every stage again.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Run all stages from a configuration file; what has not changed is not run again."""
    from eamdeploy.pipeline.config import load_config
    from eamdeploy.pipeline.run import run as run_all

    loaded = load_config(config)
    with context.obj as terminal:
        result = run_all(loaded, force=force, observer=terminal)
    print_result(result, show.run(result), as_json=as_json)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Checkpoint, ONNX model, engine, manifest, reference set or JSON.")],
    verify: options.Verify = True,
    as_json: options.AsJson = False,
) -> None:
    """Show what an artifact is and what it holds."""
    from eamdeploy.stages.inspect import inspect as run_inspect

    result = run_inspect(file, verify=verify)
    print_result(result, show.inspection(result), as_json=as_json)


@app.command()
def doctor(as_json: options.AsJson = False) -> None:
    """Show what this machine has, and what is missing for what."""
    from eamdeploy.stages.doctor import doctor as run_doctor

    result = run_doctor()
    print_result(result, show.doctor(result), as_json=as_json)


def _require_outputs(outputs: list[Path | None], inputs: list[Path]) -> None:
    """Every output that was asked for can be written; checked before minutes of work."""
    for output in outputs:
        if output is not None:
            require_output(output, *inputs)


def _model_spec(model: str, weights: str, model_kwargs: list[str], seed: int) -> ModelSpec:
    from eamdeploy.host.model import ModelSpec

    return ModelSpec(model, weights, options.parse_model_kwargs(model_kwargs), seed)


def _overrides(
    mean: tuple[float, float, float] | None,
    std: tuple[float, float, float] | None,
    crop_pct: float | None,
    interpolation: str | None,
) -> PreprocessingOverrides:
    from eamdeploy.host.model import PreprocessingOverrides

    return PreprocessingOverrides(mean, std, crop_pct, interpolation)


def _freeze_options(
    sparsity: float,
    granularity: Literal["head", "row", "entry"],
    window_maps: Literal["shared", "class", "window"],
    score: Literal["sensitivity", "entropy", "row-entropy", "variance", "random"],
    bits: int,
    quantizer: Literal["uniform", "squared"],
    bins: int,
    spacing: Literal["uniform", "squared"],
    seed: int,
    score_images: int | None,
) -> FreezeOptions:
    from eamdeploy.host.options import FreezeOptions

    return FreezeOptions(
        sparsity=sparsity,
        granularity=granularity,
        window_maps=window_maps,
        score=score,
        bits=options.parse_bits(bits),
        quantizer=quantizer,
        bins=bins,
        spacing=spacing,
        seed=seed,
        score_images=score_images,
    )


def _draw(
    scores: dict[str, list[float]],
    score: str,
    frozen: dict[str, list[int]],
    shares: dict[str, list[float]],
    title: str,
    path: Path,
) -> None:
    from eamdeploy.reporting.draw.heatmap import draw_heatmap

    draw_heatmap(scores, score_name=score, frozen=frozen, shares=shares, title=title, path=path)
