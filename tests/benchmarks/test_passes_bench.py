"""benchmarks/passes.py and what it is made of, on tiny models."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from rich.console import Console
from tiny_models import KWARGS, NAME, SWIN_KWARGS, SWIN_NAME

from eamdeploy.errors import ParityError
from eamdeploy.host.model import RANDOM, ModelSpec
from eamdeploy.passes.fusable_gelu import FusableGelu
from eamdeploy.passes.order import SWITCHABLE
from eamdeploy.profiling.timing import Schedule, Sittings

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import passes
from pass_variants import ALL, NONE, STOCK, Setup, Subject, pairs
from passes_show import Passes, markdown, table

QUICK = Schedule(warmup_ms=0, min_seconds=0, min_runs=2, sittings=1)
VIT = Subject(ModelSpec(NAME, RANDOM, KWARGS), None, 0.0, "torchscript", 17, None)
SWIN = Subject(ModelSpec(SWIN_NAME, RANDOM, SWIN_KWARGS), None, 0.3, "torchscript", 17, 1)
ALL_BUT_PASSES = ("all, against torch's export", "all", "fold_preprocess (if asked for)")


@pytest.fixture(scope="module")
def of_vit() -> Passes:
    return passes.measure(VIT, list(SWITCHABLE), 1, 2, QUICK, lambda _: None)


def test_a_pass_is_set_against_the_model_without_it_and_both_without_what_depends_on_it() -> None:
    rows = {pair.name: pair for pair in pairs(list(SWITCHABLE))}
    assert list(rows) == [*ALL_BUT_PASSES[:2], *SWITCHABLE, ALL_BUT_PASSES[2]]
    assert (rows["all"].before, rows["all"].after) == (NONE, ALL)
    assert rows[ALL_BUT_PASSES[0]].before == STOCK and rows[ALL_BUT_PASSES[2]].after == Setup(fold=True)
    gather = rows["gather_tokens"]
    assert gather.absent == ["merge_gathers", "window_order"] and gather.after == rows["window_order"].before
    for name in SWITCHABLE:
        before, after = rows[name].before.without, rows[name].after.without
        assert before is not None and after is not None and before - after == {name} and after < before


def test_every_pass_has_a_row_and_those_without_effect_are_not_timed_against_themselves(of_vit: Passes) -> None:
    rows = {row.name: row for row in of_vit.rows}
    changed = {name for name in SWITCHABLE if rows[name].worth is not None}
    assert changed == {
        *("static_shapes", "add_position", "canonical_attention", "scale_into_query", "drop_key_bias"),
        *("fold_value_bias", "class_token_only"),
    }
    assert all(rows[name].worth is not None for name in ALL_BUT_PASSES)
    last = rows["class_token_only"]
    assert (last.after.multiply_adds or 0) < (last.before.multiply_adds or 0)
    assert rows["add_position"].before.nodes > rows["add_position"].after.nodes
    assert {side.latency.batch for row in of_vit.rows for side in (row.before, row.after)} == {2}
    assert (of_vit.exporter, of_vit.fixed_batch, of_vit.weights) == ("torchscript", False, RANDOM)


def test_a_worth_is_the_time_without_over_the_time_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands for nodes: of the pair, the side with more nodes takes longer."""

    def nodes(engines: list[Path], *_: object) -> Sittings:
        counts = [len(onnx.load(engine).graph.node) for engine in engines]
        return [np.tile(np.array(counts, np.int64) * 1000, (2, 2, 1))]

    monkeypatch.setattr(passes, "take_turns", nodes)
    measured = passes.measure(SWIN, ["gather_tokens", "zero_mask"], 1, 1, QUICK, lambda _: None)
    for row in measured.rows:
        assert row.worth is not None
        assert row.worth.median == pytest.approx(row.before.nodes / row.after.nodes), row.name
    assert measured.fixed_batch


def test_the_tables_tell_what_the_record_holds(of_vit: Passes) -> None:
    console = Console(width=200, record=True)
    console.print(table(of_vit))
    text, written = console.export_text(), markdown(of_vit)
    lines = [line for line in written.splitlines() if line.startswith("| ")][2:]
    for row, line in zip(of_vit.rows, lines, strict=True):
        worth = "changes nothing in this model" if row.worth is None else f"{row.worth.median:.3f}× ("
        assert line.startswith(f"| {row.name}") and worth in line and row.name in text and worth in text
    assert "canonical_attention; neither has class_token_only, drop_key_bias" in written
    assert "The weights are random" in text and "The weights are random" in written


def test_a_variant_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def rewrite(self: FusableGelu, graph: object, match: object) -> None:
        half = match.half  # type: ignore[attr-defined]
        half.inputs = [half.inputs[1], half.inputs[1]]

    monkeypatch.setattr(FusableGelu, "rewrite", rewrite)
    subject = Subject(VIT.spec, None, 0.0, "dynamo", 18, None)
    with pytest.raises(ParityError, match="parity of the exported graph"):
        passes.measure(subject, ["fusable_gelu"], 1, 1, QUICK, lambda _: None)


def test_the_command_writes_what_it_measured(
    of_vit: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[object, ...]] = []

    def fake_measure(*arguments: object, **_: object) -> Passes:
        seen.append(arguments)
        return of_vit

    monkeypatch.setattr(passes, "measure", fake_measure)
    output, page = tmp_path / "x.json", tmp_path / "x.md"
    options = ["--weights", "w.safetensors", "--fixed-batch", "--batch", "4", "--threads", "2", "--only", "zero_mask"]
    monkeypatch.setattr(sys, "argv", ["passes.py", *options, "-o", str(output), "--markdown", str(page)])
    passes.main()
    assert Passes.read(output) == of_vit and page.read_text() == markdown(of_vit)
    assert "class_token_only" in capsys.readouterr().out
    ((subject, names, threads, batch, schedule),) = seen
    spec = ModelSpec("deit_tiny_patch16_224", "w.safetensors")
    assert subject == Subject(spec, None, 0.0, "auto", 18, 4)
    assert (names, threads, batch, schedule) == (["zero_mask"], 2, 4, Schedule(min_seconds=10))
