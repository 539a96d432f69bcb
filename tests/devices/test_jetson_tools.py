from __future__ import annotations

import time
from pathlib import Path

import pytest
from fake_jetson import say, write_program

from eamdeploy.devices.jetson_tools import Clocks, PowerMode, ask, parse_clocks, parse_power_mode

CPU = "cpu{core}: Online={online} Governor=schedutil MinFreq={low} MaxFreq=1479000 CurrentFreq=825600 IdleStates: c7=1 "
GPU = "GPU MinFreq={low} MaxFreq=921600000 CurrentFreq=76800000"
EMC = "EMC MinFreq=204000000 MaxFreq=1600000000 CurrentFreq=1600000000 FreqOverride={held}"


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: 15W\n2\n", PowerMode("15W", 2)),
        ("NV Fan Mode:quiet\nNV Power Mode: MODE_15W_6CORE\n2\n", PowerMode("MODE_15W_6CORE", 2)),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: MAXN SUPER\n0", PowerMode("MAXN SUPER", 0)),
        ("NV Power Mode: MAXN\n", PowerMode("MAXN", None)),
        ("NV Power Mode: MAXN\nNVPM VERB: x\n 7 \n", PowerMode("MAXN", 7)),
        ("NV Power Mode:\n0\n", None),
        ("0\n", None),
        ("", None),
    ],
)
def test_power_mode_is_a_name_and_then_a_number(text: str, mode: PowerMode | None) -> None:
    assert parse_power_mode(text) == mode


@pytest.mark.parametrize(
    ("lines", "locked"),
    [
        ([CPU.format(core=0, online=1, low=1479000), GPU.format(low=921600000), EMC.format(held=1)], True),
        ([CPU.format(core=0, online=1, low=102000), GPU.format(low=921600000), EMC.format(held=1)], False),
        ([CPU.format(core=0, online=1, low=1479000), GPU.format(low=76800000), EMC.format(held=1)], False),
        ([CPU.format(core=0, online=1, low=1479000), GPU.format(low=921600000), EMC.format(held=0)], False),
        (
            [
                CPU.format(core=0, online=1, low=1479000),
                CPU.format(core=1, online=0, low=102000),
                GPU.format(low=921600000),
                "DLA0_CORE:   Online=1 MinFreq=0 MaxFreq=1600000000 CurrentFreq=1600000000",
            ],
            True,
        ),
        ([CPU.format(core=0, online=1, low=1479000)], None),
        ([CPU.format(core=0, online=1, low=102000)], False),
        (["something else"], None),
    ],
    ids=["all", "cpu", "gpu", "memory", "a core is off", "gpu not said", "gpu not said, cpu not held", "nothing"],
)
def test_locked_is_what_cpu_gpu_and_memory_are_together(lines: list[str], locked: bool | None) -> None:
    assert parse_clocks("\n".join(lines)).locked is locked


def test_clocks_are_megahertz_of_units_that_are_on() -> None:
    text = "\n".join(
        [
            "SOC family:tegra210  Machine:jetson-nano",
            CPU.format(core=0, online=1, low=102000),
            CPU.format(core=10, online=0, low=102000),
            GPU.format(low=1),
            EMC.format(held=0),
            "DLA0_CORE:   Online=1 MinFreq=0 MaxFreq=1600000000 CurrentFreq=844800000",
            "NV Power Mode: MAXN",
        ]
    )
    assert parse_clocks(text) == Clocks({"CPU0": 825.6, "GPU": 76.8, "EMC": 1600.0, "DLA0_CORE": 844.8}, False)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    return tmp_path


def test_program_is_asked(path: Path) -> None:
    write_program(path / "tool", say("hello"))
    assert ask("tool", "-q").text == "hello\n"


def test_program_that_hangs_is_left(path: Path) -> None:
    write_program(path / "tool", "#!/bin/sh\nsleep 9\necho late\n")  # whose child outlives it
    start = time.monotonic()
    said = ask("tool", timeout_s=0.2)
    assert (said.text, said.trouble) == (None, "`tool` did not end within 0.2 s")
    assert time.monotonic() - start < 5


def test_program_that_fails_is_quoted(path: Path) -> None:
    write_program(path / "tool", "#!/bin/sh\necho 'first' >&2\necho 'as a root user' >&2\nexit 1\n")
    assert ask("tool", "-q").trouble == "`tool -q` failed with exit code 1: as a root user"
    write_program(path / "tool", "#!/bin/sh\nexit 2\n")
    assert ask("tool").trouble == "`tool` failed with exit code 2: nothing said"
    write_program(path / "tool", "#!/nowhere/sh\n")
    assert ask("tool").trouble == "`tool` can't be run: No such file or directory"


def test_program_that_is_not_there(path: Path) -> None:
    assert ask("tool").trouble == "tool is not on PATH"


def test_numbers_that_no_board_has_are_no_clocks_and_no_mode() -> None:
    """Python refuses to read numbers of thousands of digits, and a state must not end a measurement."""
    digits = "9" * 5000
    assert parse_clocks(f"GPU MinFreq={digits} MaxFreq=1 CurrentFreq=1\n").clocks_mhz == {}
    mode = parse_power_mode(f"NV Power Mode: 15W\n{digits}\n")
    assert mode is not None and (mode.name, mode.number) == ("15W", None)
