"""How a command of ours ended, for tests of the command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

COMMANDS = (
    *("analyze", "freeze", "pack", "recover", "export", "lint", "build-ort", "build-trt", "evaluate"),
    *("profile", "report", "run", "inspect", "doctor"),
)


@dataclass(frozen=True)
class Outcome:
    """The exit code of a command and what it wrote."""

    code: int
    out: str
    err: str


RunCli = Callable[..., Outcome]
"""Runs `eamdeploy` with the given arguments in this process; the fixture `run_cli`."""


def only_error(outcome: Outcome, code: int) -> str:
    """The one line on stderr of a command that failed with that exit code and said nothing else."""
    assert (outcome.code, outcome.out) == (code, ""), outcome
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err), outcome.err
    return outcome.err
