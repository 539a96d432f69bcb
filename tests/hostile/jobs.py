"""What is asked of a worker and what it answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """The input of that number among those of its kind; the same seed gives the same bytes."""

    source: str
    index: int
    seed: int


@dataclass(frozen=True)
class Verdict:
    """What came of an input.

    Attributes:
        mutation: what was done to the good file.
        outcome: `right`, `other` (a foreign file that means something else now), or `refused: <error>`.
        finding: what should not have happened, in a few words; None where all is well.
        details: of a finding, e.g. the traceback.
        seconds: from the first byte read to the last thing printed; `extra_bytes`: memory above the good file's.
    """

    mutation: str
    outcome: str
    finding: str | None = None
    details: str = ""
    seconds: float = 0.0
    extra_bytes: int = 0
