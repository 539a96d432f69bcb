"""The comparison for people: a table for each run, and a picture of agreement against latency."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from comparison import Against, Combination, ModelResult, Peers, Row, Timed
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eamdeploy.artifacts.card import RANDOM_WARNING
from eamdeploy.artifacts.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = ("engine", "p50 ms", "p90", "against stock (95 %)", "top-1", "agrees", "max |Δ|", "MB", "× floor", "note")
_OURS, _PEER, _INK = "#c2410c", "#4b6478", "#16202c"
_MARKERS = {"fp32": "o", "int8": "s"}
_LABEL_LIFTS = (9, 20, 31)  # points; labels of neighbours stand at different heights
_PANEL, _KEY = (4.3, 3.6), 2.7  # inches


def tables(result: Peers) -> RenderableType:
    """Every run's tables, with the caveats that belong to them."""
    parts: list[RenderableType] = []
    for model in result.models:
        for combination in model.combinations:
            parts += [_main_table(result, model, combination), _floor_line(combination), Text()]
            parts += [_rivals_table(model, combination), Text()]
        if model.weights == "random":
            parts += [Text(f"{model.model}: {RANDOM_WARNING}", style="yellow"), Text()]
    return Group(*parts)


def _main_table(result: Peers, model: ModelResult, combination: Combination) -> Table:
    reference = "" if model.reference_top1 is None else f", model in torch {model.reference_top1:.1f} % top-1"
    title = (
        f"{model.model} ({model.weights}), {combination.threads} threads, batch {combination.batch}; "
        f"{result.machine.cpu}; {model.images} images{reference}"
    )
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("engine", "note") else "right", no_wrap=name != "note")
    timed = {item.name: item for item in combination.timed}
    for row in model.rows:
        style = "bold" if row.family == "ours" else ""
        if row.skipped is not None:
            table.add_row(row.name, *[""] * (len(_COLUMNS) - 2), f"skipped: {row.skipped}", style="dim")
            continue
        table.add_row(*_cells(row, timed[row.name], combination.stock), style=style)
    return table


def _cells(row: Row, timed: Timed, stock: str) -> list[str]:
    latency = timed.latency
    return [
        row.name,
        f"{latency.p50_ms:.2f}",
        f"{latency.p90_ms:.2f}",
        "baseline" if row.name == stock else _ratio(timed.stock),
        _or_blank(row.top1, "{:.1f} %"),
        _or_blank(row.agreement, "{:.1f} %"),
        _or_blank(row.max_abs, "{:.2g}"),
        _or_blank(None if row.model_bytes is None else row.model_bytes / 1e6, "{:.1f}"),
        f"{timed.times_floor:.2f}",
        row.note,
    ]


def _floor_line(combination: Combination) -> Text:
    peaks = "; ".join(
        f"{peak.arithmetic.upper()} {peak.multiply_adds_per_s / 1e9:.0f} (at {' × '.join(map(str, peak.size))})"
        for peak in combination.peaks
    )
    return Text(f"Peak of products, thousand millions of multiply-adds a second: {peaks}")


def _rivals_table(model: ModelResult, combination: Combination) -> Table:
    """Our engines against those that decide whether they are worth it."""
    ours = {row.name for row in model.rows if row.family == "ours"}
    table = Table(title="Ours against", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("engine", "the best peer like it", "the best peer of all", "itself with nothing frozen"):
        table.add_column(name, no_wrap=True)
    for item in combination.timed:
        if item.name in ours:
            rivals = (item.like, item.best)
            named = ["" if rival is None else f"{_ratio(rival)} ({rival.name})" for rival in rivals]
            table.add_row(item.name, *named, _ratio(item.unfrozen))
    return table


def _ratio(against: Against | None) -> str:
    if against is None:
        return ""
    ratio = against.speed_up
    return f"{ratio.median:.3f}× ({ratio.low:.3f}–{ratio.high:.3f}) {ratio.verdict}"


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def draw(result: Peers, path: Path) -> None:
    """`path` (.png or .svg) shows agreement against latency, a panel for each run, two side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, max(len(model.combinations) for model in result.models))
    lines = [ceil(len(model.combinations) / columns) for model in result.models]
    width = columns * _PANEL[0] + _KEY
    figure = Figure(figsize=(width, sum(lines) * _PANEL[1]), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(sum(lines), columns + 1, width_ratios=[*[_PANEL[0]] * columns, _KEY])
    for index, model in enumerate(result.models):
        top = sum(lines[:index])
        for place, combination in enumerate(model.combinations):
            line, column = divmod(place, columns)
            axes = figure.add_subplot(grid[top + line, column])
            _draw_panel(axes, model, combination)
            axes.set_title(
                f"{model.model}\n{combination.threads} threads, batch {combination.batch}", fontsize=9, color=_INK
            )
            if column == 0:
                axes.set_ylabel("agreement with the FP32 model, %", fontsize=8)
        _draw_key(figure.add_subplot(grid[top, columns]), _run_rows(model))
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix("."), dpi=130)
    write_bytes(path, drawn.getvalue())


def _draw_panel(axes: Axes, model: ModelResult, combination: Combination) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    numbers = {row.name: number for number, row in enumerate(_run_rows(model), 1)}
    rows = {row.name: row for row in model.rows}
    for place, item in enumerate(sorted(combination.timed, key=lambda item: item.latency.p50_ms)):
        row, latency = rows[item.name], item.latency.p50_ms
        if row.agreement is None:
            continue
        axes.plot(latency, row.agreement, _MARKERS[row.arithmetic], color=_colour(row), markersize=6, zorder=3)
        axes.annotate(
            str(numbers[row.name]),
            (latency, row.agreement),
            xytext=(0, _LABEL_LIFTS[place % len(_LABEL_LIFTS)]),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=_colour(row),
            arrowprops={"arrowstyle": "-", "color": _colour(row), "linewidth": 0.4, "shrinkB": 3},
        )
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.35)
    axes.grid(which="both", linewidth=0.3, alpha=0.6)
    axes.set_xlabel("latency p50, ms (log)", fontsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_tick_params(labelsize=7, which="both")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= 100])
    axes.set_ylim(low, high)


def _draw_key(axes: Axes, rows: Sequence[Row]) -> None:
    axes.axis("off")
    for number, row in enumerate(rows, 1):
        height = 1 - number / (len(rows) + 3)
        axes.plot(0.03, height, _MARKERS[row.arithmetic], color=_colour(row), markersize=5)
        axes.text(0.09, height, f"{number}  {row.name}", fontsize=7.5, va="center", color=_colour(row))
    axes.text(0.0, 1 / (len(rows) + 3), "circle: FP32, square: INT8; orange: ours", fontsize=7, color=_INK)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)


def _run_rows(model: ModelResult) -> list[Row]:
    return [row for row in model.rows if row.skipped is None]


def _colour(row: Row) -> str:
    return _OURS if row.family == "ours" else _PEER
