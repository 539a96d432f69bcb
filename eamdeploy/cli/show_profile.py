"""The tables of a profile, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eamdeploy.artifacts.card import RANDOM_WARNING
from eamdeploy.devices.base import DeviceState
from eamdeploy.records.profile import EngineProfile, Profile

SLOWEST = 10
"""How many layers are shown of those that were timed."""


def profile(measured: Profile) -> RenderableType:
    """Latency, memory, power and size of every engine, with the caveats that belong to them."""
    everyone = [*([measured.baseline] if measured.baseline else []), *measured.engines]
    machine = measured.machine
    title = (
        f"{_device_in_words(measured.device_before)}{machine.cpu}, {measured.threads} threads, batch {measured.batch}"
    )
    parts: list[RenderableType] = [
        _table(
            title,
            ("engine", "p50 ms", "mean", "p90", "p99", "images/s", "speed-up (95 % interval)", "memory MB", "file MB"),
            [_profile_row(item, item is measured.baseline) for item in everyone],
        )
    ]
    details = [(name, rows) for name, rows in _details(everyone).items() if rows]
    parts += [_table(name, columns, rows) for (name, columns), rows in details]
    return Group(*parts, *(Text(line, style="yellow") for line in _caveats(measured, everyone)))


def machines(profiles: Mapping[str, Profile]) -> RenderableType:
    """The tables of every machine under its name."""
    return Group(
        *(part for name, measured in profiles.items() for part in (Text(name, style="bold"), profile(measured)))
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The first column is names, the others are figures."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _device_in_words(state: DeviceState) -> str:
    """The board or GPU with its versions and power mode, and a comma; nothing for a processor, named anyway."""
    if state.kind == "cpu":
        return ""
    versions = [f"{name} {version}" for name, version in state.software.items()]
    mode = [f"power mode {state.power_mode}"] if state.power_mode else []
    locked = {True: ["clocks locked"], False: ["clocks not locked"], None: []}[state.clocks_locked]
    return ", ".join([state.name, *versions, *mode, *locked, ""])


def _profile_row(item: EngineProfile, is_baseline: bool) -> list[str]:
    latency, memory = item.latency, item.memory
    figures = (latency.p50_ms, latency.mean_ms, latency.p90_ms, latency.p99_ms)
    ratio = "baseline" if is_baseline else ""
    if item.speed_up is not None:
        speed = item.speed_up
        ratio = f"{speed.median:.3f}× ({speed.low:.3f}–{speed.high:.3f}) {speed.verdict}"
    return [
        item.engine if item.provider in (None, "cpu") else f"{item.engine} ({item.provider})",
        *(f"{figure:.2f}" for figure in figures),
        f"{latency.throughput_images_per_s:.1f}",
        ratio,
        "" if memory is None else f"{memory.peak_rss_bytes / 1e6:.0f}",
        "" if memory is None else f"{memory.engine_bytes / 1e6:.2f}",
    ]


def _details(everyone: list[EngineProfile]) -> dict[tuple[str, tuple[str, ...]], list[list[str]]]:
    """Rows of the smaller tables by title and columns; those without rows are not shown."""
    cold, split, streams, power, layers = [], [], [], [], []
    for item in everyone:
        name = item.engine
        if item.cold_start is not None:
            start = item.cold_start
            cold.append([name, *(f"{ms:.0f}" for ms in (start.import_ms, start.load_ms, start.first_inference_ms))])
        if item.split is not None:
            parts = item.split
            times = (parts.copy_in_ms, parts.compute_ms, parts.copy_out_ms, parts.enqueue_ms)
            on_device = item.memory.device_memory_bytes if item.memory else None
            split.append([name, *(f"{ms:.3f}" for ms in times), "" if on_device is None else f"{on_device / 1e6:.1f}"])
        if item.throughput is not None:
            found = item.throughput
            figures = (found.images_per_s, found.latency_p50_ms, found.latency_p99_ms)
            streams.append([name, str(found.streams), *(f"{figure:.2f}" for figure in figures)])
        if item.power is not None:
            used = item.power
            figures_or_none = (
                used.idle_mw,
                used.mean_mw,
                used.energy_mj_per_image,
                used.energy_above_idle_mj_per_image,
            )
            shown = ["" if figure is None else f"{figure:.1f}" for figure in figures_or_none]
            power.append([name, *shown, str(used.samples), f"{' + '.join(used.total_rails)} ({used.source})"])
        if item.layer_ms is not None:
            slowest = sorted(item.layer_ms.items(), key=lambda pair: -pair[1])[:SLOWEST]
            layers += [[name, f"{ms:.4f}", layer] for layer, ms in slowest]
    return {
        ("Cold start", ("engine", "start ms", "load ms", "first inference ms")): cold,
        ("On the GPU", ("engine", "copy in ms", "compute ms", "copy out ms", "enqueue ms", "device memory MB")): split,
        ("Throughput", ("engine", "streams", "images/s", "p50 ms", "p99 ms")): streams,
        ("Power", ("engine", "idle mW", "mean mW", "mJ/image", "above idle", "samples", "rails (source)")): power,
        ("Slowest layers", ("engine", "ms", "layer")): layers,
    }


def _caveats(measured: Profile, everyone: list[EngineProfile]) -> list[str]:
    lines = list(dict.fromkeys([*measured.device_before.warnings, *measured.device_after.warnings]))
    lines += [f"throttled: {reason}" for reason in measured.device_after.throttling]
    lines += [f"{item.engine}: {item.latency.warning}" for item in everyone if item.latency.warning]
    lines += [] if measured.sensor is None else measured.sensor.warnings()
    lines += [f"{item.engine}: {text}" for item in everyone if item.power for text in item.power.warnings]
    lines += [f"{item.engine}: its parity was not checked" for item in everyone if item.parity is None]
    if any(item.model is not None and item.model.weights == "random" for item in everyone):
        lines.append(RANDOM_WARNING)
    return lines
