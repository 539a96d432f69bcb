"""A small share of `make campaign` and `make campaign-kill`, and proof that they notice what they are for."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from random import Random
from types import MappingProxyType

import campaign
import numpy as np
import pytest
from hostile import judging
from hostile.byte_mutations import BYTE_MUTATIONS
from hostile.fake_judge import FakeJudge
from hostile.good_files import make_good_files
from hostile.jobs import Job, Verdict
from hostile.judging import OLD, Judge
from hostile.kill_targets import read_outputs
from hostile.killing import Killed, Target, eamdeploy, kill_once, measure
from hostile.sources import OUT, SOURCES, Source
from hostile.tally import Finding, Tally
from hostile.workers import judge_all
from report_records import rich_records, write_all

from eamdeploy.artifacts.files import digest_file
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.parity.reference_set import reference_path

SHARE = 220


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("campaign") / "good"
    make_good_files(folder)
    return folder


@pytest.fixture(autouse=True)
def restore(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A judge changes the working directory and where temporary files go."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = tempfile.tempdir
    yield
    tempfile.tempdir = before


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


# --- hurt inputs -----------------------------------------------------------------------------------------------------


def test_a_share_of_the_campaign_finds_nothing(good: Path, scratch: Path) -> None:
    judge, tally = Judge(good, scratch), Tally()
    for job in campaign.plan(SHARE, seed=11):
        verdict = judge.judge(job)
        assert verdict.finding is None, (job, verdict)
        tally.add(job, verdict)
    assert set(tally.counts) == set(SOURCES)
    refused = sum(count for outcome, count in tally.total.items() if outcome.startswith("refused: "))
    assert refused > SHARE / 2 and tally.total["right"] > 0


def test_jobs_are_shared_out_as_the_table_says() -> None:
    jobs = campaign.plan(10_000, seed=1)
    assert abs(len(jobs) - 10_000) < 50
    assert jobs == campaign.plan(10_000, seed=1) != campaign.plan(10_000, seed=2)
    assert len(set(jobs)) == len(jobs)
    heaviest = max(SOURCES.values(), key=lambda source: source.share).name
    counts = {name: sum(job.source == name for job in jobs) for name in SOURCES}
    assert min(counts.values()) > 0 and max(counts, key=lambda name: counts[name]) == heaviest
    assert {job.source for job in campaign.plan(20, 1, only="engine")} == {"engine"}


def test_every_mutation_can_be_made_and_made_again(good: Path, scratch: Path) -> None:
    judge = Judge(good, scratch)
    for name, source in SOURCES.items():
        data = (good / source.file).read_bytes()
        made = [judge.hurt(Job(name, index, 4)) for index in range(6)]
        assert made == [judge.hurt(Job(name, index, 4)) for index in range(6)]
        assert source.strangely_named or any(hurt != data for _, hurt in made), name


@pytest.mark.parametrize("data", [b"", b"a", b"0123456789" * 30])
def test_mutations_of_bytes_take_any_file(data: bytes) -> None:
    for mutation in BYTE_MUTATIONS.values():
        hurt = [mutation(data, Random(seed), [b"another"]) for seed in range(20)]
        assert len(data) < 100 or any(each != data for each in hurt), mutation.__name__


def hurt_bytes(data: bytes, rng: Random, others: object) -> bytes:
    return data[:-1] + b"!"


def source_that(read: Callable[[Path], str], **more: object) -> Mapping[str, Source]:
    """The table with one kind of file, which is read so."""
    table = {"x": Source("x", "classes.txt", read, 1, special={"hurt": hurt_bytes}, only_special=True, **more)}  # type: ignore[arg-type]
    return MappingProxyType(table)


def good_or(misdeed: Callable[[Path], str]) -> Callable[[Path], str]:
    """Reads the good file well, and does the misdeed with a hurt one."""
    return lambda path: misdeed(path) if path.read_bytes().endswith(b"!") else "good"


def raise_value_error(path: Path) -> str:
    raise ValueError("a bug of ours")


def refuse(path: Path) -> str:
    raise CheckpointError(f"{path} is damaged")


def overwrite_and_refuse(path: Path) -> str:
    (path.parent / OUT / "x.json").write_bytes(b"half")
    return refuse(path)


def leave_a_file_and_refuse(path: Path) -> str:
    (path.parent / OUT / ".x.json.abcdefgh.partial").write_bytes(b"half")
    return refuse(path)


def leave_a_temporary_file_and_refuse(path: Path) -> str:
    with tempfile.NamedTemporaryFile(delete=False):
        return refuse(path)


def change_the_input(path: Path) -> str:
    path.write_bytes(b"mended")
    return "good"


def take_memory(path: Path) -> str:
    np.ones(100 << 20, np.uint8)
    return "good"


def leave_by_the_back_door(path: Path) -> str:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("misdeed", "finding"),
    [
        (raise_value_error, "ValueError at test_campaign.py"),
        (leave_by_the_back_door, "SystemExit at test_campaign.py"),
        (overwrite_and_refuse, "files changed by a refusal"),
        (leave_a_file_and_refuse, "files changed by a refusal"),
        (leave_a_temporary_file_and_refuse, "files changed by a refusal"),
        (change_the_input, "inputs changed"),
        (take_memory, "memory"),
        (lambda path: "other", None),
        (refuse, None),
    ],
)
def test_a_judge_notices(
    good: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    misdeed: Callable[[Path], str],
    finding: str | None,
) -> None:
    monkeypatch.setattr(judging, "SOURCES", source_that(good_or(misdeed)))
    monkeypatch.setattr(judging, "MEMORY_LIMIT", 50 << 20)
    verdict = Judge(good, scratch).judge(Job("x", 0, 0))
    assert verdict.finding == finding if finding is None else str(verdict.finding).startswith(finding), verdict


@pytest.mark.parametrize(("sealed", "finding"), [("beside", "something else was read"), ("inside", None), ("no", None)])
def test_a_judge_holds_sealed_files_to_what_they_were(
    good: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, sealed: str, finding: str | None
) -> None:
    """A file with a seal inside that the mutation took out is no sealed file any more."""
    monkeypatch.setattr(judging, "SOURCES", source_that(good_or(lambda path: "other"), sealed=sealed))
    verdict = Judge(good, scratch).judge(Job("x", 0, 0))
    assert str(verdict.finding).startswith(finding or "None")


@pytest.mark.parametrize(
    ("command", "finding"),
    [
        (lambda path: ["inspect", path], "None"),  # a file of no known kind is refused in one line
        (lambda path: ["nosuch", path], "nosuch: no error in one line"),
        (lambda path: ["doctor", "--json"], "doctor: a command took what is refused elsewhere"),
    ],
)
def test_a_judge_notices_how_commands_end(
    good: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[[Path], list[object]],
    finding: str,
) -> None:
    monkeypatch.setattr(judging, "SOURCES", source_that(good_or(refuse), sealed="beside", command=command))
    judge = Judge(good, scratch)
    judge._normal["x"] = judging._Normal("good", 1 << 40)
    assert str(judge.judge(Job("x", 0, 0)).finding) == finding


def test_workers_survive_what_kills_a_process(tmp_path: Path) -> None:
    """Two hang: one for good, and one that was slow by chance and gets a second try."""
    jobs = [Job(source, index, 0) for index in range(2) for source in ("fine", "crash", "exit")]
    jobs += [Job("hang", 0, 0), Job("slow once", 0, 0), Job("fine", 7, 0)]
    (tmp_path / "good").mkdir()
    folders = tmp_path / "good", tmp_path / "scratch"
    told = list(judge_all(jobs, *folders, workers=2, limit_s=3.0, first_s=0.0, make_judge=FakeJudge))
    found = {(job.source, job.index): verdict for job, verdict in told}
    assert len(found) == len(told) == len(jobs)
    assert {key: verdict.finding for key, verdict in found.items()} == {
        **{("fine", index): None for index in (0, 1, 7)},
        **{("crash", index): "crash" for index in (0, 1)},
        **{("exit", index): "crash" for index in (0, 1)},
        ("hang", 0): "hang",
        ("slow once", 0): None,
    }
    assert "-11" in found["crash", 0].details and "3" in found["exit", 0].details


def test_the_table_counts_every_outcome_and_names_every_finding() -> None:
    tally = Tally()
    tally.add(Job("engine", 0, 1), Verdict("flip_bit", "refused: EngineError", seconds=2.0))
    tally.add(Job("engine", 1, 1), Verdict("flip_bit", "right", extra_bytes=3 << 20))
    tally.add(Job("plan", 0, 1), Verdict("extend", "", "crash"))
    tally.findings.append(Finding("plan", 0, 1, "extend", "crash", "exit code -11", "build/x"))
    lines = tally.in_markdown().splitlines()
    assert lines[0] == "| file | inputs | finding | right | refused: EngineError |"
    assert lines[2:5] == ["| engine | 2 |  | 1 | 1 |", "| plan | 1 | 1 |  |  |", "| all | 3 | 1 | 1 | 1 |"]
    assert lines[-1] == "FINDING (1): plan: crash (extend; build/x)"
    assert "2.0 s (engine 0, flip_bit)" in tally.in_markdown() and "3 MiB (engine 1" in tally.in_markdown()
    assert json.loads(json.dumps(tally.in_json()))["findings"][0]["details"] == "exit code -11"


# --- kills -----------------------------------------------------------------------------------------------------------

WRITE_WHOLE = "write_bytes(path, b'new' * 1000)"
WRITE_IN_PLACE = """
with path.open("wb") as file:
    for _ in range(500):
        file.write(b"newnew"); file.flush(); time.sleep(0.001)
"""
GIVE_UP_AFTER_A_CRASH = """
if list(path.parent.glob(".*.partial")): sys.exit("a leftover")
write_bytes(path, b"new" * 1000)
"""


def digests(folder: Path) -> Mapping[str, str]:
    return {file.name: digest_file(file) for file in folder.iterdir() if not file.name.startswith(".")}


def writer(folder: Path, program: str) -> Target:
    """A program that writes `out/x` over what is there."""
    (folder / "start" / "out").mkdir(parents=True)
    (folder / "start" / "out" / "x").write_bytes(OLD)
    imports = "import os, sys, time; from pathlib import Path; from eamdeploy.artifacts.files import write_bytes\n"
    return Target("writer", [sys.executable, "-c", f"{imports}path = Path('out/x')\n{program}"], "out", digests)


def kill(target: Target, folder: Path, count: int) -> Killed:
    known, told = measure(target, folder / "start", folder / "scratch"), Killed(target.name)
    for index in range(count):
        kill_once(target, known, folder / "start", folder / "scratch", Random(index), told)
    assert sum(told.states.values()) == count
    return told


def test_a_file_that_appears_whole_survives_kills(tmp_path: Path) -> None:
    assert kill(writer(tmp_path, WRITE_WHOLE), tmp_path, 4).findings == []


def test_a_file_that_is_written_in_place_is_found_torn(tmp_path: Path) -> None:
    told = kill(writer(tmp_path, WRITE_IN_PLACE), tmp_path, 4)
    assert any("neither old nor new: x" in finding for finding in told.findings), told


def test_a_next_run_that_fails_is_found(tmp_path: Path) -> None:
    target = writer(tmp_path, GIVE_UP_AFTER_A_CRASH)
    known = measure(target, tmp_path / "start", tmp_path / "scratch")
    (tmp_path / "start" / "out" / ".x.abcdefgh.partial").write_bytes(b"half")
    told = Killed("writer")
    kill_once(target, known, tmp_path / "start", tmp_path / "scratch", Random(0), told)
    assert any("the next run failed: a leftover" in finding for finding in told.findings)


def test_results_that_contradict_each_other_are_told_from_torn_ones(tmp_path: Path) -> None:
    def read(folder: Path) -> Mapping[str, str]:
        if (folder / "x").read_bytes() not in (OLD, b"new" * 1000):
            raise ConfigError("noticed")
        return digests(folder)

    target = writer(tmp_path, WRITE_IN_PLACE)
    told = kill(Target(target.name, target.words, "out", read), tmp_path, 3)
    assert any(state.startswith("old and new, noticed") for state in told.states)
    assert any("neither old nor new: x" in finding for finding in told.findings)


def test_a_few_kills_of_build_ort_find_nothing(eam_model: Path, eam_engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "start" / "out"
    out.mkdir(parents=True)
    for file in (eam_engine, eam_engine.with_name(f"{eam_engine.name}.json")):
        shutil.copy(file, out / file.name.replace("tiny", "x"))
    twin = eam_model.with_name("base.onnx")
    for file in (twin, reference_path(twin)):
        shutil.copy(file, tmp_path / "start")
    words = eamdeploy("build-ort", "base.onnx", "-o", "out/x.ort.onnx", "--threads", 1)
    told = kill(Target("build-ort", words, "out", read_outputs), tmp_path, 4)
    assert told.findings == []


def test_a_few_kills_of_report_find_nothing(tmp_path: Path) -> None:
    start = tmp_path / "start"
    (start / "out").mkdir(parents=True)
    for name in ("x.html", "x.md"):
        (start / "out" / name).write_bytes(OLD)
    files = write_all(start, rich_records())
    words = eamdeploy("report", *(file.name for file in files), "-o", "out/x.html", "--markdown", "out/x.md")
    told = kill(Target("report", words, "out", digests), tmp_path, 3)
    assert told.findings == []
