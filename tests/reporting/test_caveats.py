from __future__ import annotations

from pathlib import Path

import pytest
from report_records import (
    PARITY,
    analysis,
    board_profile,
    card,
    digest,
    engine,
    evaluation,
    freezing,
    latency,
    manifest,
    on_jetson,
    power,
    profile,
    remote_profiles,
    speed_up,
    write_all,
)

from eamdeploy.artifacts.card import RANDOM_WARNING
from eamdeploy.artifacts.records import Record
from eamdeploy.devices.base import SensorNotes
from eamdeploy.reporting.prose.caveats import caveats
from eamdeploy.reporting.records.engine_names import engine_names
from eamdeploy.reporting.records.sources import Sources, read_sources

FROZEN = card(freezing())
RANDOM = card(freezing(), weights="random")


def caveats_of(folder: Path, records: dict[str, Record]) -> list[str]:
    sources = read_sources(write_all(folder, records))
    return caveats(sources, engine_names(sources))


def test_nothing_doubtful_gives_no_caveat(tmp_path: Path) -> None:
    records: dict[str, Record] = {
        "m.json": manifest("x.ort.onnx", FROZEN),
        "p.json": profile([engine("x.ort.onnx", FROZEN, 2.0, 1.1)], engine("b.ort.onnx", card(), 3.0)),
        "e.json": evaluation("x.ort.onnx", "b.ort.onnx"),
        "a.json": analysis(),
    }
    assert caveats_of(tmp_path, records) == []


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (manifest("x.ort.onnx", RANDOM), RANDOM.timm_model),
        (profile([engine("x.ort.onnx", RANDOM, 2.0)]), RANDOM.timm_model),
        (profile([engine("x.ort.onnx", None, 2.0)], engine("b.ort.onnx", RANDOM, 2.0)), RANDOM.timm_model),
        (evaluation("x.ort.onnx", None, weights="random"), "x.ort.onnx"),
        (analysis(weights="random"), RANDOM.timm_model),
    ],
)
def test_random_weights_are_told_whichever_record_says_so(tmp_path: Path, record: Record, name: str) -> None:
    assert caveats_of(tmp_path, {"x.json": record}) == [f"{name}: {RANDOM_WARNING}"]


@pytest.mark.parametrize("reference", [None, "b.ort.onnx"])
def test_labels_in_doubt_are_told(tmp_path: Path, reference: str | None) -> None:
    doubtful = evaluation("x.ort.onnx", reference, 7.5, labels_in_doubt=True)
    whose, top1 = ("the model's", "7.5") if reference is None else ("the reference's", "72.2")
    assert caveats_of(tmp_path, {"e.json": doubtful}) == [
        f"x.ort.onnx: {whose} top-1, {top1} % of 500 images, is no better than guessing among 10 classes: "
        "the labels probably do not belong to the model"
    ]


def test_parity_that_was_not_checked_or_failed_is_told_once_for_each_engine(tmp_path: Path) -> None:
    failed = PARITY.model_copy(update={"passed": False, "reason": "max |Δ logit| 3 > 0.002"})
    records: dict[str, Record] = {
        "m.json": manifest("x.ort.onnx", FROZEN, parity=None),
        "p.json": profile(
            [engine("x.ort.onnx", FROZEN, 2.0, parity=None), engine("y.ort.onnx", FROZEN, 2.0, parity=failed)]
        ),
    }
    assert caveats_of(tmp_path, records) == [
        "x.ort.onnx: its parity was not checked",
        "y.ort.onnx: its parity check failed: max |Δ logit| 3 > 0.002",
    ]


def test_unsteady_times_are_told_for_the_baseline_too_and_name_the_machine_if_there_are_two(tmp_path: Path) -> None:
    shaky = profile([engine("x", FROZEN, 2.0)], engine("b", card(), 3.0, latency=latency(3.0, warning="shaky")))
    assert caveats_of(tmp_path / "one", {"p.json": shaky}) == ["b: shaky"]
    both = caveats_of(tmp_path / "two", {"p.json": shaky, "q.json": profile([engine("x", FROZEN, 2.0)])})
    assert both == ["b on Made-up CPU: shaky"]


def test_what_devices_say_of_themselves_is_told_once_and_named(tmp_path: Path) -> None:
    board = board_profile([on_jetson("x.plan", FROZEN, 2.0, 8000)], None, "A board")
    lock = "A board: clocks are not locked, so that times vary with the load before. Lock them with: sudo jetson_clocks"
    slow = "A board: slowed down at the end of the measurement: cpu-throttle-alert is at 1 of 1"
    assert caveats_of(tmp_path, {"p.json": board}) == [slow, lock]


def test_doubtful_power_is_told(tmp_path: Path) -> None:
    used = power(8000, 2.0, warnings=["few readings"])
    assert caveats_of(tmp_path, {"p.json": profile([engine("x", FROZEN, 2.0, power=used)])}) == ["x: few readings"]


def test_what_a_sensor_could_not_read_is_told_with_its_machine(tmp_path: Path) -> None:
    notes = SensorNotes(
        source="tegrastats",
        skipped=2,
        skipped_example="Segmentation fault",
        left_out=40,
        left_out_example="FOO 12",
        failure="tegrastats ended by itself; got exit code 4: gone",
    )
    found = caveats_of(tmp_path, {"p.json": profile([engine("x", FROZEN, 2.0)], sensor=notes)})
    assert found == [
        "Made-up CPU: power is missing or incomplete: tegrastats ended by itself; got exit code 4: gone",
        "Made-up CPU: tegrastats: 2 readings could not be understood and were skipped, e.g. 'Segmentation fault'",
        "Made-up CPU: tegrastats: 40 fields could not be read or are not known here and were left out, e.g. 'FOO 12'",
    ]


def test_a_speed_up_of_one_sitting_is_told(tmp_path: Path) -> None:
    once = engine("x", FROZEN, 2.0, speed_up=speed_up(1.1, sittings=1))
    assert caveats_of(tmp_path, {"p.json": profile([once], engine("b", card(), 2.2))}) == [
        "x: its speed-up rests on one sitting; the interval does not hold what another would give"
    ]


def test_machines_without_figures_are_told_and_the_others_go_by_their_address(tmp_path: Path) -> None:
    found = caveats_of(tmp_path, {"p.json": remote_profiles()})
    assert found[0] == f"{tmp_path / 'p.json'}: a machine gave no figures: ssh://pi5 can't be reached: no route to host"
    assert [line.partition(": ")[0] for line in found[1:]] == 2 * ["ssh://nvidia@orin.lan"] + 2 * ["ssh://agx.lan:2222"]


def test_figures_of_another_build_are_told(tmp_path: Path) -> None:
    old = manifest("x.ort.onnx", FROZEN, engine_digest=digest("older"))
    path = str(tmp_path / "x.ort.onnx")
    records: dict[str, Record] = {
        "x.ort.onnx.json": old,
        "p.json": profile([engine(path, FROZEN, 2.0)]),
        "e.json": evaluation(path, None, model_digest=digest("oldest")),
    }
    assert caveats_of(tmp_path, records) == [
        "x.ort.onnx: its manifest describes another build than the one that was measured",
        "x.ort.onnx: its accuracy is that of another build than the one described or measured",
    ]


def test_builds_on_two_boards_are_no_contradiction(tmp_path: Path) -> None:
    records: dict[str, Record] = {
        f"{board}.json": profile([engine("x.plan", FROZEN, 2.0, digest=digest(board))]) for board in ("a", "b")
    }
    assert caveats_of(tmp_path, records) == []


def test_a_file_that_changed_after_its_run_is_told(tmp_path: Path) -> None:
    sources = read_sources(write_all(tmp_path, {"e.json": evaluation("x", None)}))
    told = caveats(Sources(sources.items, ("out/profile.json",)), engine_names(sources))
    assert told == ["out/profile.json: it is no longer what its run.json says was written; run again"]
