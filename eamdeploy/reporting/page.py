"""A report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable
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
        is_broad=heat_svg.is_broad,
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
    files = [(engine, engine.room.file, None) for engine in measurement.engines]
    peaks = [(engine, engine.room.peak, engine.room.own) for engine in measurement.engines]
    return {
        "latency": svg.latency_strips(measurement),
        "speed_up": svg.speed_up_intervals(measurement),
        "files": svg.bars("Size of the engine file", _bars(files)),
        "peaks": svg.bars("Peak memory of the process", _bars(peaks)),
    }


def _bars(sizes: Iterable[tuple[Engine, int | None, int | None]]) -> list[Bar]:
    """A bar for every engine of which the bytes are known, and a part of it where that is known too."""
    return [
        Bar(engine.name, n_bytes, part, size(n_bytes), engine.is_baseline)
        for engine, n_bytes, part in sizes
        if n_bytes is not None
    ]
