"""`python -m eamdeploy.cli` is the command line too, where no script `eamdeploy` is installed."""

from __future__ import annotations

from eamdeploy.cli.app import main

main()
