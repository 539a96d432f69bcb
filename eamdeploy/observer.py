"""How long-running stages tell what they are doing, without printing."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Receives what a stage has to say; the command line shows it, a library user may ignore it."""

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total` units of `what` are finished."""
        ...

    def note(self, text: str) -> None:
        """Something a person should know: a skipped file, an estimate of time, a caveat."""
        ...


class Silent:
    """An observer that does nothing."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Nothing happens."""

    def note(self, text: str) -> None:
        """Nothing happens."""


SILENT = Silent()
