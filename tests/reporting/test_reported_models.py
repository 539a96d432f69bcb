"""Which records speak of the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_records import (
    MODEL,
    analysis,
    card,
    digest,
    engine,
    evaluation,
    export,
    freezing,
    manifest,
    profile,
    write_all,
)

from eamdeploy.artifacts.records import Record
from eamdeploy.reporting.records.answers import answers
from eamdeploy.reporting.records.engine_names import engine_names, short_names
from eamdeploy.reporting.records.exports import exported
from eamdeploy.reporting.records.measurements import measurements
from eamdeploy.reporting.records.reported_models import ReportedModel, reported_models
from eamdeploy.reporting.records.sources import read_sources

FROZEN, TWIN = card(freezing()), card()


def models_of(folder: Path, records: dict[str, Record]) -> list[ReportedModel]:
    sources = read_sources(write_all(folder, records))
    names = engine_names(sources)
    return reported_models(sources, measurements(sources, names), exported(sources), names)


def test_digests_tie_a_model_together(tmp_path: Path) -> None:
    (reported,) = models_of(
        tmp_path,
        {
            "e.json": evaluation("model.ort.onnx", "base.ort.onnx"),
            "p.json": profile([engine("model.ort.onnx", FROZEN, 2.0, 1.5)], engine("base.ort.onnx", TWIN, 3.0)),
            "q.json": profile([engine("model.plan", FROZEN, 1.0)]),
            "x.json": export(),
            "m.json": manifest("model.ort.onnx", FROZEN),
            "n.json": manifest("model.plan", FROZEN, backend="trt"),
            "b.json": manifest("base.ort.onnx", TWIN),
        },
    )
    assert (reported.model, reported.title) == (MODEL, MODEL)
    assert len(reported.evaluations) == 1 and len(reported.exports) == 1
    assert [each.name for _, each in reported.measured] == ["model.ort.onnx", "model.plan"]
    assert reported.frozen is not None and (reported.frozen.heads, reported.frozen.all_heads) == (14, 72)


def test_a_checkpoint_belongs_to_the_engines_that_name_it(
    tmp_path: Path, eam_checkpoint: Path, eam_engine: Path
) -> None:
    sources = read_sources([eam_checkpoint, Path(f"{eam_engine}.json"), eam_engine.with_name("base.ort.onnx.json")])
    (reported,) = reported_models(sources, [], [], {})
    assert reported.frozen is not None and (reported.frozen.heads, reported.frozen.all_heads) == (3, 6)
    assert reported.heat is not None and [name for name, _ in reported.heat.layers] == ["blocks.0", "blocks.1"]
    # ONNX Runtime runs models as they are, and the unfrozen twin belongs to the same checkpoint
    assert len(reported.digests) == 3


def test_an_unfrozen_twin_that_was_measured_beside_its_model_stands_with_the_model(tmp_path: Path) -> None:
    stock = engine("stock.ort.onnx", TWIN, 4.0)
    engines = [engine("model.ort.onnx", FROZEN, 2.0, 2.0), engine("twin.ort.onnx", TWIN, 3.0, 1.3)]
    manifests = {"m.json": manifest("model.ort.onnx", FROZEN), "t.json": manifest("twin.ort.onnx", TWIN)}
    for files in (manifests, dict(reversed(manifests.items()))):
        (reported,) = models_of(tmp_path, {**files, "p.json": profile(engines, stock)})
        assert reported.frozen is not None and reported.heat is not None
        assert [measured.name for _, measured in reported.measured] == ["model.ort.onnx", "twin.ort.onnx"]
        gains = answers(reported, {}).panels[2].figures
        assert [(gain.value, gain.label) for gain in gains] == [
            ("2.000×", "speed of stock.ort.onnx"),
            ("1.300×", "speed of stock.ort.onnx"),
        ]


def test_the_manifest_of_an_unfrozen_twin_alone_is_no_model_to_report_on(tmp_path: Path) -> None:
    assert models_of(tmp_path, {"t.json": manifest("twin.ort.onnx", TWIN)}) == []


def test_a_frozen_engine_is_known_by_its_summary_if_only_one_model_fits(tmp_path: Path) -> None:
    rebuilt = profile([engine("other.ort.onnx", FROZEN, 2.0, 1.5)], engine("base.ort.onnx", TWIN, 3.0))
    records = {"p.json": rebuilt, "m.json": manifest("model.ort.onnx", FROZEN)}
    assert len(models_of(tmp_path / "one", records)) == 1
    twice = {**records, "n.json": manifest("n.ort.onnx", card(freezing(), checkpoint="other.eam.safetensors"))}
    assert [bool(reported.measured) for reported in models_of(tmp_path / "two", twice)] == [False, False, True]
    half = {"p.json": rebuilt, "m.json": manifest("half.ort.onnx", card(freezing(0.5)))}
    assert [bool(reported.measured) for reported in models_of(tmp_path / "half", half)] == [False, True]


def test_models_of_one_name_are_told_apart_by_sparsity_and_then_by_number(tmp_path: Path) -> None:
    found = models_of(
        tmp_path,
        {
            "a.json": manifest("a.ort.onnx", card(freezing(), checkpoint="a")),
            "b.json": manifest("b.ort.onnx", card(freezing(), checkpoint="b")),
            "c.json": manifest("c.ort.onnx", card(freezing(0.5), checkpoint="c")),
        },
    )
    titles = [each.title.replace("\N{NO-BREAK SPACE}", " ").removeprefix(f"{MODEL} at ") for each in found]
    assert titles == ["19.4 % sparsity", "19.4 % sparsity (2)", "50.0 % sparsity"]
    assert [each.heat.title for each in found if each.heat] == [each.title for each in found]


def test_a_profile_alone_knows_how_many_heads_but_not_of_how_many(tmp_path: Path) -> None:
    (reported,) = models_of(tmp_path, {"p.json": profile([engine("model.ort.onnx", FROZEN, 2.0)])})
    assert reported.frozen is not None and (reported.frozen.heads, reported.frozen.all_heads) == (14, None)
    assert reported.frozen.granularity is None and reported.heat is None


def test_an_engine_of_somebody_else_goes_by_its_file(tmp_path: Path) -> None:
    (reported,) = models_of(
        tmp_path, {"p.json": profile([engine("out/x.onnx", None, 2.0, 1.1)], engine("b", TWIN, 3.0))}
    )
    assert (reported.title, reported.frozen, len(reported.measured)) == ("x.onnx", None, 1)


@pytest.mark.parametrize(("with_manifest", "titles"), [(True, [False]), (False, [True])])
def test_an_analysis_is_a_model_of_its_own_only_if_nothing_else_speaks_of_its_model(
    tmp_path: Path, with_manifest: bool, titles: list[bool]
) -> None:
    records: dict[str, Record] = {"a.json": analysis()}
    if with_manifest:
        records["m.json"] = manifest("model.ort.onnx", FROZEN)
    found = models_of(tmp_path, records)
    assert [reported.frozen is not None and reported.frozen.planned for reported in found] == titles


def test_rows_whose_share_no_record_tells_are_marked_as_frozen_in_part(tmp_path: Path) -> None:
    (reported,) = models_of(tmp_path, {"m.json": manifest("m.ort.onnx", card(freezing(granularity="row")))})
    assert reported.heat is not None
    assert {(head.frozen, head.share) for head in reported.heat.heads} == {("nothing", 0.0), ("part", None)}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["out/a.onnx", "out/b.onnx"], ["a.onnx", "b.onnx"]),
        (["one/m.onnx", "two/m.onnx"], ["one/m.onnx", "two/m.onnx"]),
        (["x/one/m.onnx", "x/two/m.onnx", "x/two/n.onnx"], ["one/m.onnx", "two/m.onnx", "n.onnx"]),
        (["m.onnx", "out/m.onnx", "/m.onnx"], ["m.onnx", "out/m.onnx", "/m.onnx"]),
        (["m.onnx", "m.onnx"], ["m.onnx"]),
        ([""], [""]),
    ],
)
def test_names_are_as_short_as_they_can_be(paths: list[str], names: list[str]) -> None:
    assert list(short_names(paths).values()) == names


def test_made_up_digests_tell_files_apart() -> None:
    assert len({digest(name) for name in ("a", "b", "model.onnx", "model.ort.onnx")}) == 4
