"""benchmarks/kinds.py and what it is made of, on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console
from tiny_models import KWARGS, NAME, draw_pictures

from eamdeploy.host.model import ModelSpec
from eamdeploy.profiling.timing import Schedule, Sittings, time_sittings
from eamdeploy.vocabulary import RECOVERY_METHODS

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kinds
import kinds_steps
from floor import count_multiply_adds
from kinds_show import Kinds, table
from kinds_steps import UNFROZEN, Plan, Steps, Variant
from study import Settings, Study

QUICK = Schedule(warmup_ms=0, min_seconds=0, min_runs=2, sittings=1)
PLAN = Plan(sparsity=0.5, bits=4, batch=None, threads=1)
VARIANTS = [Variant(kind, method) for kind in ("plain", "2") for method in (None, *RECOVERY_METHODS)]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures, each with its number as the label."""
    folder = tmp_path_factory.mktemp("kinds") / "labelled"
    files = draw_pictures(folder, 8)
    lines = ["file,label", *(f"{file.name},{number}" for number, file in enumerate(files))]
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def study(labelled: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    settings = Settings(labelled, tmp_path_factory.mktemp("work"), score_images=4)
    return Study(ModelSpec(NAME, str(tiny_weights), KWARGS), settings)


@pytest.fixture(scope="module")
def measured(study: Study) -> Kinds:
    """The engine in row i takes i + 1 microseconds."""

    def numbered(engines: list[Path], *_: object) -> Sittings:
        return [np.tile(np.arange(1, len(engines) + 1) * 1000, (2, 2, 1))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kinds, "take_turns", numbered)
        return kinds.measure(study, PLAN, VARIANTS, forms=False, batch=1, schedule=QUICK, note=lambda _: None)


def test_every_kind_has_a_row_alone_and_with_every_recovery(measured: Kinds) -> None:
    methods = (None, *RECOVERY_METHODS)
    assert [(row.kind, row.recovery) for row in measured.rows] == [
        *(("stock", None), ("nothing", None)),
        *((kind, method) for kind in ("plain", "rank 2") for method in methods),
    ]
    nothing, *frozen = measured.rows[1:]
    assert (nothing.agreement, nothing.kl, nothing.saved_percent, nothing.heads) == (100, 0, 0, {})
    assert [row.heads for row in frozen] == [{"whole": 3}] * len(methods) + [{"rank 2": 3}] * len(methods)
    assert all(row.sparsity == 0.5 and (row.kl or 0) > 0 and row.top1 is not None for row in frozen)
    assert (measured.calibration_images, measured.images) == (4, 4)


def test_what_is_saved_is_what_the_graphs_count(study: Study, measured: Kinds) -> None:
    steps = Steps(study, PLAN, lambda _: None)
    whole = count_multiply_adds(onnx.load(steps.graph(UNFROZEN)))
    rows = {(row.kind, row.recovery): row for row in measured.rows}
    assert measured.multiply_adds == whole
    for variant in VARIANTS:
        saved = whole - count_multiply_adds(onnx.load(steps.graph(variant)))
        assert saved > 0
        assert rows[variant.name, variant.recovery].saved_percent == pytest.approx(100 * saved / whole)


def test_times_are_set_against_the_plain_engine_and_torch_s_export(measured: Kinds) -> None:
    plain = next(index for index, row in enumerate(measured.rows) if row.kind == "plain")
    assert measured.rows[plain].recovery is None
    for index, row in enumerate(measured.rows):
        assert row.latency is not None and row.latency.p50_ms == pytest.approx((index + 1) / 1000)
        for found, baseline in ((row.against_plain, plain), (row.against_stock, 0)):
            if index == baseline or (baseline == plain and index == 0):
                assert found is None
            else:
                assert found is not None and found.median == pytest.approx((baseline + 1) / (index + 1))


def test_a_run_that_was_cut_short_goes_on(study: Study, measured: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of the rank that is new are taken, and no others."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def run() -> Kinds:
        variants = [*VARIANTS, Variant("1")]
        return kinds.measure(study, PLAN, variants, forms=False, batch=1, schedule=None, note=taken.append)

    taken: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kinds_steps, "evaluate", interrupted)
        run()
    assert taken == ["rank 1, recovery none: frozen"]
    result = run()
    assert taken[1:] == ["rank 1, recovery none: evaluated"]
    assert not result.timed and all(row.latency is None for row in result.rows)
    untimed = {"latency": None, "against_plain": None, "against_stock": None}
    assert result.rows[:-1] == [row.model_copy(update=untimed) for row in measured.rows]


def test_the_fastest_form_has_rows_of_its_own(study: Study, measured: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eamdeploy.stages.ort_forms.time_sittings", lambda load, n, _: time_sittings(load, n, QUICK))
    result = kinds.measure(study, PLAN, [Variant("plain")], forms=True, batch=1, schedule=QUICK, note=lambda _: None)
    assert [row.kind for row in result.rows] == ["stock", "nothing", "nothing", "plain", "plain"]
    assert [row.against_plain is None for row in result.rows] == [True, False, False, True, True]
    _, _, tuned, _, plain = result.rows
    assert tuned.form != "torch's export" and tuned.latency is not None and tuned.agreement is not None
    assert plain.heads == {"whole": 3} and plain.kl is not None and plain.kl > 0
    form = kinds_steps.form_of(Steps(study, PLAN, lambda _: None).engine(Variant("plain"), tuned=True))
    assert plain.form == form


def test_the_command_prints_and_writes_what_it_measured(
    study: Study, measured: Kinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the steps that are there, with engines that really take turns."""
    settings, output = study.settings, tmp_path / "x.json"
    options = [
        *("--model", NAME, "--model-kwargs", json.dumps(KWARGS), "--weights", study.spec.weights),
        *("--data", settings.data, "--work", settings.keep, "--calibration-images", settings.calibration_images),
        *("--score-images", settings.score_images, "--kinds", "plain", "2", "--recover", "none"),
        *("--threads", 1, "--seconds", 0, "--sittings", 1, "-o", output),
    ]
    monkeypatch.setattr(sys, "argv", ["kinds.py", *map(str, options)])
    kinds.main()
    shown, told = capsys.readouterr()
    assert told == f"{NAME}: 4 engines take turns\n", "no step is taken again"
    written = Kinds.read(output)
    assert [(row.kind, row.recovery) for row in written.rows] == [
        *(("stock", None), ("nothing", None), ("plain", None), ("rank 2", None))
    ]
    assert [row.kl for row in written.rows[2:]] == [row.kl for row in measured.rows if row.heads and not row.recovery]
    console = Console(width=200, record=True)
    console.print(table(written))
    assert console.export_text() in shown
    for row in written.rows[1:]:
        assert row.against_stock is not None and f"{row.against_stock.median:.3f}×" in shown


@pytest.mark.parametrize("method", RECOVERY_METHODS)
def test_every_recovery_that_there_is_can_be_asked_for(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kinds.py", "--data", "x", "--work", "y", "--recover", "none", method])
    assert kinds._parse().recover == ["none", method]
