"""What a Jetson's `tegrastats` prints: one line for each moment.

The format differs by board and release. A line is understood as a whole or not at all: known fields, and engines with
their clocks, must follow each other without a gap. So a line that was cut, or two that ran into each other, are not
believed. Source: FACTS §5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_MB = 1 << 20
_NO_SENSOR_C = -256.0
_UNCONNECTED = "NC"


@dataclass(frozen=True)
class Load:
    """How busy a unit is and how fast it runs.

    Attributes:
        percent: None where the board does not tell.
        clocks_mhz: of its parts, those that are on; empty where the board does not tell.
    """

    percent: int | None
    clocks_mhz: tuple[int, ...] = ()


@dataclass(frozen=True)
class TegrastatsLine:
    """One line.

    Attributes:
        swap_used_bytes, swap_total_bytes: None where there is no swap.
        cores: by number; None for a core that is off.
        units: "EMC" (memory controller), "GR3D" and "GR3D2" (GPU); those that the board prints.
        temperatures_c: by sensor.
        power_mw: instantaneous power by rail. A rail of a part that is off can be a little below 0.
    """

    ram_used_bytes: int
    ram_total_bytes: int
    swap_used_bytes: int | None
    swap_total_bytes: int | None
    cores: tuple[Load | None, ...]
    units: Mapping[str, Load]
    temperatures_c: Mapping[str, float]
    power_mw: Mapping[str, int]


@dataclass
class _Fields:
    """What was found so far in a line."""

    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    cores: list[tuple[Load | None, ...]] = field(default_factory=list)
    units: dict[str, Load] = field(default_factory=dict)
    temperatures_c: dict[str, float] = field(default_factory=dict)
    power_mw: dict[str, int] = field(default_factory=dict)
    power_styles: set[tuple[int, bool]] = field(default_factory=set)


class _NotUnderstoodError(Exception):
    """The line says something that no tegrastats says."""


_NUMBER = r"[0-9]{1,9}"
_NAME = r"[A-Za-z][A-Za-z0-9_]*"
# Where a number without a unit may end: not at the end of the text, where it may have been cut.
_WHOLE = r"(?=\s)"
_LOAD = rf"(?:(?P<percent>{_NUMBER})%)?(?:@(?:\[(?P<clocks>[^][]*)\]|(?P<clock>{_NUMBER}){_WHOLE}))?"
_MILLIWATTS = rf"-?{_NUMBER}mW"

# A rail with bare numbers looks like an engine with its clock ("APE 150") unless there are several, or by its name.
_POWER = (
    rf"(?!RAM|SWAP|IRAM|EMC|GR3D)(?P<name>{_NAME}) (?:(?P<with_unit>{_MILLIWATTS}(?:/{_MILLIWATTS}){{0,2}})"
    rf"|(?P<bare>{_NUMBER}(?:/{_NUMBER}){{1,2}}))"
    rf"|(?P<rail>(?:VDD|VIN|POM|NC)[A-Z0-9_]*) (?P<alone>{_NUMBER}){_WHOLE}"
)


def _memory(found: re.Match[str], fields: _Fields) -> None:
    used, total = int(found["used"]), int(found["total"])
    if found["kind"] in fields.memory or used > total:
        raise _NotUnderstoodError
    fields.memory[found["kind"]] = used * _MB, total * _MB


def _cores(found: re.Match[str], fields: _Fields) -> None:
    shared = (int(found["shared"]),) if found["shared"] else ()
    cores: list[Load | None] = []
    for text in found["cores"].split(","):
        core = re.fullmatch(rf"off|({_NUMBER})%(?:@({_NUMBER}))?", text.strip())
        if core is None:
            raise _NotUnderstoodError
        if core[1] is None:
            cores.append(None)
        else:
            cores.append(Load(_percent(core[1]), (int(core[2]),) if core[2] else shared))
    fields.cores.append(tuple(cores))


def _unit(found: re.Match[str], fields: _Fields) -> None:
    if found["unit"] in fields.units or not (found["percent"] or found["clocks"] or found["clock"]):
        raise _NotUnderstoodError
    clocks = [text.strip() for text in (found["clocks"] or found["clock"] or "off").split(",")]
    if not all(re.fullmatch(rf"off|{_NUMBER}", text) for text in clocks):
        raise _NotUnderstoodError
    percent = None if found["percent"] is None else _percent(found["percent"])
    fields.units[found["unit"]] = Load(percent, tuple(int(text) for text in clocks if text != "off"))


def _temperature(found: re.Match[str], fields: _Fields) -> None:
    celsius = float(found["celsius"])
    if found["name"] in fields.temperatures_c:
        raise _NotUnderstoodError
    if celsius > _NO_SENSOR_C:
        fields.temperatures_c[found["name"]] = celsius


def _power(found: re.Match[str], fields: _Fields) -> None:
    name = found["name"] or found["rail"]
    values = (found["with_unit"] or found["bare"] or found["alone"]).split("/")
    fields.power_styles.add((len(values), found["with_unit"] is not None))
    if name == _UNCONNECTED:
        return
    if name in fields.power_mw:
        raise _NotUnderstoodError
    fields.power_mw[name] = int(values[0].removesuffix("mW"))


def _nothing(found: re.Match[str], fields: _Fields) -> None:
    """A field that is not asked for."""


def _percent(text: str) -> int:
    if int(text) > 100:
        raise _NotUnderstoodError
    return int(text)


# Tried in this order; each field is followed by white space or the end of the line.
_GRAMMAR: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], _Fields], None]], ...] = tuple(
    (re.compile(rf"(?:{pattern})(?:\s+|$)", re.ASCII), read)
    for pattern, read in (
        (rf"(?P<kind>RAM|SWAP) (?P<used>{_NUMBER})/(?P<total>{_NUMBER})MB", _memory),
        (rf"IRAM {_NUMBER}/{_NUMBER}kB ?\(lfb [^()]*\)", _nothing),
        (r"\((?:lfb|cached) [^()]*\)", _nothing),  # largest free block, cached swap
        (rf"CPU \[(?P<cores>[^][]*)\](?:@(?P<shared>{_NUMBER}){_WHOLE})?", _cores),
        (rf"(?P<unit>EMC|GR3D2?)_FREQ {_LOAD}", _unit),
        (rf"MTS fg {_NUMBER}% bg {_NUMBER}%", _nothing),
        (rf"(?P<name>{_NAME})@(?P<celsius>-?{_NUMBER}(?:\.[0-9]+)?)C(?:/-?{_NUMBER}(?:\.[0-9]+)?C)?", _temperature),
        (_POWER, _power),
        # other engines: off, or their load and clock
        (rf"(?!RAM|SWAP|CPU|EMC|GR3D|VDD|VIN|POM|NC ){_NAME} (?:off|{_NUMBER}|{_NUMBER}%?@{_NUMBER}|@?{_NUMBER}%?|"
         rf"(?:{_NUMBER}%)?@\[[^][]*\])", _nothing),
    )
)  # fmt: skip
_DATE = re.compile(r"\s*(?:\d\d-\d\d-\d{4} \d\d:\d\d:\d\d )?(?=RAM )", re.ASCII)


def parse_line(text: str) -> TegrastatsLine | None:
    """What the line says; None if it can't be understood.

    Args:
        text: with the end of the line, if it was read to there: without it a last number may have been cut, and where
            that could give a wrong figure the line is not believed.
    """
    fields = _Fields()
    begin = _DATE.match(text)
    if begin is None or "\n" in text.rstrip():
        return None
    at = begin.end()
    try:
        while at < len(text):
            found, read = _field(text, at)
            read(found, fields)
            at = found.end()
    except _NotUnderstoodError:
        return None
    # one program prints all rails in one style: a rail in another one was cut
    if len(fields.cores) != 1 or "RAM" not in fields.memory or len(fields.power_styles) > 1:
        return None
    (ram_used, ram_total), (swap_used, swap_total) = fields.memory["RAM"], fields.memory.get("SWAP", (None, None))
    return TegrastatsLine(
        ram_used_bytes=ram_used,
        ram_total_bytes=ram_total,
        swap_used_bytes=swap_used,
        swap_total_bytes=swap_total,
        cores=fields.cores[0],
        units=fields.units,
        temperatures_c=fields.temperatures_c,
        power_mw=fields.power_mw,
    )


def _field(text: str, at: int) -> tuple[re.Match[str], Callable[[re.Match[str], _Fields], None]]:
    for pattern, read in _GRAMMAR:
        found = pattern.match(text, at)
        if found is not None:
            return found, read
    raise _NotUnderstoodError
