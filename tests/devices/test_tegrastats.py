from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
from fake_jetson import AGX_ORIN_LINE, ORIN_NANO_LINE, THOR_LINE
from hypothesis import given, note
from hypothesis import strategies as st

from eamdeploy.devices.tegrastats import Load, TegrastatsLine, parse_line

MB = 1 << 20

TX2_LINE = (
    "RAM 3276/7859MB (lfb 5x4MB) SWAP 1626/12122MB (cached 181MB) "
    "CPU [44%@1421,49%@2031,67%@2034,17%@1420,25%@1419,8%@1420] EMC_FREQ 1%@1866 GR3D_FREQ 0%@114 APE 150 "
    "MTS fg 1% bg 1% PLL@42.5C MCPU@42.5C PMIC@50C Tboard@38C GPU@39.5C BCPU@42.5C thermal@41.3C Tdiode@39.25C "
    "VDD_SYS_GPU 182/182 VDD_SYS_SOC 730/730 VDD_4V0_WIFI 0/0 VDD_IN 5297/5297 VDD_SYS_CPU 1917/1917 "
    "VDD_SYS_DDR 1241/1241"
)
ORIN_NANO_IDLE_LINE = (
    "06-18-2025 11:25:24 RAM 3452/7620MB (lfb 25x4MB) SWAP 1518/16384MB (cached 174MB) "
    "CPU [1%@1420,2%@1420,0%@1420,2%@1420,2%@729,1%@729] GR3D_FREQ 0% cpu@50.031C soc2@49.031C soc0@50C gpu@49.031C "
    "tj@50.25C soc1@50.25C VDD_IN 4824mW/4824mW VDD_CPU_GPU_CV 518mW/518mW VDD_SOC 1475mW/1475mW"
)
AGX_ORIN_NEW_LINE = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201,4%@2201,14%@2201,30%@2201,18%@2201,"
    "10%@2201,10%@2201,33%@2201,7%@2201,5%@2201,27%@2201] EMC_FREQ 3%@3199 GR3D_FREQ 12%@[1300,1300] NVENC0 off "
    "NVDEC0 off NVJPG0 off NVJPG1 off VIC off OFA off NVDLA0 off NVDLA1 off PVA0_FREQ off APE 174 cpu@52.968C/52.968C "
    "soc2@48.406C/48.406C soc0@49.531C/49.531C gpu@47.625C/47.625C VDD_GPU_SOC 5139mW/5139mW/5139mW "
    "VDD_CPU_CV 3268mW/3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW/5500mW"
)
THOR_IDLE_LINE = (
    "08-08-2026 20:58:23 RAM 3429/125749MB (lfb 120x4MB) CPU [0%,5%,off]@2601 EMC_FREQ @4266 cpu@49.75C/49.75C "
    "VDD_GPU -392mW/6330mW/6330mW VIN 28906mW/14453mW/28906mW"
)
XAVIER_LINE = (
    "RAM 1689/31918MB (lfb 339x4MB) IRAM 0/252kB(lfb 252kB) CPU [3%@1190,off] EMC_FREQ 0% GR3D_FREQ 0% "
    "AO@33C GPU 1241/1200 CPU 310/310 SOC 930/930 CV 0/0 VDDRQ 155/155 SYS5V 1850/1850"
)
LINES = (
    *(TX2_LINE, ORIN_NANO_IDLE_LINE, ORIN_NANO_LINE, AGX_ORIN_LINE, AGX_ORIN_NEW_LINE, THOR_LINE, THOR_IDLE_LINE),
    XAVIER_LINE,
)


def cores(*loads: tuple[int, int] | None) -> tuple[Load | None, ...]:
    return tuple(None if load is None else Load(load[0], (load[1],)) for load in loads)


def test_tx2_with_bare_numbers() -> None:
    assert parse_line(TX2_LINE) == TegrastatsLine(
        ram_used_bytes=3276 * MB,
        ram_total_bytes=7859 * MB,
        swap_used_bytes=1626 * MB,
        swap_total_bytes=12122 * MB,
        cores=cores((44, 1421), (49, 2031), (67, 2034), (17, 1420), (25, 1419), (8, 1420)),
        units={"EMC": Load(1, (1866,)), "GR3D": Load(0, (114,))},
        temperatures_c={
            **{"PLL": 42.5, "MCPU": 42.5, "PMIC": 50.0, "Tboard": 38.0, "GPU": 39.5, "BCPU": 42.5},
            **{"thermal": 41.3, "Tdiode": 39.25},
        },
        power_mw={
            **{"VDD_SYS_GPU": 182, "VDD_SYS_SOC": 730, "VDD_4V0_WIFI": 0, "VDD_IN": 5297, "VDD_SYS_CPU": 1917},
            **{"VDD_SYS_DDR": 1241},
        },
    )


def test_orin_nano_busy() -> None:
    assert parse_line(ORIN_NANO_LINE) == TegrastatsLine(
        ram_used_bytes=6712 * MB,
        ram_total_bytes=7620 * MB,
        swap_used_bytes=369 * MB,
        swap_total_bytes=3810 * MB,
        cores=cores((38, 1497), (2, 729), (1, 729), (0, 729), (1, 729), (0, 729)),
        units={"EMC": Load(61, (2133,)), "GR3D": Load(99, (612,))},
        temperatures_c={
            **{"cpu": 57.125, "soc2": 55.093, "soc0": 56.625, "gpu": 58.625, "tj": 58.312, "soc1": 55.937},
        },
        power_mw={"VDD_IN": 16321, "VDD_CPU_GPU_CV": 7104, "VDD_SOC": 3120},
    )


def test_orin_nano_whose_gpu_tells_no_clock() -> None:
    assert parse_line(ORIN_NANO_IDLE_LINE) == TegrastatsLine(
        ram_used_bytes=3452 * MB,
        ram_total_bytes=7620 * MB,
        swap_used_bytes=1518 * MB,
        swap_total_bytes=16384 * MB,
        cores=cores((1, 1420), (2, 1420), (0, 1420), (2, 1420), (2, 729), (1, 729)),
        units={"GR3D": Load(0)},
        temperatures_c={"cpu": 50.031, "soc2": 49.031, "soc0": 50.0, "gpu": 49.031, "tj": 50.25, "soc1": 50.25},
        power_mw={"VDD_IN": 4824, "VDD_CPU_GPU_CV": 518, "VDD_SOC": 1475},
    )


def test_agx_orin_without_swap_with_three_powers() -> None:
    percents = (23, 10, 4, 14, 30, 18, 10, 10, 33, 7, 5, 27)
    assert parse_line(AGX_ORIN_NEW_LINE) == TegrastatsLine(
        ram_used_bytes=20642 * MB,
        ram_total_bytes=62817 * MB,
        swap_used_bytes=None,
        swap_total_bytes=None,
        cores=cores(*((percent, 2201) for percent in percents)),
        units={"EMC": Load(3, (3199,)), "GR3D": Load(12, (1300, 1300))},
        temperatures_c={"cpu": 52.968, "soc2": 48.406, "soc0": 49.531, "gpu": 47.625},
        power_mw={"VDD_GPU_SOC": 5139, "VDD_CPU_CV": 3268, "VIN_SYS_5V0": 5500},
    )


def test_agx_orin_with_unconnected_rails_and_missing_sensors() -> None:
    assert parse_line(AGX_ORIN_LINE) == TegrastatsLine(
        ram_used_bytes=1205 * MB,
        ram_total_bytes=30623 * MB,
        swap_used_bytes=0,
        swap_total_bytes=15311 * MB,
        cores=cores((0, 729), (2, 729), (1, 729), (0, 729), *[None] * 4, *[(0, 729)] * 4),
        units={"EMC": Load(0, (204,)), "GR3D": Load(0, (114,)), "GR3D2": Load(0, (0,))},
        temperatures_c={"CPU": 41.437, "Tboard": 32.0, "SOC2": 39.343, "tj": 42.593},
        power_mw={"VDD_GPU_SOC": 2390, "VDD_CPU_CV": 796, "VIN_SYS_5V0": 3522, "VDDQ_VDD2_1V8AO": 301},
    )


def test_thor_tells_the_gpu_clocks_alone() -> None:
    line = parse_line(THOR_LINE)
    assert line is not None
    assert line.cores == cores((90, 2601), (75, 2601), None, (7, 2601))
    assert line.units == {"EMC": Load(34, (4266,)), "GR3D": Load(None, (1574, 1574, 1574))}
    assert line.power_mw == {"VDD_GPU": 37939, "VDD_CPU_SOC_MSS": 30059, "VIN_SYS_5V0": 15486, "VIN": 124486}
    assert line.temperatures_c == {"cpu": 58.25, "tj": 66.625}


def test_thor_at_rest_tells_one_clock_for_all_cores_and_none_of_the_gpu() -> None:
    line = parse_line(THOR_IDLE_LINE)
    assert line is not None
    assert line.cores == cores((0, 2601), (5, 2601), None)
    assert line.units == {"EMC": Load(None, (4266,))}
    assert line.power_mw == {"VDD_GPU": -392, "VIN": 28906}


def test_xaviers_rails_have_the_names_of_other_things() -> None:
    line = parse_line(XAVIER_LINE)
    assert line is not None
    assert line.cores == cores((3, 1190), None)
    assert line.power_mw == {"GPU": 1241, "CPU": 310, "SOC": 930, "CV": 0, "VDDRQ": 155, "SYS5V": 1850}


def test_clocks_of_parts_that_are_off_are_left_out() -> None:
    line = parse_line("RAM 1/2MB CPU [off] GR3D_FREQ 5%@[300,off,600]")
    assert line is not None and line.units == {"GR3D": Load(5, (300, 600))}


def test_single_bare_power_needs_the_end_of_its_line() -> None:
    whole = "RAM 1/2MB (lfb 1x4MB) CPU [1%@1] VDD_IN 4500 VDD_GPU 1200"
    assert parsed(f"{whole}\n").power_mw == {"VDD_IN": 4500, "VDD_GPU": 1200}
    cut = parsed(whole)
    assert cut.power_mw == {"VDD_IN": 4500}, "1200 may be the beginning of 12000"
    assert cut.unknown == ("VDD_GPU 1200",)


def without(line: TegrastatsLine, *names: str) -> TegrastatsLine:
    """`line` without the fields of these names."""
    gone = {"RAM": {"ram_used_bytes": None, "ram_total_bytes": None}, "CPU": {"cores": ()}}
    gone["SWAP"] = {"swap_used_bytes": None, "swap_total_bytes": None}
    for name in names:
        line = replace(line, **gone.get(name, {}))  # type: ignore[arg-type]
    return replace(
        line,
        units={name: load for name, load in line.units.items() if name not in names},
        temperatures_c={name: celsius for name, celsius in line.temperatures_c.items() if name not in names},
        power_mw={name: mw for name, mw in line.power_mw.items() if name not in names},
    )


@pytest.mark.parametrize(
    ("old", "new", "gone", "unknown"),
    [
        ("RAM 6712/7620MB", "RAM 7621/7620MB", ["RAM"], ["RAM 7621/7620MB"]),
        ("RAM 6712/7620MB", "", ["RAM"], []),
        ("RAM 6712/7620MB", "RAM 6712/7620", ["RAM"], ["RAM 6712/7620"]),
        ("RAM 6712/7620MB", "RAM 6712/7620MiB", ["RAM"], ["RAM 6712/7620MiB"]),
        ("SWAP 369/3810MB", "SWAP 369/3810", ["SWAP"], ["SWAP 369/3810"]),
        ("SWAP 369/3810MB", "SWAP 369/3810MB SWAP 369/3810MB", ["SWAP"], None),
        ("CPU [38%@1497", "CPU [101%@1497", ["CPU"], None),
        ("CPU [38%@1497", "CPU [38%@149x", ["CPU"], None),
        ("CPU [38%@1497", "CPU [x", ["CPU"], None),
        ("CPU [", "GPU [", ["CPU"], None),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ 99%@[612", ["GR3D"], ["GR3D_FREQ 99%@[612"]),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ 99%@[]x", ["GR3D"], ["GR3D_FREQ 99%@[]x"]),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ @[6a2]", ["GR3D"], ["GR3D_FREQ @[6a2]"]),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ 99%@[612] GR3D_FREQ 98%@[612]", ["GR3D"], None),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ", ["GR3D"], ["GR3D_FREQ"]),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ off", ["GR3D"], []),
        ("EMC_FREQ 61%@2133", "EMC_FREQ 61%@", ["EMC"], ["EMC_FREQ 61%@"]),
        ("EMC_FREQ 61%@2133", "EMC_FREQ 61%@21 33", ["EMC"], ["EMC_FREQ 61%@21", "33"]),
        ("tj@58.312C", "tj@58.312", ["tj"], ["tj@58.312"]),
        ("tj@58.312C", "tj@58.312F", ["tj"], ["tj@58.312F"]),
        ("tj@58.312C", "cpu@58.312C", ["tj", "cpu"], None),
        ("tj@58.312C", "NEW @1600 C tj@58.312C", [], ["NEW @1600", "C"]),
        ("tj@58.312C", "tj@58312C", ["tj"], ["tj@58312C"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 3120m", ["VDD_SOC"], ["VDD_SOC 3120m"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 3120uW/3659uW", ["VDD_SOC"], ["VDD_SOC 3120uW/3659uW"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 3.1W/3.6W", ["VDD_SOC"], ["VDD_SOC 3.1W/3.6W"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 3120mV/3659mA", ["VDD_SOC"], ["VDD_SOC 3120mV/3659mA"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 3120/3659", ["VDD_SOC"], ["VDD_SOC 3120/3659"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 3120", ["VDD_SOC"], ["VDD_SOC 3120"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC", ["VDD_SOC"], ["VDD_SOC"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC off", ["VDD_SOC"], ["VDD_SOC", "off"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_IN 3120mW/3659mW", ["VDD_SOC", "VDD_IN"], None),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 1mW/2mW/3mW/4mW", ["VDD_SOC"], ["VDD_SOC 1mW/2mW/3mW/4mW"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 31203659mW/1mW", ["VDD_SOC"], ["VDD_SOC 31203659mW/1mW"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 31 20mW/3659mW", ["VDD_SOC"], ["VDD_SOC 31", "20mW/3659mW"]),
        ("VDD_SOC 3120mW/3659mW", "VDD_ SOC 3120mW/3659mW", ["VDD_SOC"], ["VDD_", "SOC 3120mW/3659mW"]),
        ("VDD_CPU_GPU_CV 7104mW/4944mW ", "VDD_CPU_GPU_CV 7104mW/4944mW", ["VDD_CPU_GPU_CV", "VDD_SOC"], None),
        (
            "VDD_CPU_GPU_CV ",
            "VDD_CPU_GPU_CV  SOMETHING_NEW at all ",
            ["VDD_CPU_GPU_CV"],
            ["VDD_CPU_GPU_CV", "SOMETHING_NEW", "at", "all 7104mW/4944mW"],
        ),
        ("APE 200", "APE", [], ["APE"]),
        ("APE 200", "FAN 200", [], ["FAN 200"]),
        ("APE 200", "PWM 12/255 UPTIME 12:30 NAME", [], ["PWM 12/255", "UPTIME 12:30", "NAME"]),
    ],
)
def test_field_that_says_something_else_is_left_out_alone(
    old: str, new: str, gone: list[str], unknown: list[str] | None
) -> None:
    assert ORIN_NANO_LINE.count(old) == 1
    line = parsed(ORIN_NANO_LINE.replace(old, new) + "\n")
    assert replace(line, unknown=()) == without(parsed(ORIN_NANO_LINE), *gone)
    assert line.unknown if unknown is None else list(line.unknown) == unknown


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        (" ", "  ", {}),
        (" ", "\t", {}),
        (" ", " \t \r ", {}),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ 99 %@[612]", {}),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ 99 % @ [ 612 ]", {}),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ 0 %@[612,off,300]", {"GR3D": Load(0, (612, 300))}),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ 99 %", {"GR3D": Load(99)}),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ 99%@612", {}),
        ("GR3D_FREQ 99%@[612]", "GR3D_FREQ @[612]", {"GR3D": Load(None, (612,))}),
        ("GR3D_FREQ 99%@[612]", "GR3D 99%@612", {}),
        ("EMC_FREQ 61%@2133", "EMC 61 %@ 2133", {}),
        ("RAM 6712/7620MB (lfb 12x4MB)", "RAM 6712 / 7620 MB(lfb 12x4MB)", {}),
        ("(lfb 12x4MB)", "(lfb 12x4MB) (lfb 12x4MB)", {}),
        ("(cached 8MB)", "(cached 8MB) IRAM 0/252kB(lfb 252kB)", {}),
        ("(cached 8MB)", "(cached 8MB) IRAM 0/252MB", {}),
        ("(cached 8MB)", "(cached 8MB) IRAM 0/252kB (lfb 252kB) IRAM 3/1MB", {}),
        ("CPU [", "cpu [", {}),
        (",2%@729", " , 2 % @ 729", {}),
        ("cpu@57.125C", "cpu@57.125C/61C", {}),
        ("cpu@57.125C", "cpu@ 57.125 C / 61 C", {}),
        ("tj@58.312C", "tj@58.312C CV1@-256C CV2@-256.0C", {}),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 3120 mW/3659 mW", {}),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 3120mW / 3659mW / 9999mW NC 1mW/2mW NC 3mW/4mW", {}),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 3120mW", {}),
        ("VDD_SOC 3120mW/3659mW", "VDD_SOC 3120mW/36", {}),
        ("10-08-2026 04:35:02 ", "", {}),
        ("10-08-2026 04:35:02 ", "10-08-2026 04:35 ", {}),
        ("10-08-2026 04:35:02 ", "2026-10-08T04:35:02 ", {}),
        ("10-08-2026 04:35:02 ", "2026-10-08T04:35:02Z ", {}),
        ("10-08-2026 04:35:02 ", "2026-10-08T04:35:02.123456+02:00 ", {}),
        ("10-08-2026 04:35:02 ", "2026-10-08 04:35:02,123 +0200 ", {}),
        ("10-08-2026 04:35:02 ", "[10/08/2026, 4:35:02 AM CEST]: ", {}),
        ("10-08-2026 04:35:02 ", "Thu Oct 8 04:35:02 2026 ", {}),
        ("10-08-2026 04:35:02 ", "Thu 08 Oct 2026 04:35:02 AM UTC ", None),
        ("10-08-2026 04:35:02 ", "1791426902.123 ", {}),
        ("10-08-2026 04:35:02 ", "04:35:02 ", {}),
    ],
)
def test_the_same_in_other_words(old: str, new: str, changed: dict[str, Load] | None) -> None:
    """`changed`: units that the other words tell otherwise; None where a part of the words is unknown."""
    whole = parsed(ORIN_NANO_LINE)
    assert old in ORIN_NANO_LINE
    line = parsed(ORIN_NANO_LINE.replace(old, new) + "\r\n")
    assert replace(line, unknown=()) == replace(whole, units={**whole.units, **(changed or {})})
    assert (line.unknown == ()) is (changed is not None)


@pytest.mark.parametrize(
    "text", ["", "\n", "RAM", "tegrastats: Permission denied", "\ufffd\0\x01", "5 5 5 % @ [", "RAM x"]
)
def test_other_texts_are_no_line(text: str) -> None:
    assert parse_line(text) is None


def test_two_lines_in_one_are_none() -> None:
    assert parse_line(f"{ORIN_NANO_LINE}\n{ORIN_NANO_LINE}") is None
    assert parse_line(f"{ORIN_NANO_LINE} {AGX_ORIN_LINE}") is None
    assert parse_line("RAM 1/2MB CPU [off] CPU [off]") is None


@pytest.mark.parametrize("begin", ["DD_IN 5mW/5mW", "SOC 5mW/5mW", "PU@40C", "VDD_IN 5mW/5mW", "GPU 5/5"])
def test_first_field_of_a_line_without_its_head_is_not_believed(begin: str) -> None:
    """`SOC` may be the rest of `VDD_SOC`."""
    line = parsed(f"{begin} tj@41C VDD_GPU 7mW/7mW\n")
    assert (line.power_mw, line.temperatures_c, line.unknown) == ({"VDD_GPU": 7}, {"tj": 41.0}, (begin,))


# --- properties ------------------------------------------------------------------------------------------------------


def assert_part_of(part: TegrastatsLine | None, whole: TegrastatsLine) -> None:
    """`part` is None, or all that it says is what `whole` says."""
    if part is None:
        return
    ram = (part.ram_used_bytes, part.ram_total_bytes)
    assert ram in ((None, None), (whole.ram_used_bytes, whole.ram_total_bytes))
    swap = (part.swap_used_bytes, part.swap_total_bytes)
    assert swap in ((None, None), (whole.swap_used_bytes, whole.swap_total_bytes))
    assert len(part.cores) in (0, len(whole.cores))
    for core, of_whole in zip(part.cores, whole.cores, strict=bool(part.cores)):
        assert core == of_whole or (core and of_whole and core == Load(of_whole.percent)), "a clock may be left out"
    assert part.power_mw.items() <= whole.power_mw.items()
    assert part.temperatures_c.items() <= whole.temperatures_c.items()
    for unit, load in part.units.items():
        assert load in (whole.units[unit], Load(whole.units[unit].percent))


def parsed(text: str) -> TegrastatsLine:
    line = parse_line(text)
    assert line is not None, text
    return line


@pytest.mark.parametrize("text", LINES, ids=lambda text: text[-20:])
def test_cut_anywhere_a_line_gives_no_wrong_value(text: str) -> None:
    for length in range(len(text)):
        assert_part_of(parse_line(text[:length]), parsed(text))


@given(st.sampled_from(LINES), st.integers(0, 999), st.sampled_from(" %@[]()"))
def test_one_separator_too_many_gives_no_wrong_value(text: str, at: int, extra: str) -> None:
    at %= len(text)
    assert_part_of(parse_line(text[:at] + extra + text[at:]), parsed(text))


@given(st.sampled_from(LINES), st.integers(0, 999))
def test_one_separator_too_few_gives_no_wrong_value(text: str, which: int) -> None:
    places = [index for index, sign in enumerate(text) if sign in " /%@[]()"]
    at = places[which % len(places)]
    assert_part_of(parse_line(text[:at] + text[at + 1 :]), parsed(text))


KNOWN_FIELD = re.compile(r"RAM|CPU|cpu|.*@.*C|.*mW.*|.*/.*|(VDD|VIN|POM|NC|GPU|SOC|CV|SYS).*|.*_|[MB]")
"""Words that are a field or a part of one themselves, so that a line with them says something else."""

words = st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1, max_size=8)
unknown_fields = st.one_of(
    words,
    st.builds("{} {}".format, words, words),
    st.sampled_from(
        ["FAN 30%", "FOO 12", "PWM off", "NEW_FREQ 0%@[1,2]", "nvme0 12GB", "(new 3)", "\ufffd", "%", "@", "99"]
    ),
).filter(lambda text: not any(KNOWN_FIELD.fullmatch(word) for word in text.split()))
blanks = st.text(" \t\r\x0b\xa0", min_size=1, max_size=4)


def fields_of(text: str) -> list[str]:
    """The fields of a recorded line, with nothing inside of them parted."""
    return re.findall(r"MTS fg \S+ bg \S+|\([^)]*\)|(?:RAM|SWAP|IRAM) [^ (]+|[A-Z0-9_a-z]+ (?![\w]+@)\S+|\S+", text)


@given(st.data(), st.sampled_from(LINES))
def test_unknown_fields_and_blanks_between_fields_change_no_power_and_no_temperature(
    data: st.DataObject, text: str
) -> None:
    whole, line = parsed(f"{text}\n"), ""
    for field in fields_of(text.removeprefix(text[:20] if text[2] == "-" else "")):
        line += field + data.draw(blanks)
        if data.draw(st.integers(0, 4)) == 0:
            line += data.draw(unknown_fields) + data.draw(blanks)
    read = parsed(f"{line}\n")
    note(repr(line))
    assert read.power_mw == whole.power_mw
    assert read.temperatures_c == whole.temperatures_c
    assert (read.ram_used_bytes, read.ram_total_bytes) == (whole.ram_used_bytes, whole.ram_total_bytes)


@given(st.sampled_from(LINES), st.integers(0, 999), st.integers(0, 999), st.text(max_size=8))
def test_no_damage_raises(text: str, begin: int, end: int, junk: str) -> None:
    parse_line(text[: begin % len(text)] + junk + text[end % len(text) :])


@given(st.text())
def test_no_text_raises(text: str) -> None:
    parse_line(text)
    parse_line(f"RAM 1/2MB {text}")


@dataclass(frozen=True)
class Dialect:
    """How a board spells a line."""

    date: str
    swap: bool
    bracketed: bool
    percent: bool
    clock: bool
    unit: str
    powers: int
    temperatures: int

    def load(self, load: Load) -> str:
        text = "" if load.percent is None else f"{load.percent}%"
        if not load.clocks_mhz:
            return text
        if self.bracketed:
            return f"{text}@[{','.join(map(str, load.clocks_mhz))}]"
        return f"{text}@{load.clocks_mhz[0]}"

    def line(self, line: TegrastatsLine) -> str:
        assert line.ram_used_bytes is not None and line.ram_total_bytes is not None, "every line says so"
        fields = [f"RAM {line.ram_used_bytes // MB}/{line.ram_total_bytes // MB}MB (lfb 1x4MB)"]
        if line.swap_used_bytes is not None and line.swap_total_bytes is not None:
            fields.append(f"SWAP {line.swap_used_bytes // MB}/{line.swap_total_bytes // MB}MB (cached 3MB)")
        spelled = ["off" if core is None else f"{core.percent}%@{core.clocks_mhz[0]}" for core in line.cores]
        fields.append(f"CPU [{','.join(spelled)}]")
        fields += [f"{unit}_FREQ {self.load(load)}" for unit, load in line.units.items()]
        fields += ["VIC off", "APE 174", "NVDLA0_FREQ @1600", "CV9@-256C"]
        for name, celsius in line.temperatures_c.items():
            fields.append(f"{name}@" + "/".join(f"{celsius:g}C" for _ in range(self.temperatures)))
        for name, mw in {**line.power_mw, "NC": 7}.items():
            values = [mw, *range(90, 89 + self.powers)]
            fields.append(f"{name} " + "/".join(f"{value}{self.unit}" for value in values))
        return self.date + " ".join(fields) + "\n"


@st.composite
def dialects_and_lines(draw: st.DrawFn) -> tuple[Dialect, TegrastatsLine]:
    dialect = Dialect(
        date=draw(st.sampled_from(["", "10-08-2026 04:35:02 "])),
        swap=draw(st.booleans()),
        bracketed=draw(st.booleans()),
        percent=draw(st.booleans()),
        clock=draw(st.booleans()),
        unit=draw(st.sampled_from(["mW", ""])),
        powers=draw(st.integers(1, 3)),
        temperatures=draw(st.integers(1, 2)),
    )
    numbers = st.integers(0, 200_000)
    percents = st.integers(0, 100)
    clocks = st.integers(0, 9999)
    parts = st.lists(clocks, min_size=1, max_size=3 if dialect.bracketed else 1).map(tuple)
    loads: st.SearchStrategy[Load] = {
        (True, True): st.builds(Load, percents, parts),
        (True, False): st.builds(Load, percents),
    }.get((dialect.percent, dialect.clock), st.builds(Load, st.none(), parts))
    ram, swap = sorted(draw(st.tuples(numbers, numbers))), sorted(draw(st.tuples(numbers, numbers)))
    rails = st.sampled_from(["VDD_IN", "VDD_CPU_CV", "VIN_SYS_5V0", "POM_5V_GPU", "VIN"])
    powers: Mapping[str, int] = draw(st.dictionaries(rails, numbers))
    line = TegrastatsLine(
        ram_used_bytes=ram[0] * MB,
        ram_total_bytes=ram[1] * MB,
        swap_used_bytes=swap[0] * MB if dialect.swap else None,
        swap_total_bytes=swap[1] * MB if dialect.swap else None,
        cores=tuple(
            draw(
                st.lists(
                    st.one_of(st.none(), st.builds(lambda percent, mhz: Load(percent, (mhz,)), percents, clocks)),
                    min_size=1,
                    max_size=14,
                )
            )
        ),
        units=draw(st.dictionaries(st.sampled_from(["EMC", "GR3D", "GR3D2"]), loads)),
        temperatures_c=draw(
            st.dictionaries(
                st.sampled_from(["cpu", "gpu", "tj", "SOC0"]),
                st.integers(-40_000, 120_000).map(lambda milli: milli / 1e3),
            )
        ),
        power_mw=powers,
    )
    return dialect, line


@given(dialects_and_lines())
def test_every_dialect_is_read_back(given_line: tuple[Dialect, TegrastatsLine]) -> None:
    dialect, line = given_line
    assert parse_line(dialect.line(line)) == line


@given(dialects_and_lines(), st.integers(0, 9999))
def test_every_dialect_cut_anywhere_gives_no_wrong_value(
    given_line: tuple[Dialect, TegrastatsLine], length: int
) -> None:
    dialect, line = given_line
    text = dialect.line(line)
    assert_part_of(parse_line(text[: length % len(text)]), line)
