"""The command line: every command parses its options, calls one stage and prints what the stage returns."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer
from rich.console import Console

from eamdeploy.artifacts.records import printable
from eamdeploy.cli import build, export, freeze, measure, options, overview, recover
from eamdeploy.cli.console import Terminal
from eamdeploy.cli.spread import spread
from eamdeploy.errors import EamDeployError

COMMANDS = (
    *(freeze.analyze, freeze.freeze, freeze.pack),
    recover.recover,
    *(export.export, export.lint),
    *(build.build_ort, build.build_trt),
    *(measure.evaluate, measure.profile),
    *(overview.report, overview.run, overview.inspect, overview.doctor),
)
"""In the order in which the help lists them."""

app = typer.Typer(
    name="eamdeploy",
    help="Deploy vision transformers with frozen attention maps (EAM) to edge boards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


for _command in COMMANDS:
    app.command()(spread(_command))


def main() -> None:
    """Run the command line: a user's error is one line with its exit code, a bug of ours a traceback."""
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
