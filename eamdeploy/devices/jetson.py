"""NVIDIA Jetson boards with JetPack 5 to 7, and what JetPack 4 still tells."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from eamdeploy.devices.base import DeviceKind, DeviceState, Sensor
from eamdeploy.devices.ina3221 import DRIVERS, ina3221_sensor
from eamdeploy.devices.jetpack import RELEASE_FILE, find_jetpack, find_l4t
from eamdeploy.devices.jetson_tools import ask, parse_clocks, parse_power_mode
from eamdeploy.devices.jtop import JtopSensor, jtop_answers
from eamdeploy.devices.sysfs import (
    board_name,
    cpu_clocks,
    gpu_clocks,
    read_number,
    read_text,
    temperatures_c,
    throttling,
)
from eamdeploy.devices.tegrastats_sensor import PROGRAM, TegrastatsSensor
from eamdeploy.errors import DeviceError

_LOCK = "Lock them with: sudo jetson_clocks"


@dataclass
class _Settings:
    """How the board is set, and what makes that doubtful."""

    power_mode: str | None = None
    power_mode_id: int | None = None
    clocks_mhz: dict[str, float] = field(default_factory=dict)
    clocks_locked: bool | None = None
    warnings: list[str] = field(default_factory=list)


class JetsonDevice:
    """The Jetson that this process runs on.

    Args:
        root: where `/etc`, `/proc` and `/sys` are looked for.

    Raises:
        DeviceError: this is no Jetson; says where it was looked for.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        if not is_jetson(root):
            model = board_name(root)
            raise DeviceError(
                f"this is no Jetson: there is no {root / RELEASE_FILE}, and no Tegra in {root / 'proc/device-tree'}",
                got=None if model is None else f"the board {model}",
                hint="In a container, mount /etc/nv_tegra_release. On another machine, take --device cuda or cpu.",
            )

    @property
    def kind(self) -> DeviceKind:
        return "jetson"

    def state(self) -> DeviceState:
        """The board now."""
        settings = _Settings()
        self._ask_power_mode(settings)
        self._ask_clocks(settings)
        self._count_overcurrent(settings)
        software = {}
        jetpack, l4t = find_jetpack(self._root), find_l4t(self._root)
        if jetpack is not None:
            software["JetPack"] = jetpack.version
        if l4t is not None:
            software["L4T"] = l4t
        return DeviceState(
            kind=self.kind,
            name=board_name(self._root) or "NVIDIA Jetson",
            software=software,
            power_mode=settings.power_mode,
            power_mode_id=settings.power_mode_id,
            clocks_locked=settings.clocks_locked,
            clocks_mhz=settings.clocks_mhz,
            temperatures_c=temperatures_c(self._root),
            throttling=throttling(self._root),
            warnings=settings.warnings,
        )

    def sensor(self, interval_s: float) -> Sensor:
        """The best of jtop, tegrastats and the power monitors' files.

        Raises:
            DeviceError: none of them is here.
        """
        if jtop_answers(interval_s):
            return JtopSensor(interval_s)
        if shutil.which(PROGRAM) is not None:
            return TegrastatsSensor(interval_s, self._root)
        monitors = ina3221_sensor(interval_s, self._root)
        if monitors is None:
            raise DeviceError(
                f"the power of this Jetson can't be read: jtop does not answer, {PROGRAM} is not on PATH, and no power "
                f"monitor can be read below {self._root / DRIVERS}",
                hint="Put tegrastats on PATH, or install jetson-stats: pip install 'eamdeploy[jetson]'.",
            )
        return monitors

    def _ask_power_mode(self, settings: _Settings) -> None:
        said = ask("nvpmodel", "-q")
        mode = None if said.text is None else parse_power_mode(said.text)
        if mode is not None:
            settings.power_mode, settings.power_mode_id = mode.name, mode.number
        else:
            settings.warnings.append(f"the power mode is not known: {said.trouble or '`nvpmodel -q` names none'}")

    def _ask_clocks(self, settings: _Settings) -> None:
        """Clocks of `jetson_clocks --show`, or of the kernel's files, which don't tell the memory's."""
        said = ask("jetson_clocks", "--show")
        clocks = None if said.text is None else parse_clocks(said.text)
        if clocks is not None and clocks.clocks_mhz:
            settings.clocks_mhz, settings.clocks_locked = clocks.clocks_mhz, clocks.locked
        else:
            known = {**cpu_clocks(self._root), **gpu_clocks(self._root)}
            settings.clocks_mhz = {unit: clock.current_mhz for unit, clock in known.items()}
            settings.clocks_locked = None if all(clock.held for clock in known.values()) else False
        if settings.clocks_locked is False:
            settings.warnings.append(f"clocks are not locked, so that times vary with the load before. {_LOCK}")
        elif settings.clocks_locked is None:
            why = said.trouble or "`jetson_clocks --show` does not say so"
            settings.warnings.append(f"it is not known whether all clocks are locked: {why}. {_LOCK}")

    def _count_overcurrent(self, settings: _Settings) -> None:
        """Counters that run since the board started: they tell that it was slowed down, but not when."""
        for counter in sorted((self._root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")):
            events = read_number(counter)
            if events:
                settings.warnings.append(
                    f"{counter.name} counts {events} over-current or under-voltage events since the board started; "
                    "each slows it down: look at the power supply, or take a lower power mode"
                )


def is_jetson(root: Path) -> bool:
    """Whether the files below `root` are a Jetson's; containers may hide some of them."""
    compatible = read_text(root / "proc/device-tree/compatible") or ""
    return find_l4t(root) is not None or "nvidia,tegra" in compatible or "Jetson" in (board_name(root) or "")
