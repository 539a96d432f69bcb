"""Pictures for the page, as SVG that takes its colours from the page's style sheet.

Places across are percentages and places down are pixels, so that a picture fills any width and its text keeps its size.
All text is escaped here. To a screen reader every picture is one image with what it says as its label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from eamdeploy.profiling.timing import Latency, SpeedUp
from eamdeploy.reporting import numbers
from eamdeploy.reporting.records.measurements import Measurement

_LABEL_Y, _MARK_Y, _ROW, _AXIS = 15, 33, 50, 26  # pixels: in a row its words and its mark; a row; the axis
_BAR_HEIGHT, _DOT = 12, 3.5  # the dot's radius
_MAX_INTERVALS = 4
_STEPS = (1, 2, 2.5, 5, 10)
_FINEST, _NOTHING = 1e-6, 1e-12  # how narrow an axis may be, compared with its values and at all
_MOST_CHARACTERS = 38  # beside a value, on a phone


@dataclass(frozen=True)
class Bar:
    """A bar.

    Attributes:
        part: how much of `value` has the stronger colour; None for all of it.
        text: the value as it is written.
        is_baseline: it is what others are compared with.
    """

    name: str
    value: float
    part: float | None
    text: str
    is_baseline: bool


def latency_strips(measurement: Measurement) -> str:
    """Where each engine's times lie, from p5 to p99, on one axis from 0."""
    engines = measurement.engines
    ticks = axis_ticks(0, max(engine.times.p99_ms for engine in engines))
    rows = [
        _row(
            index,
            engine.name,
            numbers.milliseconds(engine.times.p50_ms),
            _strip(index, engine.times, ticks[-1]),
            is_baseline=engine.is_baseline,
        )
        for index, engine in enumerate(engines)
    ]
    told = "; ".join(f"{each.name} {numbers.milliseconds(each.times.p50_ms)}" for each in engines)
    axis = _axis(ticks, len(rows), " ms")
    return _picture(f"Time of one inference, p50: {told}", len(rows) * _ROW + _AXIS, [axis, *rows])


def speed_up_intervals(measurement: Measurement) -> str:
    """Each engine's speed-up with its interval, beside a line at 1, the baseline's speed; empty if there is none."""
    ratios = [(engine.name, engine.speed_up) for engine in measurement.engines if engine.speed_up is not None]
    if not ratios:
        return ""
    ticks = axis_ticks(min(1.0, *(each.low for _, each in ratios)), max(1.0, *(each.high for _, each in ratios)))
    rows = [
        _row(index, name, numbers.ratio(each.median), _interval(index, each, ticks))
        for index, (name, each) in enumerate(ratios)
    ]
    told = "; ".join(f"{name} {numbers.ratio(each.median)}, {each.verdict}" for name, each in ratios)
    one = _line(_percent(1, ticks), 0, len(rows) * _ROW, "one")
    axis = _axis(ticks, len(rows), "×")
    return _picture(f"Speed-up: {told}", len(rows) * _ROW + _AXIS, [axis, one, *rows])


def bars(what: str, items: Sequence[Bar]) -> str:
    """The bars on one scale from 0, each with its name and its value; empty if there are none."""
    if not items:
        return ""
    longest = max(item.value for item in items) or 1
    rows = [
        _row(index, item.name, item.text, _bar(index, item, longest), is_baseline=item.is_baseline)
        for index, item in enumerate(items)
    ]
    told = "; ".join(f"{item.name} {item.text}" for item in items)
    return _picture(f"{what}: {told}", len(rows) * _ROW - 4, rows)


def meter(share: float) -> str:
    """A bar of that share, in [0, 1], of the width; a number beside it says the same."""
    bar = f'<rect class="bar" width="{100 * share:.3f}%" height="10"/>'
    return f'<svg aria-hidden="true" width="100%" height="10">{bar}</svg>'


def axis_ticks(low: float, high: float) -> list[float]:
    """Round numbers at equal distances, the first at most `low` and the last at least `high`; at least two."""
    width = max(high - low, _FINEST * max(abs(low), abs(high)))
    width = width if width > _NOTHING else 1.0
    power = 10.0 ** math.floor(math.log10(width / _MAX_INTERVALS))
    step = next(power * each for each in _STEPS if power * each * _MAX_INTERVALS >= width * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, max(last, first + 1) + 1)]


def _picture(label: str, height: float, parts: Iterable[str]) -> str:
    drawn = "".join(parts)
    return f'<svg role="img" aria-label="{escape(label)}" width="100%" height="{height:g}">{drawn}</svg>'


def _row(index: int, name: str, value: str, mark: str, *, is_baseline: bool = False) -> str:
    """A line of words with the mark below it."""
    y = index * _ROW + _LABEL_Y
    return (
        f'<g class="{"base" if is_baseline else "main"}"><text x="0" y="{y}">{escape(_shortened(name))}</text>'
        f'<text class="value" x="100%" y="{y}">{escape(value)}</text>{mark}</g>'
    )


def _shortened(name: str) -> str:
    """`name`, without its middle where it is too long."""
    half = _MOST_CHARACTERS // 2
    return name if len(name) <= _MOST_CHARACTERS else f"{name[: half - 1]}…{name[-half:]}"


def _axis(ticks: Sequence[float], n_rows: int, unit: str) -> str:
    bottom = n_rows * _ROW
    digits = len(f"{ticks[1] - ticks[0]:.9g}".partition(".")[2])
    parts = []
    for index, value in enumerate(ticks):
        across = _percent(value, ticks)
        anchor = "start" if index == 0 else "end" if index == len(ticks) - 1 else "middle"
        text = f"{value:.{digits}f}{unit}"
        parts.append(_line(across, 0, bottom, "grid"))
        parts.append(f'<text x="{across}" y="{bottom + 18}" text-anchor="{anchor}">{escape(text)}</text>')
    return f'<g class="axis">{"".join(parts)}</g>'


def _strip(index: int, times: Latency, end: float) -> str:
    y, ticks = index * _ROW + _MARK_Y, (0.0, end)
    marks = {
        "p5": times.p5_ms,
        "p25": times.p25_ms,
        "p50": times.p50_ms,
        "p75": times.p75_ms,
        "p95": times.p95_ms,
        "p99": times.p99_ms,
    }
    told = ", ".join(f"{name} {numbers.milliseconds(ms)}" for name, ms in marks.items())
    parts = [
        f"<title>{escape(told)}</title>",
        _box(times.p5_ms, times.p95_ms, y, 2, "whisker", ticks),
        _box(times.p25_ms, times.p75_ms, y, _BAR_HEIGHT, "box", ticks),
        _line(_percent(times.p50_ms, ticks), y - 9, y + 9, "median"),
        f'<circle class="dot" cx="{_percent(times.p99_ms, ticks)}" cy="{y:g}" r="{_DOT:g}"/>',
    ]
    return f"<g>{''.join(parts)}</g>"


def _interval(index: int, ratio: SpeedUp, ticks: Sequence[float]) -> str:
    y = index * _ROW + _MARK_Y
    told = f"{numbers.interval(ratio.low, ratio.high)}: {ratio.verdict}"
    box = _box(ratio.low, ratio.high, y, _BAR_HEIGHT, "box", ticks)
    return f"<g><title>{escape(told)}</title>{box}{_line(_percent(ratio.median, ticks), y - 9, y + 9, 'median')}</g>"


def _bar(index: int, item: Bar, longest: float) -> str:
    y, ticks = index * _ROW + _MARK_Y - 3, (0.0, longest)
    whole = _box(0, item.value, y, _BAR_HEIGHT, "bar" if item.part is None else "box", ticks)
    return whole if item.part is None else whole + _box(0, item.part, y, _BAR_HEIGHT, "bar", ticks)


def _box(low: float, high: float, y: float, height: float, kind: str, ticks: Sequence[float]) -> str:
    start, width = _percent(low, ticks), _percent(ticks[0] + high - low, ticks)
    return f'<rect class="{kind}" x="{start}" y="{y - height / 2:g}" width="{width}" height="{height:g}"/>'


def _line(across: str, top: float, bottom: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{across}" x2="{across}" y1="{top:g}" y2="{bottom:g}"/>'


def _percent(value: float, ticks: Sequence[float]) -> str:
    return f"{100 * (value - ticks[0]) / (ticks[-1] - ticks[0]):.3f}%"
