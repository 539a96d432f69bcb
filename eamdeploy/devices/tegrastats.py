"""What a Jetson's `tegrastats` prints: one line for each moment.

The format differs by board and release, and the next release adds fields that nobody knows here. So a line is read
field by field: known fields are taken wherever they stand, whatever else is there is left out and named in `unknown`.
Blanks count for nothing, be they none, one or several, between fields or inside of them.

A wrong figure is worse than none. What could be a part of something else is therefore left out, too:

- a number without a unit that may have been cut: at the end of a text without a line end, or in front of what could be
  its other half (`VDD_IN 163 21mW`);
- a name that may have lost its head: the first of a text that does not begin as lines do, and one behind a bare word
  that makes another name of it (`VDD_SYS_ GPU`, `M CPU@42C`), or behind any bare word if it is unknown itself;
- a rail in another style than the others of its line: bare numbers where others have a unit, one where others have two;
- a name that is there twice; a line with two RAM or CPU fields is two lines that ran into each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

_T = TypeVar("_T")

_NO_SENSOR_C = -256.0
_HIGHEST_C = 200.0
_UNCONNECTED = "NC"
_HIGHEST_MW = 1_000_000  # ten times what the largest board draws: digits that ran into each other


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
        ram_used_bytes, ram_total_bytes: None where the line does not tell.
        swap_used_bytes, swap_total_bytes: None where there is no swap.
        cores: by number; None for a core that is off. Empty where the line does not tell.
        units: "EMC" (memory controller), "GR3D" and "GR3D2" (GPU); those that the board prints.
        temperatures_c: by sensor.
        power_mw: instantaneous power by rail. A rail of a part that is off can be a little below 0.
        unknown: the texts of the fields that were left out.
    """

    ram_used_bytes: int | None
    ram_total_bytes: int | None
    swap_used_bytes: int | None
    swap_total_bytes: int | None
    cores: tuple[Load | None, ...]
    units: Mapping[str, Load]
    temperatures_c: Mapping[str, float]
    power_mw: Mapping[str, int]
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Rail:
    """A rail as it was printed, whose style is judged by the others of its line."""

    text: str
    name: str
    power_mw: int
    has_unit: bool
    values: int


@dataclass
class _Fields:
    """What was found so far in a line.

    Attributes:
        before: the bare word directly in front of the next field, which may be the head of its name; `_CUT` at the
            beginning of a text that may have lost its own; None where there is neither.
    """

    memory: list[tuple[str, tuple[int, int]]] = field(default_factory=list)
    cores: list[tuple[Load | None, ...]] = field(default_factory=list)
    units: list[tuple[str, Load]] = field(default_factory=list)
    temperatures_c: list[tuple[str, float]] = field(default_factory=list)
    rails: list[_Rail] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    before: str | None = None


class _DoubtfulError(Exception):
    """The field looks like a known one, but what it says can't be, or can't be relied on."""


_CUT = ""
_NUMBER = r"[0-9]{1,9}"
_NAME = r"[A-Za-z][A-Za-z0-9_]*"
_BYTES = {"MB": 1 << 20, "GB": 1 << 30}
_CLOCKS = r"@ ?\[(?P<clocks>[^][]*)\]"
_CELSIUS = rf"-?{_NUMBER}(?:\.[0-9]+)? ?C"
_POWER = rf"-?{_NUMBER} ?mW"

# AGX Xavier's rails have the names of other things.
_XAVIER_RAIL = re.compile(r"GPU|CPU|SOC|CV|VDDRQ|SYS5V")
_RAIL = re.compile(rf"(?:VDD|VIN|POM)[A-Z0-9_]*|{_UNCONNECTED}|{_XAVIER_RAIL.pattern}")
_SENSOR = re.compile(
    r"(?:cpu|gpu|soc|cv|tj|tboard|tdiode|pll|[bm]cpu|pmic|ao|aux|thermal|iwlwifi|mem)[0-9]*(?:[-_]therm(?:al)?)?",
    re.IGNORECASE,
)
_ENGINE = r"(?:APE|AVP|DLA|ISP|MSENC|NVCSI|NVDEC|NVDLA|NVENC|NVJPG|OFA|PVA|SE|TSEC|VDE|VI|VIC)[0-9]*(?:_[A-Z0-9_]+)?"

_GLUED = re.compile(r"([kKMG]B)(\((?:lfb|cached) )")
_DATE = re.compile(
    r"\[?(?:"
    r"[0-9]{1,4}[-/.][0-9]{1,2}[-/.][0-9]{1,4}(?:(?:T|,? )[0-9]{1,2}:[0-9]{2}(?::[0-9]{2}(?:[.,][0-9]+)?)?)?"
    r"(?: ?[AP]M)?(?: ?(?:Z|UTC|GMT|[A-Z]{2,4}T|[+-][0-9]{2}:?[0-9]{2}))?"
    r"|(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun),? [A-Za-z0-9]+ [A-Za-z0-9]+ [0-9:]+(?: [AP]M)?(?: [A-Z]{3,4})? [0-9:]+"
    r"|[0-9]{10}(?:[.,][0-9]+)?"
    r"|[0-9]{1,2}:[0-9]{2}:[0-9]{2}(?:[.,][0-9]+)?"
    r")\]?:? ",
    re.ASCII,
)


def _memory(found: re.Match[str], fields: _Fields) -> None:
    used, total = int(found["used"]), int(found["total"])
    if used > total:
        raise _DoubtfulError
    fields.memory.append((found["kind"], (used * _BYTES[found["unit"]], total * _BYTES[found["unit"]])))


def _cores(found: re.Match[str], fields: _Fields) -> None:
    shared = (int(found["shared"]),) if found["shared"] else ()
    cores: list[Load | None] = []
    for text in found["cores"].split(","):
        core = re.fullmatch(rf"off|({_NUMBER}) ?%(?: ?@ ?({_NUMBER}))?", text.strip())
        if core is None:
            raise _DoubtfulError
        if core[1] is None:
            cores.append(None)
        else:
            cores.append(Load(_percent(core[1]), (int(core[2]),) if core[2] else shared))
    fields.cores.append(tuple(cores))


def _unit(found: re.Match[str], fields: _Fields) -> None:
    parts = found.groupdict()
    clocks = [text.strip() for text in (parts.get("clocks") or parts.get("clock") or "off").split(",")]
    if not all(re.fullmatch(rf"off|{_NUMBER}", text) for text in clocks):
        raise _DoubtfulError
    percent = None if parts["percent"] is None else _percent(parts["percent"])
    load = Load(percent, tuple(int(text) for text in clocks if text != "off"))
    fields.units.append((found["unit"], load))


def _temperature(found: re.Match[str], fields: _Fields) -> None:
    _require_whole_name(found["name"], _SENSOR, fields.before)
    celsius = float(found["celsius"])
    if celsius > _HIGHEST_C:
        raise _DoubtfulError
    fields.temperatures_c.append((found["name"], celsius))


def _rail_with_unit(found: re.Match[str], fields: _Fields) -> None:
    _require_whole_name(found["name"], _RAIL, fields.before)
    _add_rail(found, fields, has_unit=True)


def _bare_rail(found: re.Match[str], fields: _Fields) -> None:
    """A rail that only its name tells from something else."""
    if not _RAIL.fullmatch(found["name"]):
        raise _DoubtfulError
    _require_whole_name(found["name"], _RAIL, fields.before)
    _add_rail(found, fields, has_unit=False)


def _add_rail(found: re.Match[str], fields: _Fields, *, has_unit: bool) -> None:
    power_mw = int(found["first"])
    if abs(power_mw) > _HIGHEST_MW:
        raise _DoubtfulError
    fields.rails.append(_Rail(found[0], found["name"], power_mw, has_unit, found[0].count("/") + 1))


def _nothing(found: re.Match[str], fields: _Fields) -> None:
    """A field that is not asked for."""


def _percent(text: str) -> int:
    if int(text) > 100:
        raise _DoubtfulError
    return int(text)


def _require_whole_name(name: str, known: re.Pattern[str], before: str | None) -> None:
    """`name` can't be the end of another name.

    Raises:
        _DoubtfulError: it may be.
    """
    if before is None:
        return
    broken = before == _CUT or before.endswith("_") or not known.fullmatch(name)
    of_a_rail = _XAVIER_RAIL.fullmatch(name) and _RAIL.fullmatch(before)
    if broken or of_a_rail or (known is _SENSOR and known.fullmatch(before + name)):
        raise _DoubtfulError


_Read = Callable[[re.Match[str], _Fields], None]

# Tried in this order. The flag says that a field ends in a number that could be cut without a trace.
_GRAMMAR: tuple[tuple[re.Pattern[str], _Read, bool], ...] = tuple(
    (re.compile(rf"(?:{pattern})(?= |$)", re.ASCII), read, is_open)
    for pattern, read, is_open in (
        (rf"(?P<kind>RAM|SWAP) (?P<used>{_NUMBER}) ?/ ?(?P<total>{_NUMBER}) ?(?P<unit>MB|GB)", _memory, False),
        (rf"IRAM {_NUMBER} ?/ ?{_NUMBER} ?[kKMG]B", _nothing, False),
        (r"\( ?(?:lfb|cached) [^()]*\)", _nothing, False),  # largest free block, cached swap
        (r"(?:CPU|cpu) ?\[(?P<cores>[^][]*)\](?P<shared>)", _cores, False),
        (rf"(?:CPU|cpu) ?\[(?P<cores>[^][]*)\] ?@ ?(?P<shared>{_NUMBER})", _cores, True),
        (rf"(?P<unit>EMC|GR3D2?)(?:_FREQ)? (?:(?P<percent>{_NUMBER}) ?% ?)?{_CLOCKS}", _unit, False),
        (rf"(?P<unit>EMC|GR3D2?)(?:_FREQ)? (?:(?P<percent>{_NUMBER}) ?% ?)?@ ?(?P<clock>{_NUMBER})", _unit, True),
        (rf"(?P<unit>EMC|GR3D2?)(?:_FREQ)? (?P<percent>{_NUMBER}) ?%", _unit, False),
        (r"(?:EMC|GR3D2?)(?:_FREQ)? off", _nothing, False),
        (rf"MTS fg {_NUMBER} ?% bg {_NUMBER} ?%", _nothing, False),
        (rf"(?P<name>[A-Za-z][A-Za-z0-9_-]*)@ ?(?P<celsius>-?{_NUMBER}(?:\.[0-9]+)?) ?C(?: ?/ ?{_CELSIUS})?",
         _temperature, False),
        (rf"{_ENGINE} (?:off|{_NUMBER} ?%?|(?:{_NUMBER} ?%? ?)?@ ?{_NUMBER} ?%?|(?:{_NUMBER} ?% ?)?{_CLOCKS})",
         _nothing, False),
        (rf"(?!I?RAM |SWAP )(?P<name>{_NAME}) (?P<first>-?{_NUMBER}) ?mW(?: ?/ ?-?{_NUMBER}(?: ?mW)?){{0,2}}",
         _rail_with_unit, False),
        (rf"(?P<name>{_NAME}) (?P<first>{_NUMBER})(?: ?/ ?{_NUMBER}){{1,2}}", _bare_rail, False),
        (rf"(?P<name>(?:VDD|VIN|POM)[A-Z0-9_]*|{_UNCONNECTED}) (?P<first>{_NUMBER})", _bare_rail, True),
    )
)  # fmt: skip


def parse_line(text: str) -> TegrastatsLine | None:
    """What the line says; None if nothing in it can be understood, or it is more than one line.

    Args:
        text: with the end of the line, if it was read to there: without it a last number may have been cut, and where
            that could give a wrong figure it is left out.
    """
    if "\n" in text.rstrip():
        return None
    parted = _GLUED.sub(r"\1 \2", " ".join(text.split()))
    fields = _read_fields(parted, whole=text.endswith("\n"))
    if len(fields.cores) > 1 or [kind for kind, _ in fields.memory].count("RAM") > 1:
        return None
    memory = _distinct(fields.memory, fields.unknown)
    units = _distinct(fields.units, fields.unknown)
    temperatures = _distinct(fields.temperatures_c, fields.unknown)
    power = _distinct([(rail.name, rail.power_mw) for rail in _of_one_style(fields)], fields.unknown)
    if not (memory or fields.cores or units or temperatures or power):
        return None
    ram, swap = memory.get("RAM", (None, None)), memory.get("SWAP", (None, None))
    return TegrastatsLine(
        ram_used_bytes=ram[0],
        ram_total_bytes=ram[1],
        swap_used_bytes=swap[0],
        swap_total_bytes=swap[1],
        cores=fields.cores[0] if fields.cores else (),
        units=units,
        temperatures_c={name: celsius for name, celsius in temperatures.items() if celsius > _NO_SENSOR_C},
        power_mw=power,
        unknown=tuple(fields.unknown),
    )


def _read_fields(text: str, *, whole: bool) -> _Fields:
    """Every field of a line whose blanks are single."""
    date = _DATE.match(text)
    at = 0 if date is None else date.end()
    fields = _Fields(before=None if date is not None or text.startswith("RAM ") else _CUT)
    while at < len(text):
        end = _take_field(text, at, fields, whole=whole)
        if end is None:
            end = _leave_out(text, at, fields)
        at = end + 1
    return fields


def _take_field(text: str, at: int, fields: _Fields, *, whole: bool) -> int | None:
    """Where the known field that begins at `at` ends; None if none begins there."""
    for pattern, read, is_open in _GRAMMAR:
        found = pattern.match(text, at)
        if found is None:
            continue
        rest = text[found.end() + 1 :]
        try:
            if is_open and not (rest[:1].isalpha() or rest[:1] == "(" or (not rest and whole)):
                raise _DoubtfulError
            read(found, fields)
        except _DoubtfulError:
            fields.unknown.append(found[0])
        fields.before = None
        return found.end()
    return None


def _leave_out(text: str, at: int, fields: _Fields) -> int:
    """Where the word at `at` ends, which is no field or the name of an unknown one, whose value is the next word."""
    end = text.find(" ", at)
    end = len(text) if end < 0 else end
    word = text[at:end]
    if fields.before and not word[0].isalpha():
        fields.unknown[-1] += f" {word}"
    else:
        fields.unknown.append(word)
    fields.before = word if re.fullmatch(_NAME, word, re.ASCII) else None
    return end


def _of_one_style(fields: _Fields) -> list[_Rail]:
    """The rails without those that are printed with less than others of the line; these are left out."""
    with_unit = any(rail.has_unit for rail in fields.rails)
    most = max((rail.values for rail in fields.rails if rail.has_unit == with_unit), default=0)
    kept = [rail for rail in fields.rails if rail.has_unit == with_unit and (with_unit or rail.values == most)]
    fields.unknown.extend(rail.text for rail in fields.rails if rail not in kept)
    return [rail for rail in kept if rail.name != _UNCONNECTED]


def _distinct(found: list[tuple[str, _T]], unknown: list[str]) -> dict[str, _T]:
    """The values by name; names that are there more than once are left out."""
    names = [name for name, _ in found]
    unknown.extend(f"{name} {value}" for name, value in found if names.count(name) > 1)
    return {name: value for name, value in found if names.count(name) == 1}
