"""A report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from importlib import metadata, resources

from eamdeploy.errors import host_packages
from eamdeploy.reporting.draw import heat_svg, svg
from eamdeploy.reporting.draw.pictures import pictures
from eamdeploy.reporting.write import measured_tables, tables
from eamdeploy.reporting.write.content import Content


def render(content: Content) -> str:
    """The page; the same content gives the same text. Whatever text of the records looks like markup is escaped.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    with host_packages("report"):
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    folder = resources.files("eamdeploy.reporting.write")
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        content=content,
        version=metadata.version("eamdeploy"),
        style=Markup(folder.joinpath("page.css").read_text(encoding="utf-8")),
        snowflake=Markup(heat_svg.snowflake_definition()),
        colours=range(heat_svg.COLOURS),
        is_broad=heat_svg.is_broad,
        heat_maps=[
            (drawn, Markup(heat_svg.heat_map(drawn)), heat_svg.score_range(drawn)) for drawn in content.heat_maps
        ],
        measurements=[
            (each, {name: Markup(drawn) for name, drawn in pictures(each).items()}) for each in content.measurements
        ],
        meter=lambda share: Markup(svg.meter(share)),
        tables=tables,
        measured=measured_tables,
    )
