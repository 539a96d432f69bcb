"""A report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from importlib import metadata, resources

from eamdeploy.errors import host_packages
from eamdeploy.reporting import heat_svg, svg, tables
from eamdeploy.reporting.content import Content
from eamdeploy.reporting.figures import Engine, Measurement
from eamdeploy.reporting.numbers import size
from eamdeploy.reporting.svg import Bar


def render(content: Content) -> str:
    """The page; the same content gives the same text. Whatever text of the records looks like markup is escaped.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    with host_packages("report"):
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = resources.files("eamdeploy.reporting")
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        content=content,
        version=metadata.version("eamdeploy"),
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        snowflake=Markup(heat_svg.snowflake()),
        colours=range(heat_svg.COLOURS),
        heat_maps=[
            (drawn, Markup(heat_svg.heat_map(drawn)), heat_svg.score_range(drawn)) for drawn in content.heat_maps
        ],
        measurements=[
            (each, {name: Markup(drawn) for name, drawn in _drawn(each).items()}) for each in content.measurements
        ],
        meter=lambda share: Markup(svg.meter(share)),
        tables=tables,
    )


def _drawn(measurement: Measurement) -> dict[str, str]:
    """The pictures of a measurement by what they show; one that would be empty is an empty text."""
    engines = measurement.engines
    files = [_size_bar(engine, engine.room.file) for engine in engines]
    peaks = [_size_bar(engine, engine.room.peak, engine.room.own) for engine in engines]
    return {
        "latency": svg.latency_strips(measurement),
        "speed_up": svg.speed_up_intervals(measurement),
        "files": svg.bars("Size of the engine file", [bar for bar in files if bar]) if any(files) else "",
        "peaks": svg.bars("Peak memory of the process", [bar for bar in peaks if bar]) if any(peaks) else "",
    }


def _size_bar(engine: Engine, n_bytes: int | None, part: int | None = None) -> Bar | None:
    if n_bytes is None:
        return None
    return Bar(engine.name, n_bytes, part, size(n_bytes), engine.is_baseline)
