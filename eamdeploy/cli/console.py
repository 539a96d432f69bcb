"""What a person sees while a command runs and after it: progress and notes on stderr, results on stdout."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from eamdeploy.artifacts.records import Record, printable


class Terminal:
    """Shows an `Observer`'s progress as bars, on a terminal only, and its notes as lines.

    Args:
        quiet: leave out notes and bars.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self._quiet = quiet
        self._tasks: dict[str, TaskID] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        hidden = quiet or not self._console.is_terminal
        self._bars = Progress(*columns, console=self._console, transient=True, disable=hidden)

    def progress(self, what: str, done: int, total: int) -> None:
        """The bar of `what` shows `done` of `total`."""
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def note(self, text: str) -> None:
        """`text` stands on a line of its own, above the bars."""
        if not self._quiet:
            self._console.print(printable(text))

    def __enter__(self) -> Terminal:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


def print_result(record: Record, shown: RenderableType, *, as_json: bool) -> None:
    """The record as one JSON document on stdout and `shown` on stderr, or without `as_json` only `shown`, on stdout."""
    # fixed width away from a terminal, so that a table in a file or a log is not folded at 80 columns
    width = None if Console(stderr=as_json).is_terminal else 160
    # names of files and classes may look like markup
    Console(stderr=as_json, highlight=False, markup=False, emoji=False, width=width).print(shown)
    if as_json:
        plain = Console(soft_wrap=True, highlight=False, markup=False, emoji=False, color_system=None)
        plain.print(record.model_dump_json(indent=2))
