"""The heat map of attention heads as a file of its own, PNG or SVG, by matplotlib.

`heat_svg` draws the same `HeatMap` on the page of a report.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from eamdeploy.artifacts.files import atomic_output
from eamdeploy.errors import ConfigError, MissingDependency
from eamdeploy.reporting.draw.snowflake import snowflake
from eamdeploy.reporting.records.heat_map import Head, HeatMap
from eamdeploy.reporting.records.score_scale import ColourScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar
    from matplotlib.figure import Figure

_Colour: TypeAlias = tuple[float, float, float, float]

_FORMATS = {".png": "png", ".svg": "svg"}
_COLORMAP = "viridis"  # even in lightness and safe for the common kinds of colour blindness

_INK, _MUTED, _LINE, _ICE, _DEEP = "#16202c", "#5c6b7a", "#dbe2ea", "#ffffff", "#0a2540"
_PNG_DPI = 160
# inches, the unit of everything placed below
_GRID_WIDTH, _CELL_WIDTHS, _CELL_HEIGHTS = 6.0, (0.3, 1.15), (0.3, 0.44)
_LABEL_MIN_WIDTH, _WIDE_WIDTH, _LABEL_MAX_CELLS = 0.45, 0.75, 256
_MIN_WIDTH, _CHARACTER_WIDTH, _MARGIN, _RIGHT, _BOTTOM, _GAP = 4.2, 0.078, 0.2, 1.05, 0.95, 0.035
_LEGEND_MARKS, _LEGEND_GAP = {"snowflake": 0.32, "bar": 0.52}, 3  # the gap is in characters


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
    """One head: the cell's centre and size in inches, its colour, None without a score, and the text in it, if any."""

    head: Head
    x: float
    y: float
    width: float
    height: float
    colour: _Colour | None
    text: str
    gid: str


def write_heat_map(drawn: HeatMap, path: Path) -> None:
    """`path` holds the heat map; the same map gives the same bytes.

    A head that is frozen whole has a snowflake, one of which rows or entries are frozen a bar of that length.
    Layers go from top to bottom. Where a layer has fewer heads than another, the rest of its row stays blank.

    Args:
        path: ends in `.png` or `.svg`.

    Raises:
        ConfigError: another suffix, or a file that can't be written; what was at `path` stays.
        MissingDependency: matplotlib is not installed.
    """
    file_format = _file_format(path)
    try:
        import matplotlib  # noqa: F401
    except ImportError as err:
        raise MissingDependency(
            "cannot draw the heat map: matplotlib is not installed", hint="Install the extra 'host'."
        ) from err
    with _default_style():
        figure = _compose(drawn)
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


@contextmanager
def _default_style() -> Iterator[None]:
    """Matplotlib's own defaults instead of the user's style, so that a picture looks the same everywhere."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "eamdeploy", "font.family": ["DejaVu Sans"], "text.color": _INK})
        yield


def _compose(drawn: HeatMap) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = _lay_out(drawn)
    colours = None if drawn.scale is None else _colours(drawn.scale)

    left = 0.62 + _CHARACTER_WIDTH * max(len(layer) for layer in grid.layers)
    width = max(left + grid.width + _RIGHT, _MIN_WIDTH, _MARGIN + _legend_width(drawn))
    title_lines = textwrap.wrap(drawn.title, int(width / 0.115)) or [""]
    subtitle_from_top = 0.26 + 0.24 * len(title_lines)
    height = subtitle_from_top + 0.34 + grid.height + _BOTTOM
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)

    axes = figure.add_axes((left / width, _BOTTOM / height, grid.width / width, grid.height / height))
    _draw_axes(axes, grid)
    for cell in _cells(drawn, grid, colours):
        _draw_cell(axes, cell)
    if colours is not None:
        bar_box = ((left + grid.width + 0.22) / width, _BOTTOM / height, 0.15 / width, grid.height / height)
        _draw_colour_bar(figure.colorbar(colours, cax=figure.add_axes(bar_box)), drawn)

    place = partial(figure.text, _MARGIN / width, va="top")
    place(1 - _MARGIN / height, "\n".join(title_lines), fontsize=13, fontweight="bold", linespacing=1.3)
    subtitle = f"{drawn.score} of {len(drawn.heads)} attention head{'s' if len(drawn.heads) > 1 else ''}"
    place(1 - subtitle_from_top / height, subtitle, fontsize=9.5, color=_MUTED)
    begin = min(left, max(width - _legend_width(drawn), _MARGIN))  # below the cells, or as far to the left as it needs
    box = (begin / width, 0, 1 - begin / width, 0.45 / height)
    legend = figure.add_axes(box, xlim=(0, width - begin), ylim=(0.45, 0))
    _draw_legend(legend, drawn)
    return figure


def _lay_out(drawn: HeatMap) -> _Grid:
    layers = tuple(name for name, _ in drawn.layers)
    cell_width = min(max(_GRID_WIDTH / drawn.columns, _CELL_WIDTHS[0]), _CELL_WIDTHS[1])
    labelled = cell_width >= _LABEL_MIN_WIDTH and drawn.columns * len(layers) <= _LABEL_MAX_CELLS
    return _Grid(layers, drawn.columns, cell_width, _CELL_HEIGHTS[labelled], labelled)


def _cells(drawn: HeatMap, grid: _Grid, colours: ScalarMappable | None) -> Iterator[_Cell]:
    for layer, (name, heads) in enumerate(drawn.layers):
        for index, head in enumerate(heads):
            yield _Cell(
                head,
                x=(index + 0.5) * grid.cell_width,
                y=(layer + 0.5) * grid.cell_height,
                width=grid.cell_width - _GAP,
                height=grid.cell_height - _GAP,
                colour=None if head.score is None or colours is None else _colour(head.score, colours),
                text=drawn.written(head.score) if grid.labelled and head.score is not None else "",
                gid=f"frozen:{name}:{index}",
            )


def _colours(scale: ColourScale) -> ScalarMappable:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    return ScalarMappable((LogNorm if scale.logarithmic else Normalize)(scale.low, scale.high), _COLORMAP)


def _colour(score: float, colours: ScalarMappable) -> _Colour:
    lowest, highest = colours.get_clim()
    inside = np.clip([score], lowest, highest)  # a logarithm has no colour for 0
    red, green, blue, alpha = colours.to_rgba(inside)[0].tolist()
    return red, green, blue, alpha


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
    _draw_box(axes, cell, inset=0, facecolor=cell.colour or "none", edgecolor="none" if cell.colour else _LINE)
    wide, mark = cell.width >= _WIDE_WIDTH, cell.head.mark
    x, y = cell.x, cell.y
    if mark == "bar" and cell.head.share is not None:
        _draw_bar(axes, x - 0.4 * cell.width, y + cell.height / 2 - 0.07, 0.8 * cell.width, cell.head.share, cell.gid)
        y -= 0.04
    elif mark == "snowflake" and not cell.text:
        _draw_snowflake(axes, x, y, 0.37 * min(cell.width, cell.height), cell.gid)
    elif mark == "snowflake" and wide:
        _draw_box(axes, cell, inset=0.03, facecolor="none", edgecolor=_ICE)
        _draw_snowflake(axes, x - 0.2 * cell.width, y, 0.13, cell.gid)
        x += 0.16 * cell.width
    elif mark == "snowflake":
        _draw_snowflake(axes, x, y - 0.075, 0.1, cell.gid)
        y += 0.12
    if cell.head.kind and cell.text:
        right, top = cell.x + 0.46 * cell.width, cell.y - 0.3 * cell.height
        label = axes.text(right, top, cell.head.kind, ha="right", va="center_baseline", fontsize=6)
        label.set_color(_text_colour(cell))
    if cell.colour is None:
        return
    size = 9 if wide else 7.5
    axes.text(x, y, cell.text, ha="center", va="center_baseline", fontsize=size, color=_text_colour(cell))


def _text_colour(cell: _Cell) -> str:
    """Dark on light cells, white on dark ones."""
    if cell.colour is None:
        return _INK
    red, green, blue, _ = cell.colour
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


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

    points = [point for stroke in snowflake(radius, complex(x, y)) for point in stroke]
    codes = [Outline.MOVETO, Outline.LINETO] * (len(points) // 2)
    outline = Outline([(point.real, point.imag) for point in points], codes)
    line_width = max(0.8, 11 * radius)
    flake = PathPatch(outline, fill=False, edgecolor=_ICE, linewidth=line_width, capstyle="round", gid=gid)
    flake.set_path_effects([withStroke(linewidth=line_width + 14 * radius, foreground=_DEEP)])
    axes.add_patch(flake).set_clip_on(False)


def _draw_colour_bar(bar: Colorbar, drawn: HeatMap) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 10**drawn.power:.4g}"))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.tick_params(labelsize=8.5, labelcolor=_INK, color=_MUTED)
    outline: Any = bar.outline  # older matplotlib annotates it as a dictionary's item
    outline.set_visible(False)
    label = f"{drawn.score} [{drawn.unit}]" if drawn.unit else drawn.score
    bar.set_label(label, fontsize=10, color=_MUTED)


def _draw_bar(axes: Axes, x: float, y: float, width: float, share: float, gid: str) -> None:
    """From the middle of its left end at (x, y): a track of that width, `share` of it filled."""
    from matplotlib.patches import Rectangle

    track = Rectangle((x, y - 0.03), width, 0.06, facecolor=_DEEP, edgecolor=_DEEP, linewidth=1.2)
    filled = Rectangle((x, y - 0.03), width * share, 0.06, facecolor=_ICE, edgecolor="none", gid=gid)
    for part in (track, filled):
        axes.add_patch(part).set_clip_on(False)


def _legend(drawn: HeatMap) -> list[tuple[Literal["snowflake", "bar"], str]]:
    """The marks of the picture, and what stands beside each."""
    found: list[tuple[Literal["snowflake", "bar"], str]] = [
        ("snowflake", drawn.snowflake_means),
        ("bar", drawn.bar_means),
    ]
    every = len(drawn.heads)
    return [(mark, f"{means}: {n} of {every} heads") for mark, means in found if (n := drawn.marked(mark))]


def _legend_width(drawn: HeatMap) -> float:
    return sum(_LEGEND_MARKS[mark] + _CHARACTER_WIDTH * (len(text) + _LEGEND_GAP) for mark, text in _legend(drawn))


def _draw_legend(axes: Axes, drawn: HeatMap) -> None:
    axes.axis("off")
    y, left = 0.22, 0.0
    for mark, text in _legend(drawn):
        if mark == "snowflake":
            _draw_snowflake(axes, left + 0.12, y, 0.11, "legend")
        else:
            _draw_bar(axes, left + 0.02, y, 0.4, 0.4, "legend-share")
        left += _LEGEND_MARKS[mark]
        axes.text(left, y, text, va="center_baseline", fontsize=9.5)
        left += _CHARACTER_WIDTH * (len(text) + _LEGEND_GAP)
    if not left:
        axes.text(0, y, "no head is frozen", va="center_baseline", fontsize=9.5, color=_MUTED)
