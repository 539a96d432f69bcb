"""An observer that keeps what it is told."""

from __future__ import annotations


class Notebook:
    """Notes as they came, and every step of progress by what it was of."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: dict[str, list[tuple[int, int]]] = {}

    def progress(self, what: str, done: int, total: int) -> None:
        self.steps.setdefault(what, []).append((done, total))

    def note(self, text: str) -> None:
        self.notes.append(text)
