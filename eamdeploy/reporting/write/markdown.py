"""A report as Markdown with tables, for places that show no HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from eamdeploy.reporting.records.answers import Answers
from eamdeploy.reporting.records.heat_map import Head, HeatMap
from eamdeploy.reporting.records.machines import Facts
from eamdeploy.reporting.records.measurements import Measurement
from eamdeploy.reporting.write import measured_tables, tables
from eamdeploy.reporting.write.content import Content
from eamdeploy.reporting.write.tables import Table

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~$&])")


def write_markdown(content: Content) -> str:
    """The report; the same content gives the same text. Text of the records is never taken for markup."""
    blocks = [f"# {_plain(content.title)}", *_glance(content), *_figures(content), *_origin(content)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _glance(content: Content) -> Iterator[str]:
    for each in content.answers:
        if len(content.answers) > 1 or each.title != content.title:
            yield f"## {_plain(each.title)}"
        yield _answers(each)
    if content.caveats:
        yield "## Before you rely on these figures"
        yield _list(content.caveats)


def _figures(content: Content) -> Iterator[str]:
    if content.heat_maps:
        yield "## Attention heads"
        yield from map(_heads, content.heat_maps)
    if content.accuracy:
        yield "## Accuracy and agreement"
        yield _table(content.accuracy)
    for each in content.measurements:
        yield f"## Measured on {_plain(each.place)}"
        yield f"{_plain(each.conditions)}."
        for shown in _measured(each):
            yield f"### {_plain(shown.title)}"
            yield _table(shown)
    for times in content.layers:
        yield f"## The slowest {len(times.slowest)} of {times.timed} layers of {_plain(times.engine)}"
        yield f"Timed {_plain(times.occasion)}."
        yield _table(tables.layers(times))
    for build in content.builds:
        if build.frozen_maps:
            yield f"## What became of the frozen maps in {_plain(build.name)}"
            yield _table(tables.frozen_maps(build))


def _measured(measurement: Measurement) -> list[Table]:
    makers = (measured_tables.timing, measured_tables.power, measured_tables.memory)
    return [shown for make in makers for shown in make(measurement)]


def _origin(content: Content) -> Iterator[str]:
    if content.exports:
        yield "## Exported models"
        yield _table(content.exports)
    for build in content.builds:
        yield f"## How {_plain(build.name)} was made"
        yield _facts((("runtime", build.runtime), ("manifest", build.file), *build.facts))
    for measurement in content.measurements:
        yield f"## Machine of {_plain(measurement.source)}"
        yield _facts(measurement.machine)
    if content.versions.rows:
        yield "## Versions"
        yield _table(content.versions)
    if content.commands:
        yield "## To reproduce it"
        yield "Reconstructed from the files as far as they tell. Words in capitals are yours to fill in."
    for command in content.commands:
        yield _code(command.text)
        missing = f" Not recorded there: {_plain(command.unknown)}." if command.unknown else ""
        yield f"From {_plain(command.file)}.{missing}"
    yield "## What this was made of"
    yield _list(f"{file} ({kind})" for file, kind in content.files)


def _answers(answers: Answers) -> str:
    lines = []
    for panel in answers.panels:
        if not panel.figures:
            lines.append(f"- **{panel.question}**: {_plain(panel.missing)}")
        for figure in panel.figures:
            verdict = f" ({figure.verdict})" if figure.verdict else ""
            details = "".join(f"; {_plain(line)}" for line in figure.details)
            value = f"**{_plain(figure.value)}**{verdict} {_plain(figure.label)}"
            lines.append(f"- **{panel.question}**: {value}{details}")
    return "\n".join(lines)


def _heads(drawn: HeatMap) -> str:
    rows = [(name, *map(_head, heads), *[""] * (drawn.columns - len(heads))) for name, heads in drawn.layers]
    frozen = "would be frozen" if drawn.planned else "is frozen"
    caption = f"{_plain(drawn.title)}: {drawn.score} of every head; ❄ {frozen}, with the share where it is not all."
    if any(head.kind for head in drawn.heads):
        caption += " r4: with rank 4, and so on."
    return f"{caption}\n\n{_table(Table(('layer', *map(str, range(drawn.columns))), tuple(rows)))}"


def _head(head: Head) -> str:
    score = "–" if head.score is None else f"{head.score:.3g}"
    share = f" {head.share:.0%}" if head.mark == "bar" else ""
    kind = f" {head.kind}" if head.kind else ""
    return score if head.mark == "nothing" else f"{score} ❄{share}{kind}"


def _table(shown: Table) -> str:
    rule = [":--" if index < shown.texts else "--:" for index in range(len(shown.columns))]
    lines = [[_plain(name) for name in shown.columns], rule, *([_plain(text) for text in row] for row in shown.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _facts(pairs: Facts) -> str:
    return _list(f"{name}: {value}" for name, value in pairs)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_plain(line)}" for line in lines)


def _code(text: str) -> str:
    """A fenced block; the fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}sh\n{text}\n{fence}"


def _plain(text: str) -> str:
    """`text` on one line, its marks escaped."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
