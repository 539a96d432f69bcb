"""Commands that measure engines: evaluate, profile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from eamdeploy.cli import options, show, show_profile
from eamdeploy.cli.console import print_result
from eamdeploy.images.options import ImageOptions
from eamdeploy.images.source import read_class_names
from eamdeploy.profiling.timing import Schedule


def evaluate(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="EAM checkpoint or engine.")],
    images: ImageOptions,
    reference: Annotated[
        Path | None,
        typer.Option(help="Checkpoint or engine to agree with; a checkpoint's default is its own unfrozen model."),
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="The reference is a checkpoint: take its model with all attention live.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write the JSON here.")] = None,
    class_order: options.LabelOrder = None,
    class_names: options.LabelNames = None,
    threads: options.Threads = None,
    verify: options.Verify = True,
    check: options.CheckHere = True,
    as_json: options.AsJson = False,
) -> None:
    """Measure top-1 and top-5 where there are labels, and agreement and KL against a reference."""
    from eamdeploy.stages.evaluate import evaluate as run_evaluate

    options.require_outputs([output], [model])
    names = read_class_names(class_names)
    source = replace(images.source, class_order=class_order, class_names=names)
    with context.obj as terminal:
        result = run_evaluate(
            model,
            source,
            reference=reference,
            live=live,
            threads=threads,
            verify=verify,
            check=check,
            observer=terminal,
        )
    if output is not None:
        result.write(output)
    print_result(result, show.evaluation(result), as_json=as_json)


def profile(
    context: typer.Context,
    engines: Annotated[list[Path], typer.Argument(help="Engines, or any ONNX models.")],
    schedule: Schedule,
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
    from eamdeploy.stages.profile import Extras
    from eamdeploy.stages.profile import profile as run_profile

    options.require_outputs([output], engines)
    local, machines = options.parse_devices(device)
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
