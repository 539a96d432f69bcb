"""What can go wrong, and the exit code each kind of failure has.

An `EamDeployError` is the user's to mend: the command line prints its message in one line and no traceback. Anything
else that escapes is our bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import IntEnum

GET_CONVERSION = "pip install onnx onnx-graphsurgeon"
"""What a board converts models with; the rest of what the host has, torch above all, is not needed for that."""


_LONGEST = 1000  # characters of one part of a message


class ExitCode(IntEnum):
    """Process exit codes (docs/design.md, Command line)."""

    DONE = 0
    BUG = 1
    BAD_INPUT = 2
    GATE_FAILED = 3
    UNAVAILABLE = 4


class EamDeployError(Exception):
    """A failure described in four parts: what failed, where, expected and got, what to try.

    Args:
        what: what failed and where, as one clause without a final full stop.
        expected: what would have been right, if that can be said.
        got: what was found instead.
        hint: what the user can try.
    """

    exit_code = ExitCode.BAD_INPUT

    def __init__(self, what: str, *, expected: object = None, got: object = None, hint: str | None = None) -> None:
        parts = [_readable(what)]
        if expected is not None:
            parts.append(_readable(f"expected {expected}"))
        if got is not None:
            parts.append(_readable(f"got {got}"))
        message = "; ".join(parts)
        super().__init__(f"{message}. {hint}" if hint else message)


def _readable(text: str) -> str:
    """`text` without its middle where it is endless: libraries quote whole files, and files hold endless names."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 200]} … {text[-200:]}"


class ConfigError(EamDeployError):
    """An option, a configuration file or an input folder can't be used as given."""


class CheckpointError(EamDeployError):
    """A checkpoint, weights file or other artifact is damaged, foreign or contradicts itself."""


class UnsupportedGraph(EamDeployError):
    """A model or an ONNX graph has a structure that we refuse rather than get wrong."""


class ParityError(EamDeployError):
    """Two things that must compute the same do not, or an accuracy gate failed."""

    exit_code = ExitCode.GATE_FAILED


class EngineError(EamDeployError):
    """A backend refused to build, load or run an engine."""


class MissingDependency(EamDeployError):
    """A package that this command needs is not installed here."""

    exit_code = ExitCode.UNAVAILABLE


class DeviceError(EamDeployError):
    """The device asked for is not here, or can't do what was asked."""

    exit_code = ExitCode.UNAVAILABLE


@contextmanager
def host_packages(
    purpose: str, hint: str = "Install the host packages with: pip install 'eamdeploy[host]'."
) -> Iterator[None]:
    """Inside the block, importing a package that only the host has raises `MissingDependency` where it is missing."""
    try:
        yield
    except ModuleNotFoundError as err:
        if err.name is None or err.name.partition(".")[0] == "eamdeploy":
            raise
        raise MissingDependency(
            f"{purpose} needs the package {err.name}, which is not installed here",
            hint=hint,
        ) from err


def conversion_packages(purpose: str) -> AbstractContextManager[None]:
    """As `host_packages`, for what converts a model, which a board may have too."""
    return host_packages(purpose, f"Get it with: {GET_CONVERSION}")
