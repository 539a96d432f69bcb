"""What profiles say of machines and of the devices in them, before and after, as facts to be listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from eamdeploy.devices.machine import Machine
from eamdeploy.records.profile import Profile
from eamdeploy.reporting import numbers
from eamdeploy.reporting.records.sources import ProfileSource

Facts = tuple[tuple[str, str], ...]
"""Names and values, as they are written."""

_YES = {True: "yes", False: "no", None: ""}


def place(source: ProfileSource) -> str:
    """The machine in a few words: `NVIDIA Jetson Orin Nano, 6 cores`, behind its address if it has one."""
    hardware = f"{source.hardware}, {numbers.plural(source.record.machine.usable_cores, 'core')}"
    return hardware if source.target is None else f"{source.target} ({hardware})"


def machine_facts(profile: Profile) -> Facts:
    """The machine and its device; a device that is only the processor has no line of its own for its name."""
    machine = profile.machine
    facts = {
        **_device(profile),
        "processor": machine.cpu,
        "cores": f"{machine.usable_cores} usable of {machine.cores}",
        "architecture": machine.architecture,
        "memory": numbers.size(machine.memory_bytes),
        "system": machine.system,
        "clock of core 0": ", ".join(f"{mhz:.0f} MHz {when}" for mhz, when in _clock(machine) if mhz is not None),
        "governor": machine.governor or "",
        "load": "" if machine.load_1min is None else f"{machine.load_1min:.2f} (mean of a minute, at the end)",
        **_state(profile),
        "measured": machine.measured_at,
    }
    return tuple((name, value or "not told by the system") for name, value in facts.items())


def _device(profile: Profile) -> dict[str, str]:
    before, after = profile.device_before, profile.device_after
    if before.kind == "cpu":
        return {}
    modes = ["" if each.power_mode is None else _mode(each.power_mode, each.power_mode_id) for each in (before, after)]
    software = ", ".join(f"{name} {version}" for name, version in before.software.items())
    return {"device": before.name, "software": software, "power mode": _changed(*modes)}


def _mode(name: str, number: int | None) -> str:
    return name if number is None else f"{name} (mode {number})"


def _state(profile: Profile) -> dict[str, str]:
    """What a device tells of its clocks and temperatures; nothing where it tells nothing."""
    before, after = profile.device_before, profile.device_after
    clocks = _before_after(_by_stem(before.clocks_mhz), _by_stem(after.clocks_mhz), "MHz")
    temperatures = {name: f"{value:.0f}" for name, value in before.temperatures_c.items()}
    later = {name: f"{value:.0f}" for name, value in after.temperatures_c.items()}
    told = {
        "temperatures": _before_after(temperatures, later, "°C"),
        "clocks": clocks,
        "clocks locked": _changed(_YES[before.clocks_locked], _YES[after.clocks_locked]),
    }
    found = {name: text for name, text in told.items() if text}
    slowed = _changed(*("; ".join(each.throttling) or "none" for each in (before, after)))
    throttled = before.throttling or after.throttling
    return {**found, "throttling": slowed} if found or throttled else {}


def _before_after(before: Mapping[str, str], after: Mapping[str, str], unit: str) -> str:
    names = dict.fromkeys([*before, *after])
    values = {name: _changed(before.get(name, ""), after.get(name, "")) for name in names}
    return ", ".join(f"{name} {value}\N{NO-BREAK SPACE}{unit}" for name, value in values.items())


def _by_stem(clocks_mhz: Mapping[str, float]) -> dict[str, str]:
    """Megahertz of units, those that differ by their number only together: `CPU0–5` as `729–1510`."""
    found = {}
    for _, group in groupby(clocks_mhz.items(), key=lambda pair: pair[0].rstrip("0123456789")):
        units = list(group)
        first, last = units[0][0], units[-1][0]
        stem = first.rstrip("0123456789")
        name = first if len(units) == 1 else f"{first}–{last.removeprefix(stem)}"
        found[name] = _range([mhz for _, mhz in units])
    return found


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low}–{high}"


def _changed(before: str, after: str) -> str:
    return before if before == after else f"{before or '?'} → {after or '?'}"


def _clock(machine: Machine) -> tuple[tuple[float | None, str], ...]:
    return ((machine.frequency_mhz, "now"), (machine.max_frequency_mhz, "at most"))
