from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_records import (
    analysis,
    card,
    device,
    engine,
    evaluation,
    freezing,
    manifest,
    profile,
    remote_profiles,
    write_all,
)

from eamdeploy.artifacts.files import digest_file
from eamdeploy.artifacts.records import Record
from eamdeploy.artifacts.run_state import RunState, StageState
from eamdeploy.artifacts.seal import SEAL
from eamdeploy.engines.manifest import Manifest
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.records.profile import Profile
from eamdeploy.reporting.records.sources import read_sources


def test_files_keep_their_order_and_count_once(tmp_path: Path) -> None:
    first, second = write_all(tmp_path, {"b.json": evaluation("x", None), "a.json": evaluation("y", None)})
    sources = read_sources([first, second, tmp_path / "." / "b.json"])
    assert [(item.file, item.kind) for item in sources.items] == [
        (str(first), "evaluation"),
        (str(second), "evaluation"),
    ]
    assert [item.record.model for item in sources.of(EvaluationReport)] == ["x", "y"]
    assert sources.of(Profile) == []


def test_a_checkpoint_gives_its_header_and_the_frozen_shares(eam_checkpoint: Path) -> None:
    (item,) = read_sources([eam_checkpoint]).checkpoints
    assert item.digest == digest_file(eam_checkpoint)
    assert item.record.freezing.heads == {"blocks.0.attn": [1], "blocks.1.attn": [0, 1]}
    assert item.shares == {"blocks.0.attn": [1.0], "blocks.1.attn": [1.0, 1.0]}


def test_profiles_of_machines_are_profiles_under_their_addresses(tmp_path: Path) -> None:
    files = write_all(tmp_path, {"one.json": profile([engine("x", None, 1.0)]), "boards.json": remote_profiles()})
    sources = read_sources(files)
    assert [(item.target, item.hardware, item.short_name) for item in sources.profiles] == [
        (None, "Made-up CPU", "Made-up CPU"),
        ("ssh://nvidia@orin.lan", "NVIDIA Jetson Orin Nano (made up)", "ssh://nvidia@orin.lan"),
        ("ssh://agx.lan:2222", "NVIDIA Jetson AGX Orin (made up)", "ssh://agx.lan:2222"),
    ]
    assert [item.label for item in sources.profiles[:2]] == [str(files[0]), f"{files[1]}, ssh://nvidia@orin.lan"]
    assert [item.engine for item in sources.profiles[1].engines] == ["out/base.plan", "out/model.plan"]


def test_a_gpu_is_named_beside_its_processor(tmp_path: Path) -> None:
    on_gpu = profile([engine("x.plan", None, 1.0)], device_before=device(kind="cuda", name="A GPU"))
    (source,) = read_sources(write_all(tmp_path, {"p.json": on_gpu})).profiles
    assert source.hardware == "A GPU, Made-up CPU"


# --- run.json --------------------------------------------------------------------------------------------------------


def finish(folder: Path, names: list[str], wrong: str | None = None) -> Path:
    """A `run.json` whose stages wrote these files, one of them another file than is there now."""
    outputs = {name: digest_file(folder / name) if name != wrong else "sha256:0" for name in names}
    RunState(stages={"all": StageState(inputs="", outputs=outputs)}).write(folder / "run.json")
    return folder / "run.json"


def test_a_run_stands_for_what_its_stages_wrote_that_can_be_shown(tmp_path: Path) -> None:
    write_all(tmp_path, {"profile.json": profile([engine("x", None, 1.0)]), "x.json": manifest("x", None)})
    (tmp_path / "heatmap.png").write_bytes(b"")
    run = finish(tmp_path, ["profile.json", "heatmap.png", "x.json"])
    sources = read_sources([run, tmp_path / "x.json"])
    assert [Path(item.file).name for item in sources.items] == ["run.json", "profile.json", "x.json"]
    assert sources.altered == ()


def test_a_file_that_changed_since_the_run_is_told(tmp_path: Path) -> None:
    (file,) = write_all(tmp_path, {"profile.json": profile([engine("x", None, 1.0)])})
    assert read_sources([finish(tmp_path, ["profile.json"], wrong="profile.json")]).altered == (str(file),)


def test_a_file_of_the_run_that_is_gone_is_an_error(tmp_path: Path) -> None:
    (file,) = write_all(tmp_path, {"profile.json": profile([engine("x", None, 1.0)])})
    run = finish(tmp_path, ["profile.json"])
    file.unlink()
    with pytest.raises(ConfigError, match=r"run\.json names \S*profile\.json, which is not there"):
        read_sources([run])


# --- what can't be shown ---------------------------------------------------------------------------------------------


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is nothing to report; expected at least 1 file"):
        read_sources([])


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("x.json", "{", CheckpointError, r"x\.json is no JSON"),
        ("x.json", "[]", CheckpointError, r"x\.json is none of our documents"),
        ("x.json", '{"a": 1}', ConfigError, r"x\.json is nothing that a report can show; .*JSON of another kind"),
        ("x.json", '{"capabilities": []}', ConfigError, r"x\.json is nothing .*JSON of another kind: diagnosis"),
        ("x.json", '{"profiles": {}, "failures": {}}', CheckpointError, r"x\.json: profiles; expected at least 1"),
        ("x.json", '{"engines": []}', CheckpointError, r"x\.json is not a valid Profile: machine: Field required"),
        ("x.json", '{"stages": 1}', CheckpointError, r"x\.json is not a valid RunState"),
        ("x.txt", "", ConfigError, r"x\.txt is nothing that a report can show; .*a file that ends in \.txt"),
        ("x", "", ConfigError, r"x is nothing that a report can show; .*ends in nothing"),
        ("x.eam.safetensors", "", CheckpointError, r"x\.eam\.safetensors is damaged"),
        ("x.json", None, ConfigError, r"cannot read \S*x\.json"),
        ("x.eam.safetensors", None, ConfigError, r"cannot read \S*x\.eam\.safetensors"),
    ],
)
def test_what_is_no_record_of_ours_is_named(
    tmp_path: Path, name: str, content: str | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_sources([tmp_path / name])


def not_finite(document: dict[str, Any]) -> None:
    document["engines"][0]["latency"]["p50_ms"] = float("nan")


def frozen_head_without_a_score(document: dict[str, Any]) -> None:
    document["card"]["freezing"]["heads"]["blocks.0.attn"] = [99]


def other_heads(document: dict[str, Any]) -> None:
    document["scores"]["entropy"]["blocks.0.attn"].pop()


def no_such_score(document: dict[str, Any]) -> None:
    document["score"] = "sensitivity"


def no_share(document: dict[str, Any]) -> None:
    document["shares"]["blocks.2.attn"].pop()


def no_such_module(document: dict[str, Any]) -> None:
    document["frozen"]["blocks.99.attn"] = [0]


def no_engine_there(document: dict[str, Any]) -> None:
    document["profiles"]["ssh://agx.lan:2222"]["engines"].clear()


def no_engine(document: dict[str, Any]) -> None:
    document["engines"].clear()


def no_scores_of_a_module(document: dict[str, Any]) -> None:
    document["card"]["freezing"]["scores"]["blocks.9.attn"].clear()


def no_attention(document: dict[str, Any]) -> None:
    document["attention"].clear()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_engine, r"x\.json: engines; expected at least 1 engine; got none"),
        (no_engine_there, r"x\.json: profiles\.ssh://agx\.lan:2222\.engines; expected at least 1 engine; got none"),
        (no_scores_of_a_module, r"x\.json: card\.freezing\.scores; expected a score for every head"),
        (no_attention, r"x\.json: attention; expected at least 1 module; got none"),
        (not_finite, r"x\.json: engines\.0\.latency\.p50_ms; expected a finite number; got nan"),
        (frozen_head_without_a_score, r"x\.json: card\.freezing\.heads\.blocks\.0\.attn; expected heads below 6"),
        (other_heads, r"x\.json: scores\.entropy have other heads than the attention"),
        (no_such_score, r"x\.json: scores; expected those of sensitivity; got entropy, variance"),
        (no_share, r"x\.json: shares of blocks\.2\.attn; expected 2 in \(0, 1\]"),
        (no_such_module, r"x\.json: frozen\.blocks\.99\.attn; expected heads below 0"),
    ],
)
def test_records_that_contradict_themselves_are_named(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    records: dict[object, Record] = {
        not_finite: profile([engine("x", None, 1.0)]),
        no_engine: profile([engine("x", None, 1.0)]),
        no_engine_there: remote_profiles(),
        frozen_head_without_a_score: manifest("x", card(freezing())),
        no_scores_of_a_module: manifest("x", card(freezing())),
    }
    (file,) = write_all(tmp_path, {"x.json": records.get(damage, analysis())})
    assert len(read_sources([file]).items) == 1
    document = json.loads(file.read_text())
    del document[SEAL]
    damage(document)
    file.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=message):
        read_sources([file])


def test_maps_of_somebody_else_have_no_scores(tmp_path: Path) -> None:
    given = freezing(score="given", scores={}, sparsity_asked=None)
    (file,) = write_all(tmp_path, {"x.json": manifest("x", card(given))})
    assert len(read_sources([file]).of(Manifest)) == 1
