"""A Jetson's power monitors, read from the kernel's files, where `tegrastats` is not at hand (in a container, say).

JetPack 5 and later: hwmon, millivolts and milliamperes by channel; JetPack 4: industrial I/O, milliwatts.
Source: docs/tensorrt.md, Telemetry of a Jetson.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from eamdeploy.devices.background import PolledSensor
from eamdeploy.devices.base import Reading
from eamdeploy.devices.sysfs import ask_number, memory_in_use, read_text

DRIVERS = "sys/bus/i2c/drivers"

_UNCONNECTED = "NC"


@dataclass(frozen=True)
class Rail:
    """A channel of a power monitor.

    Attributes:
        files: whose product is its power: millivolts and milliamperes, or milliwatts alone.
    """

    name: str
    files: tuple[Path, ...]

    def ask_power(self) -> tuple[float | None, str]:
        """Milliwatts now and an empty text, or None and why it can't be read."""
        values = []
        for file in self.files:
            number, trouble = ask_number(file)
            if number is None:
                return None, f"{self.name}: {trouble}"
            values.append(number)
        return (values[0] if len(values) == 1 else values[0] * values[1] / 1e3), ""


def find_rails(root: Path) -> list[Rail]:
    """Every rail that has a name, in the order of the monitors' addresses; also those that can't be read now."""
    folders = root / DRIVERS
    rails = []
    for label in sorted(folders.glob("ina3221*/*/hwmon/hwmon*/in*_label")):
        channel = label.name.removeprefix("in").removesuffix("_label")
        files = (label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input"))
        if files[1].exists():  # the sum of shunt voltages has a label, but no current
            rails.append(Rail(read_text(label) or "", files))
    for label in sorted(folders.glob("ina3221*/*/iio:device*/rail_name_*")):
        channel = label.name.removeprefix("rail_name_")
        rails.append(Rail(read_text(label) or "", (label.with_name(f"in_power{channel}_input"),)))
    return [rail for rail in rails if rail.name not in ("", _UNCONNECTED)]


def ina3221_sensor(interval_s: float, root: Path = Path("/")) -> PolledSensor | None:
    """Sensors of the power monitors; None where there are none that can be read."""
    rails = find_rails(root)
    if all(rail.ask_power()[0] is None for rail in rails):
        return None
    names = Counter(rail.name for rail in rails)
    ambiguous = [f"{name}: {count} rails have this name" for name, count in names.items() if count > 1]
    distinct = [rail for rail in rails if names[rail.name] == 1]

    def read(at_ns: int) -> tuple[Reading, list[str]]:
        said = {rail.name: rail.ask_power() for rail in distinct}
        power = {name: mw for name, (mw, _) in said.items() if mw is not None}
        unread = [trouble for mw, trouble in said.values() if mw is None]
        return Reading(at_ns, power, memory_in_use(root)), [*ambiguous, *unread]

    return PolledSensor("sysfs ina3221", None, read, interval_s)
