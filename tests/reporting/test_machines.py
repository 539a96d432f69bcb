from __future__ import annotations

import pytest
from report_records import board_profile, device, engine, jetson, machine, on_jetson, profile

from eamdeploy.records.profile import Profile
from eamdeploy.reporting.records.machines import machine_facts, place
from eamdeploy.reporting.records.sources import ProfileSource

SPACE = "\N{NO-BREAK SPACE}"
BOARD = board_profile([on_jetson("x.plan", None, 2.0, 8000)], None, "A board")


def facts_of(measured: Profile) -> dict[str, str]:
    return {name: value.replace(SPACE, " ") for name, value in machine_facts(measured)}


@pytest.mark.parametrize(
    ("target", "words"), [(None, "A board, 6 cores"), ("ssh://pi5", "ssh://pi5 (A board, 6 cores)")]
)
def test_a_machine_goes_by_its_device_and_its_address(target: str | None, words: str) -> None:
    assert place(ProfileSource("p.json", "profile", BOARD, target)) == words


def test_a_processor_that_tells_nothing_has_no_lines_for_it() -> None:
    facts = facts_of(profile([engine("x", None, 1.0)]))
    assert facts["processor"] == "Made-up CPU" and facts["clock of core 0"] == "2995 MHz now, 3600 MHz at most"
    told = {"device", "software", "power mode", "temperatures", "clocks", "clocks locked", "throttling"}
    assert not told & set(facts)


def test_what_changed_meanwhile_is_there_twice() -> None:
    facts = facts_of(BOARD)
    assert (facts["device"], facts["software"]) == ("A board", "JetPack 6.2, L4T 36.4.3")
    assert facts["power mode"] == "15W (mode 0)" and facts["clocks locked"] == "no"
    assert facts["temperatures"] == "cpu-thermal 48 → 71 °C, gpu-thermal 47 → 73 °C"
    assert facts["clocks"] == "CPU0–5 729–1510 → 1510 MHz, GPU 612 MHz"
    assert facts["throttling"] == "none → cpu-throttle-alert is at 1 of 1"
    assert facts["load"] == "not told by the system"


def test_what_is_told_only_once_is_marked() -> None:
    after = jetson(hot=True).model_copy(
        update={"power_mode": "MAXN", "power_mode_id": None, "temperatures_c": {}, "clocks_locked": None}
    )
    facts = facts_of(BOARD.model_copy(update={"device_after": after}))
    assert facts["power mode"] == "15W (mode 0) → MAXN" and facts["clocks locked"] == "no → ?"
    assert facts["temperatures"] == "cpu-thermal 48 → ? °C, gpu-thermal 47 → ? °C"


def test_a_processor_that_slows_down_is_told_even_if_it_tells_nothing_else() -> None:
    slow = device(throttling=["Processor is at 3 of 10"])
    facts = facts_of(profile([engine("x", None, 1.0)], device_after=slow, machine=machine(governor=None)))
    assert facts["throttling"] == "none → Processor is at 3 of 10"


def test_units_of_one_kind_share_a_line() -> None:
    clocks = {"CPU0": 1000.0, "CPU1": 1000.0, "GPU": 600.0, "EMC": 2133.4}
    state = device(clocks_mhz=clocks, clocks_locked=True)
    facts = facts_of(profile([engine("x", None, 1.0)], device_before=state, device_after=state))
    assert facts["clocks"] == "CPU0–1 1000 MHz, GPU 600 MHz, EMC 2133 MHz"
    assert (facts["clocks locked"], facts["throttling"]) == ("yes", "none")
