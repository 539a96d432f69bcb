"""What the code and the documents refer to is there: files of the repository, and headings of its documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("eamdeploy", "tests", "benchmarks", "models", "docker")
_CITED = re.compile(r"docs/([\w/-]+)\.md, ([A-Z][^:;.,)\n]*)")
_NAMED = re.compile(r"docs/[\w/-]+\.md")
# where people are told of a document: messages and comments of the program, and files that are no documents
_NAMING = ("*.py", "*.toml", "*.yaml", "*.yml", "*.sh", "*.txt", "Dockerfile", "Makefile")


def sources() -> dict[Path, str]:
    return {path: path.read_text() for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py")}


def headings(document: str) -> set[str]:
    lines = (REPOSITORY / "docs" / f"{document}.md").read_text().splitlines()
    return {line.lstrip("#").strip() for line in lines if line.startswith("#")}


def test_every_heading_that_is_cited_exists() -> None:
    cited = {(path.name, *found) for path, text in sources().items() for found in _CITED.findall(text)}
    assert len(cited) > 20
    assert {each for each in cited if each[2].strip() not in headings(each[1])} == set()


def naming() -> dict[Path, str]:
    """The files that may name a document, with what they say."""
    below = [path for folder in FOLDERS for kind in _NAMING for path in (REPOSITORY / folder).rglob(kind)]
    return {path: path.read_text() for path in (*below, *(path for kind in _NAMING for path in REPOSITORY.glob(kind)))}


def test_every_document_that_is_named_exists() -> None:
    named = {(path.name, found) for path, text in naming().items() for found in _NAMED.findall(text)}
    assert {"Dockerfile", "compose.yaml", "config.py"} <= {file for file, _ in named}
    assert {each for each in named if not (REPOSITORY / each[1]).is_file()} == set()


@pytest.mark.parametrize("path", ["design", "results/accuracy", "guides/onnx-runtime"])
def test_a_cite_of_a_heading_is_recognised_wherever_the_document_is(path: str) -> None:
    assert _CITED.findall(f"Source: docs/{path}.md, A heading: why") == [(path, "A heading")]


def test_nothing_cites_a_document_that_is_not_in_the_repository() -> None:
    lost = re.compile("(?:DES" + "IGN|FAC" + "TS|HO" + "USE|STY" + "LE)(?:\\.md| §| on )")
    assert {path.name: lost.findall(text) for path, text in sources().items() if lost.search(text)} == {}


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^a-z0-9 \-_]", "", heading.lower()).replace(" ", "-")


def test_every_link_of_the_documents_leads_somewhere() -> None:
    folders = (REPOSITORY, REPOSITORY / "models", REPOSITORY / "calib_data")
    documents = [*(REPOSITORY / "docs").rglob("*.md"), *(path for folder in folders for path in folder.glob("*.md"))]
    broken, links = [], 0
    for document in documents:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", document.read_text()):
            if target.startswith(("http:", "https:")):
                continue
            links += 1
            there = document.parent / target if target else document
            if not there.exists():
                broken.append((document.name, target))
            elif anchor and anchor not in {
                slug(line.lstrip("#").strip()) for line in there.read_text().splitlines() if line.startswith("#")
            }:
                broken.append((document.name, f"{target}#{anchor}"))
    assert links > 40 and broken == []
