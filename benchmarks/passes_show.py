"""What each pass is worth: the record, and the table of it for people."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eamdeploy.artifacts.card import RANDOM_WARNING
from eamdeploy.artifacts.records import Record
from eamdeploy.devices.machine import Machine
from eamdeploy.profiling.timing import Latency, SpeedUp

_COLUMNS = ("pass", "nodes", "multiply-adds, M", "p50 ms", "worth (95 % interval)", "verdict")


class Side(Record):
    """One engine.

    Attributes:
        nodes: of the ONNX file.
        multiply_adds: for one image; None where onnx can't infer the shapes.
    """

    nodes: int
    multiply_adds: int | None
    latency: Latency


class PassRow(Record):
    """One pass, or all.

    Attributes:
        absent: passes that neither side has, as they depend on this one.
        before, after: without it and with it.
        worth: time without it ÷ time with it; None where it changes nothing in this model.
    """

    name: str
    absent: list[str]
    before: Side
    after: Side
    worth: SpeedUp | None


class Passes(Record):
    """All that was measured, and how.

    Attributes:
        weights: a file name, or `random`.
        exporter: which of torch's exporters wrote the graph.
        fixed_batch: whether the model takes this batch size alone.
    """

    machine: Machine
    versions: dict[str, str]
    model: str
    weights: str
    sparsity: float
    exporter: str
    opset: int
    fixed_batch: bool
    threads: int
    batch: int
    min_seconds: float
    sittings: int
    rows: list[PassRow]


def table(measured: Passes) -> RenderableType:
    """One row for each pass, with the caveats that belong to it."""
    shown = Table(title=_title(measured), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, name in enumerate(_COLUMNS):
        shown.add_column(name, justify="right" if 0 < index < len(_COLUMNS) - 1 else "left", no_wrap=index > 0)
    for row in measured.rows:
        shown.add_row(*_cells(row), style="" if row.worth else "dim")
    return Group(shown, *(Text(line, style="yellow") for line in _caveats(measured)))


def markdown(measured: Passes) -> str:
    """The same table in Markdown."""
    lines = [_columns(_COLUMNS), _columns(["---"] * len(_COLUMNS)), *(_columns(_cells(row)) for row in measured.rows)]
    return "\n\n".join([_title(measured), "\n".join(lines), *_caveats(measured)]) + "\n"


def _columns(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _title(measured: Passes) -> str:
    batch = f"batch {measured.batch}{'' if measured.fixed_batch else ' of a dynamic one'}"
    return (
        f"{measured.model} ({measured.weights}), sparsity {measured.sparsity:g}, {measured.exporter} exporter, "
        f"opset {measured.opset}; {measured.machine.cpu}, {measured.threads} threads, {batch}"
    )


def _cells(row: PassRow) -> list[str]:
    name = f"{row.name}; neither has {', '.join(row.absent)}" if row.absent else row.name
    if row.worth is None:
        return [name, str(row.after.nodes), _millions(row.after), "", "", "changes nothing in this model"]
    worth = row.worth
    return [
        name,
        _from_to(str(row.before.nodes), str(row.after.nodes)),
        _from_to(_millions(row.before), _millions(row.after)),
        f"{row.before.latency.p50_ms:.2f} → {row.after.latency.p50_ms:.2f}",
        f"{worth.median:.3f}× ({worth.low:.3f}–{worth.high:.3f})",
        worth.verdict,
    ]


def _millions(side: Side) -> str:
    return "?" if side.multiply_adds is None else f"{side.multiply_adds / 1e6:.1f}"


def _from_to(before: str, after: str) -> str:
    return after if before == after else f"{before} → {after}"


def _caveats(measured: Passes) -> list[str]:
    lines = [RANDOM_WARNING] if measured.weights == "random" else []
    sides = [side.latency for row in measured.rows for side in (row.before, row.after)]
    worst = max(sides, key=lambda latency: latency.variation_percent)
    return lines if worst.warning is None else [*lines, f"up to: {worst.warning}"]
