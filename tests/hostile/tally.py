"""What came of a campaign, counted by kind of file, as a table for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from hostile.jobs import Job, Verdict
from hostile.sources import SOURCES


@dataclass(frozen=True)
class Finding:
    """Something that should not have happened; `input` is the saved file."""

    source: str
    index: int
    seed: int
    mutation: str
    what: str
    details: str
    input: str


@dataclass
class Tally:
    """Counts by kind of file and outcome, and every finding."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    largest: tuple[int, str] = (0, "")

    def add(self, job: Job, verdict: Verdict) -> None:
        """Counts one input."""
        outcome = "finding" if verdict.finding else verdict.outcome
        self.counts.setdefault(job.source, Counter())[outcome] += 1
        where = f"{job.source} {job.index}, {verdict.mutation}"
        self.slowest = max(self.slowest, (verdict.seconds, where))
        self.largest = max(self.largest, (verdict.extra_bytes, where))

    @property
    def total(self) -> Counter[str]:
        return sum(self.counts.values(), Counter())

    def in_json(self) -> dict[str, object]:
        return {
            "total": dict(self.total),
            "sources": {name: dict(counter) for name, counter in self.counts.items()},
            "slowest_s": list(self.slowest),
            "largest_extra_bytes": list(self.largest),
            "findings": [vars(finding) for finding in self.findings],
        }

    def in_markdown(self) -> str:
        """A table, and a line for every kind of finding."""
        kinds = sorted(self.total, key=lambda kind: (kind.startswith("refused"), kind))
        head = ["file", "inputs", *kinds]
        rows = [
            [name, str(counter.total()), *(str(counter[kind] or "") for kind in kinds)]
            for name, counter in ordered(self.counts)
        ]
        rows.append(["all", str(self.total.total()), *(str(self.total[kind] or "") for kind in kinds)])
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        lines += ["", f"Slowest: {self.slowest[0]:.1f} s ({self.slowest[1]})."]
        lines += [f"Most memory above the good file's: {self.largest[0] >> 20} MiB ({self.largest[1]})."]
        groups = Counter((finding.source, finding.what) for finding in self.findings)
        for (source, what), count in groups.most_common():
            first = next(each for each in self.findings if (each.source, each.what) == (source, what))
            lines.append(f"FINDING ({count}): {source}: {what} ({first.mutation}; {first.input})")
        return "\n".join(lines)


def ordered(counts: Mapping[str, Counter[str]]) -> Iterable[tuple[str, Counter[str]]]:
    """In the order of the table of sources."""
    return ((name, counts[name]) for name in SOURCES if name in counts)
