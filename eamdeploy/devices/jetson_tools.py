"""What a Jetson's own programs say about its power mode and clocks."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from eamdeploy.devices.sysfs import Clock

_TIMEOUT_S = 10.0
_CLOCK = re.compile(
    r"^(?P<unit>[\w.-]+):?[ \t]+(?:Online=(?P<online>\d) +)?(?:Governor=\S+ +)?"
    r"MinFreq=(?P<low>\d{1,15}) MaxFreq=(?P<high>\d{1,15}) CurrentFreq=(?P<now>\d{1,15})"
    r"(?: FreqOverride=(?P<held>\d))?",
    re.ASCII | re.MULTILINE,
)


@dataclass(frozen=True)
class Said:
    """What a program printed, or in words for people why it printed nothing."""

    text: str | None
    trouble: str | None = None


@dataclass(frozen=True)
class PowerMode:
    """The mode that limits clocks and cores; `number` is its id, None if it was not printed."""

    name: str
    number: int | None


@dataclass(frozen=True)
class Clocks:
    """Current clocks, and whether CPU, GPU and memory are all held at their maximum; None where that was not said."""

    clocks_mhz: dict[str, float]
    locked: bool | None


def ask(program: str, *arguments: str, timeout_s: float = _TIMEOUT_S) -> Said:
    """What the program on PATH prints; a program that fails, hangs or is not there is no error here."""
    command = " ".join((program, *arguments))
    path = shutil.which(program)
    if path is None:
        return Said(None, f"{program} is not on PATH")
    try:
        done = subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Said(None, f"`{command}` did not end within {timeout_s:g} s")
    except OSError as err:
        return Said(None, f"`{command}` can't be run: {err.strerror}")
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
        return Said(None, f"`{command}` failed with exit code {done.returncode}: {said}")
    return Said(done.stdout)


def parse_power_mode(text: str) -> PowerMode | None:
    """The mode in the output of `nvpmodel -q`: a line with the name, then one with the id, among others."""
    lines = [line.strip() for line in text.splitlines()]
    for index, line in enumerate(lines):
        _, label, name = line.partition("NV Power Mode:")
        if label and name.strip():
            numbers = [int(each) for each in lines[index + 1 :] if re.fullmatch("[0-9]{1,9}", each)]
            return PowerMode(name.strip(), numbers[0] if numbers else None)
    return None


def parse_clocks(text: str) -> Clocks:
    """The clocks in the output of `jetson_clocks --show`, in kHz for cores and in Hz for the rest.

    Locked means for a core that is on and for a GPU that its lowest and highest frequency are the same, for the memory
    (EMC) that its clock is overridden. Other units are always free to move.
    """
    clocks_mhz: dict[str, float] = {}
    held = []
    kinds = set()
    for found in _CLOCK.finditer(text):
        if found["online"] == "0":
            continue
        unit = found["unit"].upper()
        kind = next((each for each in ("CPU", "GPU", "EMC") if unit.startswith(each)), None)
        per_mhz = 1e3 if kind == "CPU" else 1e6
        clock = Clock(*(int(found[name]) / per_mhz for name in ("low", "high", "now")))
        clocks_mhz[unit] = clock.current_mhz
        if kind is not None:
            kinds.add(kind)
            held.append(clock.held if found["held"] is None else found["held"] == "1")
    locked = all(held) if {"CPU", "GPU"} <= kinds else None
    return Clocks(clocks_mhz, False if held and not all(held) else locked)
