"""What each kind of frozen head costs and gains: the record, and the table of it for people."""

from __future__ import annotations

from pydantic import Field
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eamdeploy.artifacts.card import RANDOM_WARNING
from eamdeploy.artifacts.records import Record
from eamdeploy.devices.machine import Machine
from eamdeploy.profiling.timing import Latency, SpeedUp

_COLUMNS = (
    ("frozen to", "left"),
    ("recovery", "left"),
    ("form", "left"),
    ("heads", "left"),
    ("saved", "right"),
    ("agreement", "right"),
    ("KL", "right"),
    ("top-1", "right"),
    ("p50 ms", "right"),
    ("against plain", "right"),
    ("against stock", "right"),
)


class Row(Record):
    """One engine, or one checkpoint where nothing was timed.

    Attributes:
        kind: `stock` (torch's export), `nothing`, `plain` (whole maps), `rank R`, or `auto`.
        recovery: the method; None for none.
        form: of the model; only `--forms` has others than `as exported`.
        heads: how many heads are frozen to what, such as `{"whole": 5, "rank 4": 13}`.
        sparsity: frozen entries ÷ all entries, as reached.
        saved_percent: multiply-adds that the frozen heads save, of those of the model with nothing
            frozen, by `eam.kinds.HeadSize`.
        agreement, kl, top1: on the odd images against the unfrozen model: percent, nats, percent.
        against_plain, against_stock: time of the plain engine without recovery (in its fastest form
            where this one is), and of torch's export, ÷ this engine's time; None for those engines
            themselves, and where nothing was timed.
    """

    kind: str
    recovery: str | None = None
    form: str = "as exported"
    heads: dict[str, int] = Field(default_factory=dict)
    sparsity: float = 0.0
    saved_percent: float = 0.0
    agreement: float | None = None
    kl: float | None = None
    top1: float | None = None
    latency: Latency | None = None
    against_plain: SpeedUp | None = None
    against_stock: SpeedUp | None = None


class Kinds(Record):
    """All that was measured, and how.

    Attributes:
        weights: a file name, or `random`.
        calibration_images: even images that maps, scores and recovery saw.
        images: odd images that the accuracy is of.
        multiply_adds: of one image, with nothing frozen.
        timed: whether times were measured too; the threads and all below belong to them.
    """

    machine: Machine
    versions: dict[str, str]
    model: str
    weights: str
    sparsity_asked: float
    bits: int
    calibration_images: int
    images: int
    multiply_adds: int
    timed: bool
    threads: int
    batch: int
    fixed_batch: bool
    min_seconds: float
    sittings: int
    rows: list[Row]


def table(measured: Kinds) -> RenderableType:
    """One line for each row, with the caveats that belong to it."""
    shown = Table(title=_title(measured), title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name, side in _COLUMNS:
        shown.add_column(name, justify="right" if side == "right" else "left")
    for row in measured.rows:
        shown.add_row(*_cells(row))
    return Group(shown, *(Text(line, style="yellow") for line in _caveats(measured)))


def _title(measured: Kinds) -> str:
    times = f", {measured.threads} threads, batch {measured.batch}" if measured.timed else ""
    return (
        f"{measured.model} ({measured.weights}), sparsity {measured.sparsity_asked:g}, {measured.bits} bits; "
        f"{measured.calibration_images} images calibrate, {measured.images} measure; {measured.machine.cpu}{times}"
    )


def _cells(row: Row) -> list[str]:
    return [
        row.kind,
        row.recovery or "none",
        row.form,
        ", ".join(f"{count} {kind}" for kind, count in row.heads.items()),
        f"{row.saved_percent:.1f} %" if row.heads else "",
        _figure(row.agreement, ".1f", " %"),
        _figure(row.kl, ".4f"),
        _figure(row.top1, ".1f", " %"),
        _figure(None if row.latency is None else row.latency.p50_ms, ".2f"),
        _ratio(row.against_plain),
        _ratio(row.against_stock),
    ]


def _figure(value: float | None, style: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{style}}{unit}"


def _ratio(found: SpeedUp | None) -> str:
    return "" if found is None else f"{found.median:.3f}× ({found.low:.3f}–{found.high:.3f})"


def _caveats(measured: Kinds) -> list[str]:
    lines = [RANDOM_WARNING] if measured.weights == "random" else []
    unsteady = [row.latency for row in measured.rows if row.latency is not None and row.latency.warning is not None]
    if not unsteady:
        return lines
    worst = max(unsteady, key=lambda latency: latency.variation_percent)
    return [*lines, f"up to: {worst.warning}"]
