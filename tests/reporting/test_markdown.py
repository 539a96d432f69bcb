from __future__ import annotations

import re
from pathlib import Path

import pytest
from report_records import MODEL, card, engine, evaluation, freezing, manifest, profile, rich_records, write_all

from eamdeploy.artifacts.records import Record
from eamdeploy.reporting.records.sources import read_sources
from eamdeploy.reporting.write.content import gather
from eamdeploy.reporting.write.markdown import write_markdown
from eamdeploy.reporting.write.page import render


def markdown_of(folder: Path, records: dict[str, Record], title: str | None = None) -> str:
    return write_markdown(gather(read_sources(write_all(folder, records)), title))


def test_the_headline_comes_first(tmp_path: Path) -> None:
    frozen = card(freezing())
    text = markdown_of(
        tmp_path,
        {
            "p.json": profile([engine("x.ort.onnx", frozen, 13.7, 1.071)], engine("b.ort.onnx", card(), 14.7)),
            "m.json": manifest("x.ort.onnx", frozen),
            "e.json": evaluation("x.ort.onnx", "b.ort.onnx"),
        },
    )
    title, _, what, cost, gain = text.split("\n")[:5]
    assert title == f"# {MODEL.replace('_', chr(92) + '_')}"
    assert what.startswith("- **Frozen**: **14 of 72 heads** frozen; sparsity 19.4 %")
    assert cost.startswith("- **Cost**: **72.2 → 71.9 %** top-1 of 500 images; −0.30 points; agreement")
    assert gain.startswith("- **Gain**: **1.071×** (faster) speed of b.ort.onnx; 95 % interval 1.061× – 1.081×")


def test_every_table_has_as_many_cells_in_each_row(tmp_path: Path) -> None:
    text = markdown_of(tmp_path, rich_records())
    tables = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    assert len(tables) > 10
    for table in tables:
        rows = [re.split(r"(?<!\\)\|", line) for line in table.strip().splitlines()]
        assert len({len(row) for row in rows}) == 1, table
        assert all(set(cell.strip()) <= set(":-") for cell in rows[1][1:-1])


def test_it_says_what_the_page_says(tmp_path: Path) -> None:
    content = gather(read_sources(write_all(tmp_path, rich_records())))
    markdown = re.sub(r"\\(.)", r"\1", write_markdown(content))
    page = render(content).replace("\N{NO-BREAK SPACE}", " ")
    for line in content.caveats:
        assert f"- {line}" in markdown
    for command in content.commands:
        assert f"```sh\n{command.text}\n```" in markdown
    for number in re.findall(r'<td class="number">([^<]+)</td>', page):
        assert number in markdown, number
    for heading in ("Attention heads", "Accuracy and agreement", "Versions", "To reproduce it"):
        assert f"## {heading}" in markdown


def test_heads_have_their_scores_and_their_shares(tmp_path: Path) -> None:
    text = markdown_of(tmp_path, {"a.json": rich_records()["analysis.json"]})
    (row,) = re.findall(r"^\| blocks\.2 \|.*$", text, re.MULTILINE)[:1]
    assert re.fullmatch(r"\| blocks\.2 \| \S+ ❄ 25% \| \S+ \| \S+ \| \S+ \| \S+ ❄ \| \S+ \|", row)


@pytest.mark.parametrize("evil", ["a|b", "<b>x</b>", "[x](y)", "`x`", "*x* _y_", "line\nbreak", "$x$ ~~y~~ #z"])
def test_names_are_never_markup(tmp_path: Path, evil: str) -> None:
    frozen = card(freezing(), timm_model=evil)
    text = markdown_of(tmp_path, {"p.json": profile([engine("x", frozen, 2.0)])}, title=evil)
    first = text.splitlines()[0]
    assert re.sub(r"\\(.)", r"\1", first) == f"# {' '.join(evil.split())}"
    assert not re.search(r"(?<!\\)[|<\[\]`*_~$]", first)


def test_a_fence_is_longer_than_any_in_the_command(tmp_path: Path) -> None:
    text = markdown_of(tmp_path, {"p.json": profile([engine("a```b", None, 2.0)])})
    assert "````sh\neamdeploy profile 'a```b'" in text
