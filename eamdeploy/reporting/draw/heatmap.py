"""A picture of a score for every attention head, layers × heads, with what is frozen of them marked."""

from __future__ import annotations

import cmath
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from eamdeploy.artifacts.files import atomic_output
from eamdeploy.errors import ConfigError, MissingDependency
from eamdeploy.reporting.records.scale import ColourScale, colour_scale, exponent, layer_names, short_number, unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

_Colour: TypeAlias = tuple[float, float, float, float]

_FORMATS = {".png": "png", ".svg": "svg"}
_COLORMAP = "viridis"  # even in lightness and safe for the common kinds of colour blindness

_INK, _MUTED, _ICE, _DEEP = "#16202c", "#5c6b7a", "#ffffff", "#0a2540"
_PNG_DPI = 160
# inches, the unit of everything placed below
_GRID_WIDTH, _CELL_WIDTHS, _CELL_HEIGHTS = 6.0, (0.3, 1.15), (0.3, 0.44)
_LABEL_MIN_WIDTH, _WIDE_WIDTH, _LABEL_MAX_CELLS = 0.45, 0.75, 256
_MIN_WIDTH, _CHARACTER_WIDTH, _RIGHT, _BOTTOM, _GAP = 4.2, 0.078, 1.05, 0.95, 0.035
_LEGEND_WIDTH = 4.8
# a snowflake's arm as strokes from point to point: the real axis runs outwards, the tip is at 1
_ARM = ((0, 1), (0.52, 0.82 + 0.3j), (0.52, 0.82 - 0.3j))


@dataclass(frozen=True)
class _Grid:
    """Rows and columns of cells; sizes in inches, the origin at the top left and y downwards."""

    layers: tuple[str, ...]
    heads: int
    cell_width: float
    cell_height: float
    labelled: bool

    @property
    def width(self) -> float:
        return self.heads * self.cell_width

    @property
    def height(self) -> float:
        return len(self.layers) * self.cell_height


@dataclass(frozen=True)
class _Cell:
    """One head: the cell's centre and size in inches, its colour, the text in it, if any, and the frozen share."""

    x: float
    y: float
    width: float
    height: float
    colour: _Colour
    text: str
    gid: str
    share: float

    @property
    def whole(self) -> bool:
        return self.share == 1

    @property
    def partial(self) -> bool:
        return 0 < self.share < 1


def draw_heatmap(
    scores: Mapping[str, Sequence[float]],
    *,
    score_name: str,
    frozen: Mapping[str, Sequence[int]],
    shares: Mapping[str, Sequence[float]] | None = None,
    title: str,
    path: Path,
) -> None:
    """`path` holds the heat map of `scores` with what is frozen; the same input gives the same bytes.

    A head that is frozen whole has a snowflake, one of which rows or entries are frozen a bar of that length.
    Layers go from top to bottom in the mapping's order. They may have different numbers of heads; what a layer does
    not have stays blank. The colours are logarithmic where the largest score is over 10 times the median.

    Args:
        scores: one value per head of every attention module, by module path.
        score_name: what the values are; the names of `vocabulary.Score` also give the colour bar's unit.
        frozen: frozen head indices by module path; a module without frozen heads may be absent.
        shares: for each of these heads the frozen share of its entries, in (0, 1]; by default all are frozen whole.
        path: ends in `.png` or `.svg`.

    Raises:
        ConfigError: another suffix, no scores, a score that is not finite, a frozen head without a score, a share
            outside (0, 1] or without a head, or a file that can't be written; what was at `path` stays.
        MissingDependency: matplotlib is not installed.
    """
    file_format = _file_format(path)
    _check(scores, frozen)
    frozen_shares = _frozen_shares(frozen, shares)
    try:
        import matplotlib  # noqa: F401
    except ImportError as err:
        raise MissingDependency(
            "cannot draw the heat map: matplotlib is not installed", hint="Install the extra 'host'."
        ) from err
    with _default_style():
        figure = _compose(scores, score_name, frozen_shares, title)
        with atomic_output(path) as file:
            metadata = {"Date": None} if file_format == "svg" else {"Software": None}
            figure.savefig(file, format=file_format, dpi=_PNG_DPI, metadata=metadata)


def _file_format(path: Path) -> str:
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(
            f"cannot draw the heat map to {path}",
            expected=f"a name ending in {' or '.join(_FORMATS)}",
            got=repr(path.suffix),
        )
    return _FORMATS[path.suffix.lower()]


def _check(scores: Mapping[str, Sequence[float]], frozen: Mapping[str, Sequence[int]]) -> None:
    if not any(len(values) for values in scores.values()):
        raise ConfigError("cannot draw a heat map", expected="a score for at least one attention head", got="none")
    for module, values in scores.items():
        for head, value in enumerate(values):
            if not math.isfinite(value):
                raise ConfigError(f"score of head {head} of {module}", expected="a finite number", got=value)
    for module, heads in frozen.items():
        count = len(scores.get(module, ()))
        for head in heads:
            if not 0 <= head < count:
                raise ConfigError(
                    f"frozen head {head} of {module} has no score",
                    expected=f"a head below {count}" if count else f"a module among {', '.join(scores)}",
                )


def _frozen_shares(
    frozen: Mapping[str, Sequence[int]], shares: Mapping[str, Sequence[float]] | None
) -> dict[tuple[str, int], float]:
    """The frozen share by module path and head."""
    if shares is None:
        return {(module, head): 1.0 for module, heads in frozen.items() for head in heads}
    for module, heads in frozen.items():
        given = shares.get(module, ())
        if len(given) != len(heads) or not all(0 < share <= 1 for share in given):
            raise ConfigError(
                f"frozen shares of {module}", expected=f"{len(heads)} numbers in (0, 1]", got=[*map(float, given)]
            )
    return {
        (module, head): float(share)
        for module, heads in frozen.items()
        for head, share in zip(heads, shares[module], strict=True)
    }


@contextmanager
def _default_style() -> Iterator[None]:
    """Matplotlib's own defaults instead of the user's style, so that a picture looks the same everywhere."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "eamdeploy", "font.family": ["DejaVu Sans"], "text.color": _INK})
        yield


def _compose(
    scores: Mapping[str, Sequence[float]], score_name: str, frozen: Mapping[tuple[str, int], float], title: str
) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = _lay_out(scores)
    everything = [value for values in scores.values() for value in values]
    scale, power = _colours(colour_scale(everything)), exponent(max(map(abs, everything)))
    cells = _cells(grid, scores, frozen, scale, power)

    left = 0.62 + _CHARACTER_WIDTH * max(len(layer) for layer in grid.layers)
    legend_width = left + _LEGEND_WIDTH if any(cell.partial for cell in cells) else 0
    width = max(left + grid.width + _RIGHT, _MIN_WIDTH, legend_width)
    title_lines = textwrap.wrap(title, int(width / 0.115)) or [""]
    subtitle_from_top = 0.26 + 0.24 * len(title_lines)
    height = subtitle_from_top + 0.34 + grid.height + _BOTTOM
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)

    axes = figure.add_axes((left / width, _BOTTOM / height, grid.width / width, grid.height / height))
    _draw_axes(axes, grid)
    for cell in cells:
        _draw_cell(axes, cell)
    bar_box = ((left + grid.width + 0.22) / width, _BOTTOM / height, 0.15 / width, grid.height / height)
    _draw_colour_bar(figure.colorbar(scale, cax=figure.add_axes(bar_box)), score_name, power)

    place = partial(figure.text, 0.2 / width, va="top")
    place(1 - 0.2 / height, "\n".join(title_lines), fontsize=13, fontweight="bold", linespacing=1.3)
    subtitle = f"{score_name} of {len(everything)} attention head{'s' if len(everything) > 1 else ''}"
    place(1 - subtitle_from_top / height, subtitle, fontsize=9.5, color=_MUTED)
    legend = figure.add_axes((left / width, 0, 1 - left / width, 0.45 / height), xlim=(0, width - left), ylim=(0.45, 0))
    _draw_legend(legend, cells)
    return figure


def _lay_out(scores: Mapping[str, Sequence[float]]) -> _Grid:
    layers = layer_names(scores)
    heads = max(len(values) for values in scores.values())
    cell_width = min(max(_GRID_WIDTH / heads, _CELL_WIDTHS[0]), _CELL_WIDTHS[1])
    labelled = cell_width >= _LABEL_MIN_WIDTH and heads * len(layers) <= _LABEL_MAX_CELLS
    return _Grid(layers, heads, cell_width, _CELL_HEIGHTS[labelled], labelled)


def _cells(
    grid: _Grid,
    scores: Mapping[str, Sequence[float]],
    frozen: Mapping[tuple[str, int], float],
    scale: ScalarMappable,
    power: int,
) -> list[_Cell]:
    lowest, highest = scale.get_clim()
    return [
        _Cell(
            x=(head + 0.5) * grid.cell_width,
            y=(layer + 0.5) * grid.cell_height,
            width=grid.cell_width - _GAP,
            height=grid.cell_height - _GAP,
            # clipped because a logarithm has no colour for 0
            colour=tuple(scale.to_rgba(np.clip([value], lowest, highest))[0].tolist()),
            text=short_number(value / 10**power) if grid.labelled else "",
            gid=f"frozen:{module}:{head}",
            share=frozen.get((module, head), 0.0),
        )
        for layer, (module, values) in enumerate(scores.items())
        for head, value in enumerate(values)
    ]


def _colours(scale: ColourScale) -> ScalarMappable:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    return ScalarMappable((LogNorm if scale.logarithmic else Normalize)(scale.low, scale.high), _COLORMAP)


def _draw_axes(axes: Axes, grid: _Grid) -> None:
    axes.set(xlim=(0, grid.width), ylim=(grid.height, 0))
    axes.set_xticks([(head + 0.5) * grid.cell_width for head in range(grid.heads)], [*map(str, range(grid.heads))])
    axes.set_yticks([(layer + 0.5) * grid.cell_height for layer in range(len(grid.layers))], grid.layers)
    axes.tick_params(length=0, labelsize=9, labelcolor=_INK, pad=4)
    axes.set_xlabel("head", fontsize=10, color=_MUTED, labelpad=4)
    axes.set_ylabel("layer", fontsize=10, color=_MUTED, labelpad=6)
    axes.spines[:].set_visible(False)
    axes.patch.set_visible(False)


def _draw_cell(axes: Axes, cell: _Cell) -> None:
    _draw_box(axes, cell, inset=0, facecolor=cell.colour, edgecolor="none")
    wide = cell.width >= _WIDE_WIDTH
    x, y = cell.x, cell.y
    if cell.partial:
        _draw_bar(axes, x - 0.4 * cell.width, y + cell.height / 2 - 0.07, 0.8 * cell.width, cell.share, cell.gid)
        y -= 0.04
    elif cell.whole and not cell.text:
        _draw_snowflake(axes, x, y, 0.37 * min(cell.width, cell.height), cell.gid)
    elif cell.whole and wide:
        _draw_box(axes, cell, inset=0.03, facecolor="none", edgecolor=_ICE)
        _draw_snowflake(axes, x - 0.2 * cell.width, y, 0.13, cell.gid)
        x += 0.16 * cell.width
    elif cell.whole:
        _draw_snowflake(axes, x, y - 0.075, 0.1, cell.gid)
        y += 0.12
    red, green, blue, _ = cell.colour
    dark_text = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
    colour = _INK if dark_text else "white"
    axes.text(x, y, cell.text, ha="center", va="center_baseline", fontsize=9 if wide else 7.5, color=colour)


def _draw_box(axes: Axes, cell: _Cell, *, inset: float, facecolor: _Colour | str, edgecolor: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    width, height = cell.width - 2 * inset, cell.height - 2 * inset
    style = f"round,pad=0,rounding_size={0.05 - inset / 2}"
    corner = (cell.x - width / 2, cell.y - height / 2)
    box = FancyBboxPatch(corner, width, height, style, facecolor=facecolor, edgecolor=edgecolor, linewidth=1.6)
    axes.add_patch(box).set_clip_on(False)


def _draw_snowflake(axes: Axes, x: float, y: float, radius: float, gid: str) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline
    from matplotlib.patheffects import withStroke

    turns = [cmath.rect(radius, math.radians(60 * arm + 30)) for arm in range(6)]
    points = [complex(x, y) + turn * point for turn in turns for stroke in _ARM for point in stroke]
    codes = [Outline.MOVETO, Outline.LINETO] * (len(points) // 2)
    outline = Outline([(point.real, point.imag) for point in points], codes)
    line_width = max(0.8, 11 * radius)
    flake = PathPatch(outline, fill=False, edgecolor=_ICE, linewidth=line_width, capstyle="round", gid=gid)
    flake.set_path_effects([withStroke(linewidth=line_width + 14 * radius, foreground=_DEEP)])
    axes.add_patch(flake).set_clip_on(False)


def _draw_colour_bar(bar: Colorbar, score_name: str, power: int) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**power:.4g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.tick_params(labelsize=8.5, labelcolor=_INK, color=_MUTED)
    outline: Any = bar.outline  # older matplotlib annotates it as a dictionary's item
    outline.set_visible(False)
    in_units = unit(score_name, power)
    bar.set_label(f"{score_name} [{in_units}]" if in_units else score_name, fontsize=10, color=_MUTED)


def _draw_bar(axes: Axes, x: float, y: float, width: float, share: float, gid: str) -> None:
    """From the middle of its left end at (x, y): a track of that width, `share` of it filled."""
    from matplotlib.patches import Rectangle

    track = Rectangle((x, y - 0.03), width, 0.06, facecolor=_DEEP, edgecolor=_DEEP, linewidth=1.2)
    filled = Rectangle((x, y - 0.03), width * share, 0.06, facecolor=_ICE, edgecolor="none", gid=gid)
    for part in (track, filled):
        axes.add_patch(part).set_clip_on(False)


def _draw_legend(axes: Axes, cells: Sequence[_Cell]) -> None:
    axes.axis("off")
    whole, partial = sum(cell.whole for cell in cells), sum(cell.partial for cell in cells)
    y, left = 0.22, 0.0
    if whole:
        _draw_snowflake(axes, 0.12, y, 0.11, "legend")
        axes.text(0.32, y, f"frozen: {whole} of {len(cells)} heads", va="center_baseline", fontsize=9.5)
        left = 0.32 + _CHARACTER_WIDTH * 25
    if partial:
        _draw_bar(axes, left + 0.02, y, 0.4, 0.4, "legend-share")
        text = f"frozen share of {partial} head{'s' if partial > 1 else ''}"
        axes.text(left + 0.52, y, text, va="center_baseline", fontsize=9.5)
    if not whole and not partial:
        axes.text(0, y, "no head is frozen", va="center_baseline", fontsize=9.5, color=_MUTED)
