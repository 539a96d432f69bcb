"""What TensorRT says while it builds or loads: kept for messages, written to a file, passed on to Python's logging.

TensorRT calls the logger from C++: an exception must never leave it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from eamdeploy.errors import ConfigError

_LOGGER = logging.getLogger("eamdeploy.tensorrt")
_LOGGER.addHandler(logging.NullHandler())  # without -v nothing goes to the terminal, warnings neither
_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
}
_KEPT_ERRORS = 3
# 8.6.0 said these as errors from the second build with a cache on, and built: they are no reason for a failure.
_CACHE_ERRORS = ("myelinCache.h::deserializeFromBuffer", "The timing cache will not be used!")
_SHOWN_CHARACTERS = 300


class BuildLog:
    """Messages of one builder or runtime.

    Args:
        path: file that gets every message from INFO up, as they come; None for no file.

    Attributes:
        errors: the last error messages, oldest first, but for those about a timing cache.
        cache_refused: whether TensorRT said that it goes on without the timing cache.

    Raises:
        ConfigError: the file can't be made.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.errors: deque[str] = deque(maxlen=_KEPT_ERRORS)
        self.cache_refused = False
        self._file: IO[str] | None = None
        if path is not None:
            try:
                self._file = path.open("w", encoding="utf-8", buffering=1)  # a killed build leaves what it said
            except OSError as err:
                raise ConfigError(f"cannot write {path}: {err.strerror or err}") from err

    def add(self, severity: str, message: str) -> None:
        """Notes one message; `severity` is TensorRT's name for it."""
        level = _LEVELS.get(severity, logging.INFO)
        if any(text in message for text in _CACHE_ERRORS):
            self.cache_refused = True
        elif level >= logging.ERROR:
            self.errors.append(message)
        if self._file is not None and level >= logging.INFO:
            try:
                self._file.write(f"[{severity}] {message}\n")
            except OSError:  # a full disk ends the log, not the build
                self._file = None
        _LOGGER.log(level, "%s", message)

    def last_errors(self) -> str:
        """The last errors in one line."""
        return " | ".join(" ".join(error.split())[:_SHOWN_CHARACTERS] for error in self.errors) or "it gave no reason"

    def close(self) -> None:
        """The file is closed; a second call does nothing."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def __enter__(self) -> BuildLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_logger(trt: Any, log: BuildLog) -> Any:
    """A logger for TensorRT's objects that hands everything to `log`; keep it alive as long as they live."""
    base = trt.ILogger
    names = {getattr(base, name): name for name in _LEVELS}

    class Logger(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(names.get(severity, "INFO"), message)

    return Logger()


def node_named(message: str, nodes: Sequence[tuple[str, str]]) -> str | None:
    """The node of the model that the message names, as "operator name"; the longest name if several fit.

    Args:
        nodes: operator and name of every node.
    """
    named = [(name, operator) for operator, name in nodes if name and name in message]
    if not named:
        return None
    name, operator = max(named, key=lambda item: len(item[0]))
    return f"{operator} {name}"
