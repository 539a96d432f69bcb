"""Which pictures the page has of a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from eamdeploy.reporting import numbers
from eamdeploy.reporting.draw import svg
from eamdeploy.reporting.draw.svg import Bar
from eamdeploy.reporting.records.measurements import Engine, Measurement

_Sized = tuple[Engine, float | None, float | None]  # an engine, what its bar is as long as, and a part of that


def pictures(measurement: Measurement) -> dict[str, str]:
    """SVG by what it shows; one that would be empty is an empty text."""
    files: list[_Sized] = [(each, each.sizes.file, None) for each in measurement.engines]
    peaks: list[_Sized] = [(each, each.sizes.peak, each.sizes.own) for each in measurement.engines]
    return {
        "latency": svg.latency_strips(measurement),
        "speed_up": svg.speed_up_intervals(measurement),
        "energy": svg.bars("Energy per image", _bars(map(_energy, measurement.engines), numbers.energy)),
        "power": svg.bars("Mean power", _bars(map(_power, measurement.engines), numbers.power)),
        "files": svg.bars("Size of the engine file", _bars(files, numbers.size)),
        "peaks": svg.bars("Peak memory of the process", _bars(peaks, numbers.size)),
    }


def _energy(engine: Engine) -> _Sized:
    used = engine.power
    if used is None:
        return engine, None, None
    return engine, used.energy_mj_per_image, max(used.energy_above_idle_mj_per_image or 0.0, 0.0)  # noise is not drawn


def _power(engine: Engine) -> _Sized:
    used = engine.power
    if used is None or used.mean_mw is None:
        return engine, None, None
    return engine, used.mean_mw, 0.0 if used.idle_mw is None else max(used.mean_mw - used.idle_mw, 0.0)


def _bars(sized: Iterable[_Sized], write: Callable[[float], str]) -> list[Bar]:
    """A bar for every engine of which the figure is known."""
    return [
        Bar(engine.name, value, part, write(value), engine.is_baseline)
        for engine, value, part in sized
        if value is not None
    ]
