"""The command that makes up for freezing: recover."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from eamdeploy.cli import options, show
from eamdeploy.cli.console import print_result
from eamdeploy.eam.recovery import RecoverOptions
from eamdeploy.errors import host_packages
from eamdeploy.images.options import ImageOptions


def recover(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="EAM checkpoint, as freeze or pack wrote it.")],
    images: ImageOptions,
    output: options.Output,
    settings: RecoverOptions,
    verify: options.Verify = True,
    as_json: options.AsJson = False,
) -> None:
    """Bring a frozen model closer to its unfrozen self with images that need no labels; write an EAM checkpoint."""
    with host_packages("recover"):
        from eamdeploy.stages.recover import recover as run_recover
    with context.obj as terminal:
        header = run_recover(checkpoint, images.source, output, settings, verify=verify, observer=terminal)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts several, of which the first one speaks
        print_result(header, show.recovery(header), as_json=as_json)
