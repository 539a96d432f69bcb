"""The tables of what was measured on one machine, each engine a row; the same on the page and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from eamdeploy.profiling.power import Power
from eamdeploy.reporting import numbers
from eamdeploy.reporting.records.measurements import Engine, Measurement
from eamdeploy.reporting.write.tables import NONE, Table


def timing(measurement: Measurement) -> list[Table]:
    """Everything about time, as far as it was measured; latency always."""
    makers = (_latency, _speed_ups, _split, _throughput, _cold_start)
    return _filled(make(measurement) for make in makers)


def power(measurement: Measurement) -> list[Table]:
    """Power and energy; empty where no sensor was read."""
    return _filled((_power(measurement), _by_name(measurement, "Mean power by rail", _rails)))


def memory(measurement: Measurement) -> list[Table]:
    """Bytes of every engine; empty where none was recorded."""
    peaks = _by_name(measurement, "Most memory in use on the device, by all programs", _peaks)
    return _filled((_sizes(measurement), peaks))


def _filled(found: Iterable[Table]) -> list[Table]:
    return [table for table in found if table.rows]


def _latency(measurement: Measurement) -> Table:
    spread = ("fastest", "p5", "p25", "p75", "p90", "p95", "p99")
    rows = []
    for each in measurement.engines:
        at = each.times
        marks = (at.p50_ms, at.mean_ms, at.min_ms, at.p5_ms, at.p25_ms, at.p75_ms, at.p90_ms, at.p95_ms, at.p99_ms)
        figures = (
            numbers.rate(at.throughput_images_per_s),
            numbers.percent(at.variation_percent),
            numbers.count(at.runs),
        )
        rows.append((each.name, f"{each.what}, on {each.runtime}", *map(numbers.significant, marks), *figures))
    columns = ("engine", "model", "p50", "mean", *spread, "images/s", "variation", "runs")
    return Table(columns, tuple(rows), texts=2, title="Time of one inference, in milliseconds")


def _speed_ups(measurement: Measurement) -> Table:
    rows = [
        (
            each.name,
            ratio.verdict,
            numbers.ratio(ratio.median),
            numbers.between(ratio.low, ratio.high),
            numbers.between(ratio.p25, ratio.p75),
            numbers.between(ratio.p5, ratio.p95),
            numbers.count(ratio.rounds),
            numbers.count(ratio.sittings),
        )
        for each in measurement.engines
        if (ratio := each.speed_up) is not None
    ]
    spread = ("p25 – p75 of rounds", "p5 – p95", "rounds", "sittings")
    columns = ("engine", "verdict", "speed-up", "95 % interval", *spread)
    return Table(columns, tuple(rows), texts=2, title="Speed against the baseline")


def _split(measurement: Measurement) -> Table:
    rows = [
        (
            each.name,
            "yes, with the copies" if split.cuda_graph else "no",
            NONE if split.cuda_graph else numbers.milliseconds(split.copy_in_ms),
            numbers.milliseconds(split.compute_ms),
            NONE if split.cuda_graph else numbers.milliseconds(split.copy_out_ms),
            numbers.milliseconds(split.enqueue_ms),
            numbers.count(split.runs),
        )
        for each in measurement.engines
        if (split := each.split) is not None
    ]
    columns = ("engine", "CUDA graph", "copy in", "compute", "copy out", "enqueue, on the processor", "runs")
    return Table(columns, tuple(rows), texts=2, title="Where the time goes on the GPU (medians)")


def _throughput(measurement: Measurement) -> Table:
    rows = [
        (
            each.name,
            str(found.streams),
            numbers.rate(found.images_per_s),
            numbers.rate(each.times.throughput_images_per_s),
            numbers.milliseconds(found.latency_p50_ms),
            numbers.milliseconds(found.latency_p99_ms),
            numbers.count(found.images),
            f"{numbers.significant(found.seconds)} s",
        )
        for each in measurement.engines
        if (found := each.throughput) is not None
    ]
    columns = ("engine", "streams", "images/s", "with one stream", "p50 meanwhile", "p99", "images", "measured for")
    return Table(columns, tuple(rows), title="Throughput with several inferences at once")


def _cold_start(measurement: Measurement) -> Table:
    rows = [
        (each.name, *map(numbers.milliseconds, (start.import_ms, start.load_ms, start.first_inference_ms)))
        for each in measurement.engines
        if (start := each.cold_start) is not None
    ]
    columns = ("engine", "Python and runtime", "load the engine", "first inference")
    return Table(columns, tuple(rows), title="Cold start of a fresh process")


def _power(measurement: Measurement) -> Table:
    rows = [
        (
            each.name,
            f"{' + '.join(used.total_rails) or 'not known'} ({used.source})",
            _written(used.idle_mw, numbers.power),
            _written(used.mean_mw, numbers.power),
            _written(used.energy_mj_per_image, numbers.energy),
            _written(used.energy_above_idle_mj_per_image, numbers.energy),
            numbers.rate(used.images_per_s),
            f"{numbers.significant(used.seconds)} s",
            numbers.count(used.samples),
            numbers.count(used.skipped),
        )
        for each in measurement.engines
        if (used := each.power) is not None
    ]
    energy = ("energy per image", "above idle", "images/s", "measured for")
    columns = ("engine", "rails of the total", "idle", "mean", *energy, "samples", "skipped")
    return Table(columns, tuple(rows), texts=2, title="Draw of the whole device").without_empty()


def _by_name(measurement: Measurement, title: str, figures: Callable[[Power], Mapping[str, str]]) -> Table:
    """A column for everything that a sensor names."""
    found = [(each.name, figures(each.power)) for each in measurement.engines if each.power is not None]
    columns = tuple(dict.fromkeys(name for _, its in found for name in its))
    rows = [(engine, *(its.get(column, NONE) for column in columns)) for engine, its in found if columns]
    return Table(("engine", *columns), tuple(rows), title=title)


def _rails(used: Power) -> dict[str, str]:
    return {rail: numbers.power(milliwatts) for rail, milliwatts in used.rails_mw.items()}


def _peaks(used: Power) -> dict[str, str]:
    return {name: numbers.size(n_bytes) for name, n_bytes in used.memory_peak_bytes.items()}


def _sizes(measurement: Measurement) -> Table:
    rows = [(each.name, *(_written(n_bytes, numbers.size) for n_bytes in _bytes(each))) for each in measurement.engines]
    resident = ("peak RSS", "of which the engine’s", "RSS at the end", "PSS")
    device = ("on the GPU", "less available to all", "NvMap of all programs")
    return Table(("engine", "file", *resident, *device), tuple(rows), title="Sizes").without_empty()


def _bytes(engine: Engine) -> tuple[int | None, ...]:
    sizes = engine.sizes
    return (sizes.file, sizes.peak, sizes.own, sizes.rss, sizes.pss, sizes.device, sizes.drop, sizes.nvmap)


def _written(value: float | None, write: Callable[[float], str]) -> str:
    return NONE if value is None else write(value)
