"""The tables of a report as text, the same on the page and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.reporting import numbers
from eamdeploy.reporting.records.builds import Build
from eamdeploy.reporting.records.exports import Exported
from eamdeploy.reporting.records.layers import LayerTimes

NONE: Final = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under column names.

    Attributes:
        texts: the first columns are words, as many as this; the rest are numbers.
        title: what it shows; empty where a heading says it.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    title: str = ""

    def without_empty(self) -> Table:
        """The same without columns of numbers in which nothing is recorded, or without rows if there is no other."""
        kept = [
            index
            for index in range(len(self.columns))
            if index < self.texts or any(row[index] != NONE for row in self.rows)
        ]
        rows = tuple(tuple(row[index] for index in kept) for row in self.rows) if len(kept) > self.texts else ()
        return replace(self, columns=tuple(self.columns[index] for index in kept), rows=rows)


def accuracy(reports: Sequence[EvaluationReport], names: Mapping[str, str]) -> Table:
    """Every evaluation, the model beside its reference."""
    columns = ("model", "reference", "images", "top-1", "reference", "change", "top-5", "reference")
    rows = [
        (
            names[each.model],
            NONE if each.reference is None else names[each.reference],
            f"{numbers.count(each.n_images)} of {each.images}",
            *_pair(each.top1, each.reference_top1),
            NONE
            if each.top1 is None or each.reference_top1 is None
            else numbers.difference(each.top1, each.reference_top1),
            *_pair(each.top5, each.reference_top5),
            _percent(each.agreement),
            NONE if each.kl is None else numbers.significant(max(each.kl, 0.0)),
            NONE if each.max_abs_logit_diff is None else numbers.significant(each.max_abs_logit_diff),
        )
        for each in reports
    ]
    return Table((*columns, "agreement", "KL, nats", "max |Δ logit|"), tuple(rows), texts=3).without_empty()


def layers(times: LayerTimes) -> Table:
    """The slowest layers with their share of all that were timed."""
    total = times.total_ms
    rows = [(name, numbers.milliseconds(ms), numbers.share(ms / total if total else 0)) for name, ms in times.slowest]
    return Table(("layer", "mean time", "share"), tuple(rows))


def frozen_maps(build: Build) -> Table:
    """What became of every frozen map."""
    rows = [(name, layer or "in no layer of its own", kind or NONE) for name, layer, kind in build.frozen_maps]
    return Table(("frozen map", "layer", "type there"), tuple(rows), texts=3)


def exports(exported: Sequence[Exported]) -> Table:
    """Every ONNX model that was written."""
    rows = []
    for each in exported:
        rows.append((each.model, each.graph, numbers.size(each.bytes)))
        if each.twin is not None and each.twin_bytes is not None:
            rows.append((each.twin, each.twin_graph or "", numbers.size(each.twin_bytes)))
    return Table(("model", "graph", "file"), tuple(rows), texts=2)


def versions(by_source: Mapping[str, Mapping[str, str]]) -> Table:
    """Versions by package and by what they belong to; sources with the same ones share a column."""
    same: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for source, found in by_source.items():
        same.setdefault(tuple(sorted(found.items())), []).append(source)
    packages = sorted({name for found in same for name, _ in found})
    columns = tuple(", ".join(sources) for sources in same.values()) if len(same) > 1 else ("version",) * len(same)
    rows = tuple((name, *(dict(found).get(name, NONE) for found in same)) for name in packages)
    return Table(("package", *columns), rows, texts=1 + len(columns))


def _pair(model: float | None, reference: float | None) -> tuple[str, str]:
    return _percent(model), _percent(reference)


def _percent(value: float | None) -> str:
    return NONE if value is None else numbers.percent(value)
