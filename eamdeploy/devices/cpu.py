"""Any machine, seen as its processor."""

from __future__ import annotations

import platform
from pathlib import Path

from eamdeploy.devices.background import EnergyCounter, PolledSensor
from eamdeploy.devices.base import DeviceKind, DeviceState, Reading, Sensor
from eamdeploy.devices.sysfs import (
    ask_number,
    board_name,
    cpu_clocks,
    memory_in_use,
    processor_name,
    read_number,
    read_text,
    temperatures_c,
    throttling,
)


class CpuDevice:
    """The processor that this process runs on.

    Args:
        root: where `/proc` and `/sys` are looked for.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    @property
    def kind(self) -> DeviceKind:
        return "cpu"

    def state(self) -> DeviceState:
        """The processor now; the governor of its clock is the power mode."""
        clocks = cpu_clocks(self._root)
        governor = read_text(self._root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
        locked = all(clock.held for clock in clocks.values()) if clocks else None
        warnings = []
        if not locked and governor not in (None, "performance"):
            warnings.append(
                f"the governor {governor} moves the clock with the load. "
                "Hold it with: sudo cpupower frequency-set --governor performance"
            )
        return DeviceState(
            kind=self.kind,
            name=cpu_model(self._root),
            power_mode=governor,
            clocks_locked=locked,
            clocks_mhz={core: clock.current_mhz for core, clock in clocks.items()},
            temperatures_c=temperatures_c(self._root),
            throttling=throttling(self._root),
            warnings=warnings,
        )

    def sensor(self, interval_s: float) -> Sensor | None:
        """Power of the processor's packages (RAPL), without the main memory and the board; None where it can't be read.

        On most systems only root may read it.
        """
        counters = {}
        for domain in sorted((self._root / "sys/class/powercap").glob("intel-rapl:*")):
            name = read_text(domain / "name") or ""
            # subdomains are parts of their package, and psys, the whole platform, has all packages in it
            if domain.name.count(":") == 1 and name.startswith("package"):
                counters[name] = domain
        if not counters or any(read_number(domain / "energy_uj") is None for domain in counters.values()):
            return None
        meters = {name: EnergyCounter(read_number(path / "max_energy_range_uj")) for name, path in counters.items()}

        def read(at_ns: int) -> tuple[Reading, list[str]]:
            power, unread = {}, []
            for name, domain in counters.items():
                energy_uj, trouble = ask_number(domain / "energy_uj")
                power_mw = meters[name].power_mw(at_ns, energy_uj)
                if power_mw is not None:
                    power[name] = power_mw
                if energy_uj is None:
                    unread.append(f"{name}: {trouble}")
            return Reading(at_ns, power, memory_in_use(self._root)), unread

        return PolledSensor("RAPL", tuple(counters), read, interval_s)


def cpu_model(root: Path = Path("/")) -> str:
    """The processor's name, or on boards whose kernel does not tell it, the board's."""
    return processor_name(root) or board_name(root) or platform.processor() or platform.machine()
