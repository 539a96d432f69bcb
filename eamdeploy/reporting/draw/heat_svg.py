"""The heat map of attention heads as SVG in the page's own colours; see `svg` for how pictures are made."""

from __future__ import annotations

import cmath
import math
from html import escape

from eamdeploy.reporting import numbers
from eamdeploy.reporting.records.heat import Head, HeatMap
from eamdeploy.reporting.records.scale import ColourScale, colour_scale, exponent, short_number, unit

COLOURS = 9
"""How many colours the page has for scores: the classes `s0` … `s8`, from low to high."""

_TOP, _ROW, _GAP = 24, 34, 4  # pixels: the numbers of heads; a layer; between layers
_GAP_SHARE = 0.06  # of a cell's width
_CHARACTER = 7.2  # pixels, an upper bound for the labels' size
_CLASSES = (4, 6, 8, 12, 16)  # heads in a layer up to which the style has a width below which cells hold no numbers
_BROAD = 8  # heads in a layer above which a map takes the page's whole width
_WIDEST = 92  # pixels of one cell
_LABELLED = 4  # every so many heads have their number where cells are narrow
# a snowflake's arm as strokes from point to point: the real axis runs outwards, the tip is at 1
_ARM = ((0, 1), (0.52, 0.82 + 0.3j), (0.52, 0.82 - 0.3j))


def snowflake() -> str:
    """The definition of the mark that `heat_map` uses; a page needs it once."""
    turns = [cmath.rect(7, math.radians(60 * arm + 30)) for arm in range(6)]
    strokes = [[turn * point for point in stroke] for turn in turns for stroke in _ARM]
    path = "".join(f"M{a.real:.2f} {a.imag:.2f}L{b.real:.2f} {b.imag:.2f}" for a, b in strokes)
    return (
        '<svg width="0" height="0" aria-hidden="true" focusable="false"><defs>'
        f'<path id="flake" d="{path}"/></defs></svg>'
    )


def heat_map(drawn: HeatMap) -> str:
    """Layers from top to bottom, heads from left to right, frozen ones with a ring and a snowflake, or their share."""
    scores = [head.score for head in drawn.heads if head.score is not None]
    scale = colour_scale(scores) if scores else None
    power = exponent(max(map(abs, scores))) if scores else 0
    columns = max(len(heads) for _, heads in drawn.layers)
    parts = [
        f'<text class="{"minor axis" if head % _LABELLED else "axis"}" x="{100 * (head + 0.5) / columns:.3f}%" y="12">'
        f"{head}</text>"
        for head in range(columns)
    ]
    for row, (name, heads) in enumerate(drawn.layers):
        top = _TOP + row * _ROW
        parts.append(f'<text class="layer" x="-10" y="{top + 19}">{escape(name)}</text>')
        parts += [_cell(f"{name}, head {i}", head, i, columns, top, scale, power) for i, head in enumerate(heads)]
    frozen = sum(head.frozen != "nothing" for head in drawn.heads)
    label = f"{drawn.score} of {len(drawn.heads)} attention heads of {drawn.title}, {frozen} of them marked as frozen"
    gutter = math.ceil(12 + _CHARACTER * max(len(name) for name, _ in drawn.layers))
    kind = next((f"upto{most}" for most in _CLASSES if columns <= most), "many")
    return (
        f'<svg class="heat {kind}" role="img" aria-label="{escape(label)}" height="{_TOP + len(drawn.layers) * _ROW}" '
        f'style="--gutter:{gutter}px;--widest:{columns * _WIDEST}px">{"".join(parts)}</svg>'
    )


def is_broad(drawn: HeatMap) -> bool:
    """Whether the map wants the page's whole width."""
    return max(len(heads) for _, heads in drawn.layers) > _BROAD


def score_range(drawn: HeatMap) -> tuple[str, str, str] | None:
    """The lowest and highest score as the cells' numbers are written, and what follows them; None without scores."""
    scores = [head.score for head in drawn.heads if head.score is not None]
    if not scores:
        return None
    power = exponent(max(map(abs, scores)))
    low, high = (short_number(value / 10**power) for value in (min(scores), max(scores)))
    in_units = f"{'× ' if power else ''}{unit(drawn.score, power)}"
    return low, high, in_units + (", logarithmic" if colour_scale(scores).logarithmic else "")


def _cell(name: str, head: Head, column: int, columns: int, top: float, scale: ColourScale | None, power: int) -> str:
    width = 100 / columns
    left, middle = width * (column + _GAP_SHARE / 2), width * (column + 0.5)
    colour, text = "none", ""
    if head.score is not None and scale is not None:
        colour = f"s{min(int(COLOURS * scale.position(head.score)), COLOURS - 1)}"
        text = short_number(head.score / 10**power)
    told = f"{name}: {'no score' if head.score is None else f'{head.score:.4g}'}{_told(head)}"
    parts = [
        f"<title>{escape(told)}</title>",
        f'<rect x="{left:.3f}%" y="{top}" width="{width * (1 - _GAP_SHARE):.3f}%" height="{_ROW - _GAP}" rx="5"/>',
        f'<text class="score" x="{middle:.3f}%" y="{top + 19}">{escape(text)}</text>',
    ]
    state = "some" if head.share is None else head.frozen
    if state in ("whole", "some"):
        parts.append(f'<use href="#flake" x="{middle:.3f}%" y="{top + 15}"/>')
    elif head.share:
        inner = width * 0.8
        place = f'x="{middle - inner / 2:.3f}%" y="{top + _ROW - _GAP - 7}" height="4"'
        parts.append(f'<rect class="track" {place} width="{inner:.3f}%"/>')
        parts.append(f'<rect class="share" {place} width="{inner * head.share:.3f}%"/>')
    return f'<g class="cell {colour} {state}">{"".join(parts)}</g>'


def _told(head: Head) -> str:
    if head.frozen == "part":
        return ", frozen in part" if head.share is None else f", {numbers.share(head.share)} frozen"
    return ", frozen" if head.frozen == "whole" else ""
