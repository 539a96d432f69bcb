"""What a measurement ran on, recorded beside every figure."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

from eamdeploy.artifacts.records import Record
from eamdeploy.devices.clock import utc_now
from eamdeploy.devices.cpu import cpu_model
from eamdeploy.devices.instructions import instruction_sets
from eamdeploy.devices.provenance import package_versions, usable_cores


class Machine(Record):
    """The machine and its software at one moment.

    Attributes:
        instructions: its instruction sets (`devices.instructions`); None in an older record.
        cores: of the machine; `usable_cores` of them are open to this process.
        frequency_mhz, max_frequency_mhz: of the first core, now and at most; None where the system does not tell.
        governor: what sets the clock ("performance", "schedutil" …); None where the system does not tell.
        load_1min: running and waiting processes, mean of the last minute; None where the system does not tell.
        measured_at: UTC, ISO 8601.
    """

    cpu: str
    architecture: str
    cores: int
    usable_cores: int
    memory_bytes: int
    system: str
    frequency_mhz: float | None
    max_frequency_mhz: float | None
    governor: str | None
    load_1min: float | None
    versions: dict[str, str]
    measured_at: str
    instructions: str | None = None


def describe_machine(cpufreq: Path = Path("/sys/devices/system/cpu/cpu0/cpufreq")) -> Machine:
    """This machine now.

    Args:
        cpufreq: the kernel's folder about the first core's clock.
    """
    return Machine(
        cpu=cpu_model(),
        architecture=platform.machine(),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        memory_bytes=psutil.virtual_memory().total,
        system=f"{platform.system()} {platform.release()}",
        frequency_mhz=_mhz(cpufreq / "scaling_cur_freq"),
        max_frequency_mhz=_mhz(cpufreq / "scaling_max_freq"),
        governor=_line(cpufreq / "scaling_governor"),
        load_1min=_load_1min(),
        versions=package_versions(),
        measured_at=utc_now(),
        instructions=instruction_sets(),
    )


def _line(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _mhz(path: Path) -> float | None:
    """Megahertz of a file in kilohertz; kernels write words such as `<unknown>` there when they can't tell."""
    text = _line(path)
    return int(text) / 1e3 if text is not None and text.isdecimal() else None


def _load_1min() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
