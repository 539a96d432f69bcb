"""Commands that run, describe and diagnose: run, report, inspect, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eamdeploy.cli import options, show
from eamdeploy.cli.console import print_result


def run(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(help="TOML configuration, see docs/reference/configuration.md.")],
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


def report(
    files: Annotated[list[Path], typer.Argument(help="JSON of the other commands, run.json, EAM checkpoints.")],
    output: options.Output,
    markdown: Annotated[Path | None, typer.Option(help="Also write it as Markdown.")] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.", show_default="the models")] = None,
    verify: options.Verify = True,
    as_json: options.AsJson = False,
) -> None:
    """Show what was frozen, what it cost and what it gained, on one HTML page that needs no network."""
    from eamdeploy.stages.report import report as run_report

    result = run_report(files, output, markdown=markdown, title=title, verify=verify)
    print_result(result, show.report(result), as_json=as_json)


def inspect(
    file: Annotated[Path, typer.Argument(help="Checkpoint, ONNX model, engine, manifest, reference set or JSON.")],
    verify: options.Verify = True,
    as_json: options.AsJson = False,
) -> None:
    """Show what an artifact is and what it holds."""
    from eamdeploy.stages.inspect import inspect as run_inspect

    result = run_inspect(file, verify=verify)
    print_result(result, show.inspection(result), as_json=as_json)


def doctor(as_json: options.AsJson = False) -> None:
    """Show what this machine has, and what is missing for what."""
    from eamdeploy.stages.doctor import doctor as run_doctor

    result = run_doctor()
    print_result(result, show.doctor(result), as_json=as_json)
