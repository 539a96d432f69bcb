"""A Jetson's power monitors, read from the kernel's files, where `tegrastats` is not at hand (in a container, say).

JetPack 5 and later: hwmon, millivolts and milliamperes by channel; JetPack 4: industrial I/O, milliwatts.
Source: FACTS §5.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from eamdeploy.devices.background import PolledSensor
from eamdeploy.devices.base import Reading
from eamdeploy.devices.rails import total_rails
from eamdeploy.devices.sysfs import memory_in_use, read_number, read_text

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

    def power_mw(self) -> float | None:
        """Now; None if it can't be read."""
        values = [read_number(file) for file in self.files]
        if len(values) == 1:
            return values[0]
        millivolts, milliamperes = values
        return None if millivolts is None or milliamperes is None else millivolts * milliamperes / 1e3


def find_rails(root: Path) -> list[Rail]:
    """Every rail that has a name and can be read, in the order of the monitors' addresses."""
    folders = root / DRIVERS
    rails = []
    for label in sorted(folders.glob("ina3221*/*/hwmon/hwmon*/in*_label")):
        channel = label.name.removeprefix("in").removesuffix("_label")
        files = (label.with_name(f"in{channel}_input"), label.with_name(f"curr{channel}_input"))
        rails.append(Rail(read_text(label) or "", files))  # the sum of shunt voltages has a label, but no current
    for label in sorted(folders.glob("ina3221*/*/iio:device*/rail_name_*")):
        channel = label.name.removeprefix("rail_name_")
        rails.append(Rail(read_text(label) or "", (label.with_name(f"in_power{channel}_input"),)))
    return [rail for rail in rails if rail.name not in ("", _UNCONNECTED) and rail.power_mw() is not None]


def ina3221_sensor(interval_s: float, root: Path = Path("/")) -> PolledSensor | None:
    """Sensors of the power monitors; None where there are none that can be read."""
    rails = find_rails(root)
    if not rails:
        return None

    def read(at_ns: int) -> Reading:
        power = {rail.name: rail.power_mw() for rail in rails}
        return Reading(at_ns, {name: mw for name, mw in power.items() if mw is not None}, memory_in_use(root))

    return PolledSensor("sysfs ina3221", total_rails(rail.name for rail in rails), read, interval_s)
