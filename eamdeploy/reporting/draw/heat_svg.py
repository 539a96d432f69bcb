"""The heat map of attention heads as SVG in the page's own colours; see `svg` for how pictures are made.

`heat_file` draws the same `HeatMap` into a file of its own.
"""

from __future__ import annotations

import math
from html import escape

from eamdeploy.reporting import numbers
from eamdeploy.reporting.draw.snowflake import snowflake
from eamdeploy.reporting.records.heat_map import Head, HeatMap

COLOURS = 9
"""How many colours the page has for scores: the classes `s0` … `s8`, from low to high."""

_TOP, _ROW, _GAP = 24, 34, 4  # pixels: the numbers of heads; a layer; between layers
_GAP_SHARE = 0.06  # of a cell's width
_CHARACTER = 7.2  # pixels, an upper bound for the labels' size
_CLASSES = (4, 6, 8, 12, 16)  # heads in a layer up to which the style has a width below which cells hold no numbers
_BROAD = 8  # heads in a layer above which a map takes the page's whole width
_WIDEST = 92  # pixels of one cell
_LABELLED = 4  # every so many heads have their number where cells are narrow


def snowflake_definition() -> str:
    """The definition of the mark that `heat_map` uses; a page needs it once."""
    path = "".join(f"M{a.real:.2f} {a.imag:.2f}L{b.real:.2f} {b.imag:.2f}" for a, b in snowflake(radius=7))
    return (
        '<svg width="0" height="0" aria-hidden="true" focusable="false"><defs>'
        f'<path id="flake" d="{path}"/></defs></svg>'
    )


def heat_map(drawn: HeatMap) -> str:
    """Layers from top to bottom, heads from left to right, frozen ones with a ring and a snowflake, or their share."""
    columns = drawn.columns
    parts = [
        f'<text class="{"minor axis" if head % _LABELLED else "axis"}" x="{100 * (head + 0.5) / columns:.3f}%" y="12">'
        f"{head}</text>"
        for head in range(columns)
    ]
    for row, (name, heads) in enumerate(drawn.layers):
        top = _TOP + row * _ROW
        parts.append(f'<text class="layer" x="-10" y="{top + 19}">{escape(name)}</text>')
        parts += [_cell(drawn, f"{name}, head {i}", head, i, top) for i, head in enumerate(heads)]
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
    return drawn.columns > _BROAD


def score_range(drawn: HeatMap) -> tuple[str, str, str] | None:
    """The lowest and highest score as the cells' numbers are written, and what follows them; None without scores."""
    scale = drawn.scale
    if scale is None:
        return None
    low, high = drawn.written(min(drawn.scores)), drawn.written(max(drawn.scores))
    in_units = f"{'× ' if drawn.power else ''}{drawn.unit}"
    return low, high, in_units + (", logarithmic" if scale.logarithmic else "")


def _cell(drawn: HeatMap, name: str, head: Head, column: int, top: float) -> str:
    width, scale = 100 / drawn.columns, drawn.scale
    left, middle = width * (column + _GAP_SHARE / 2), width * (column + 0.5)
    colour, text = "none", ""
    if head.score is not None and scale is not None:
        colour = f"s{min(int(COLOURS * scale.position(head.score)), COLOURS - 1)}"
        text = drawn.written(head.score)
    told = f"{name}: {'no score' if head.score is None else f'{head.score:.4g}'}{_told(head)}"
    parts = [
        f"<title>{escape(told)}</title>",
        f'<rect x="{left:.3f}%" y="{top}" width="{width * (1 - _GAP_SHARE):.3f}%" height="{_ROW - _GAP}" rx="5"/>',
        f'<text class="score" x="{middle:.3f}%" y="{top + 19}">{escape(text)}</text>',
    ]
    if head.mark == "snowflake":
        parts.append(f'<use href="#flake" x="{middle:.3f}%" y="{top + 15}"/>')
        if head.kind:
            right = left + width * (1 - 2 * _GAP_SHARE)
            parts.append(f'<text class="rank" x="{right:.3f}%" y="{top + 11}">{head.kind}</text>')
    elif head.mark == "bar":
        inner = width * 0.8
        place = f'x="{middle - inner / 2:.3f}%" y="{top + _ROW - _GAP - 7}" height="4"'
        parts.append(f'<rect class="track" {place} width="{inner:.3f}%"/>')
        parts.append(f'<rect class="share" {place} width="{inner * (head.share or 0):.3f}%"/>')
    state = "some" if head.share is None else head.frozen
    return f'<g class="cell {colour} {state}">{"".join(parts)}</g>'


def _told(head: Head) -> str:
    if head.frozen == "part":
        return ", frozen in part" if head.share is None else f", {numbers.share(head.share)} frozen"
    if head.rank is not None:
        return f", frozen with rank {head.rank}"
    return ", frozen" if head.frozen == "whole" else ""
