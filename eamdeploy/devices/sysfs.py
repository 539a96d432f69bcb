"""What the kernel's files tell about any Linux machine: temperatures, clocks, throttling, memory in use.

`root` is where `/sys` and `/proc` are looked for. A file that is not there, not readable or not a number tells nothing:
sensors of parts that are switched off answer with an error on many boards.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,20}")  # the kernel's numbers have 64 bits
_SAID_LENGTH = 40
_NO_SENSOR_C = -100.0  # boards report −256 °C where no sensor is fitted or its part has no power

# Cooling devices that slow the machine down. Fans cool without that, and a screen's brightness is one as well.
_SLOWS_DOWN = re.compile(r"throttle|hot-surface|cpufreq|devfreq|balanced|^Processor$|^intel_powerclamp$")


@dataclass(frozen=True)
class Clock:
    """Limits of a clock as they are set now, and its frequency."""

    minimum_mhz: float
    maximum_mhz: float
    current_mhz: float

    @property
    def held(self) -> bool:
        """Whether it can't move: both limits are the same."""
        return self.minimum_mhz == self.maximum_mhz


def read_text(path: Path) -> str | None:
    """The file's text without white space and NUL at its ends; None if there is none."""
    try:
        return path.read_text(errors="replace").strip("\0 \t\n") or None
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    """The whole number that the file holds; None if it holds something else."""
    number, _ = ask_number(path)
    return number


def ask_number(path: Path) -> tuple[int | None, str]:
    """The whole number that the file holds and an empty text, or None and why there is none, in words for people."""
    try:
        text = path.read_text(errors="replace").strip("\0 \t\n")
    except OSError as err:
        return None, f"{path.name}: {err.strerror or err}"
    if not _WHOLE_NUMBER.fullmatch(text):
        return None, f"{path.name}: {text[:_SAID_LENGTH]!r} is no whole number"
    return int(text), ""


def board_name(root: Path) -> str | None:
    """The board's name in its device tree; PCs have none."""
    return read_text(root / "proc/device-tree/model")


def processor_name(root: Path) -> str | None:
    """The processor's name; on most ARM boards the kernel does not tell it."""
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return None


def memory_in_use(root: Path) -> dict[str, int]:
    """Bytes in use: "ram" is what is not available to new programs; "nvmap", on Jetsons, what the GPU has of it."""
    text = read_text(root / "proc/meminfo") or ""
    fields = {name: 1024 * int(count) for name, count in re.findall(r"^(\w+):\s+(\d{1,15}) kB", text, re.MULTILINE)}
    used = {}
    if {"MemTotal", "MemAvailable"} <= fields.keys():
        used["ram"] = fields["MemTotal"] - fields["MemAvailable"]
    if "NvMapMemUsed" in fields:
        used["nvmap"] = fields["NvMapMemUsed"]
    return used


def temperatures_c(root: Path) -> dict[str, float]:
    """Temperature by thermal zone; zones without a sensor are left out, of two with one name the hotter counts."""
    found: dict[str, float] = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        name, milli = read_text(zone / "type"), read_number(zone / "temp")
        if name is not None and milli is not None and milli / 1e3 > _NO_SENSOR_C:
            found[name] = max(found.get(name, _NO_SENSOR_C), milli / 1e3)
    return found


def throttling(root: Path) -> list[str]:
    """What the thermal framework slows down now; fans are not among it."""
    active = []
    for device in sorted((root / "sys/class/thermal").glob("cooling_device*")):
        name, state = read_text(device / "type") or "", read_number(device / "cur_state")
        if _SLOWS_DOWN.search(name) and state is not None and state > 0:
            active.append(f"{name} is at {state} of {read_text(device / 'max_state')}")
    return active


def cpu_clocks(root: Path) -> dict[str, Clock]:
    """Clock of every core that is on, by name ("CPU0")."""
    clocks = {}
    found = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")
    folders = [folder for folder in found if folder.parent.name[3:].isdecimal()]
    for folder in sorted(folders, key=lambda path: int(path.parent.name[3:])):
        clock = _clock(folder, "scaling_min_freq", "scaling_max_freq", "scaling_cur_freq", per_mhz=1e3)
        if clock is not None and read_number(folder.parent / "online") != 0:
            clocks[folder.parent.name.upper()] = clock
    return clocks


def gpu_clocks(root: Path) -> dict[str, Clock]:
    """Clock of every integrated GPU, or of its parts, by name ("GPU", or the kernel's where there are several)."""
    folders = [folder for folder in sorted((root / "sys/class/devfreq").glob("*")) if _is_gpu(folder.name)]
    clocks = {}
    for folder in folders:
        clock = _clock(folder, "min_freq", "max_freq", "cur_freq", per_mhz=1e6)
        if clock is not None:
            clocks["GPU" if len(folders) == 1 else folder.name] = clock
    return clocks


def _is_gpu(name: str) -> bool:
    """Names such as 17000000.gpu, 17000000.ga10b, 57000000.gpu, gpu-gpc-0."""
    return re.search(r"gpu|\.g[a-z]1[0-9]b", name) is not None


def _clock(folder: Path, minimum: str, maximum: str, current: str, per_mhz: float) -> Clock | None:
    low, high, now = (read_number(folder / name) for name in (minimum, maximum, current))
    if low is None or high is None or now is None:
        return None
    return Clock(low / per_mhz, high / per_mhz, now / per_mhz)
