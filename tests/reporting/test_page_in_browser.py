"""The page in a real browser: it loads without an error and without the network, and shows the records' numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import NAMES, Browser, find_browser
from report_records import rich_records, write_all

from eamdeploy.stages.report import report

PROGRAM = find_browser()
PANELS = "[...document.querySelectorAll('.panel')].slice(0, 3)"
SEEN = "[document.body, ...document.querySelectorAll('svg text')].map(e => e.innerText ?? e.textContent).join(' ')"
pytestmark = pytest.mark.skipif(PROGRAM is None, reason=f"no Chromium on PATH (looked for {', '.join(NAMES)})")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM) as running:
        yield running


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_all(tmp_path_factory.mktemp("records"), rich_records())


@pytest.fixture(scope="module")
def page(records: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "report.html"
    report(records, output)
    return output


def faults(browser: Browser) -> list[Any]:
    """What the browser complained of since the page was opened."""
    wrong = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    return [event["params"] for event in browser.events if event.get("method") in wrong]


def requests(browser: Browser) -> set[str]:
    """Everything that was fetched since the page was opened."""
    sent = [event["params"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    return {params["request"]["url"] for params in sent}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_loads_with_no_error_and_fetches_nothing(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert faults(browser) == []
    assert requests(browser) - {"data:,"} == {page.as_uri()}


def test_a_browser_does_tell_of_errors_and_requests(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<!DOCTYPE html><link rel="stylesheet" href="x.css"><script>console.error("no"); fail()</script>')
    browser.open(bad)
    told = json.dumps(faults(browser))
    assert "no" in told and "fail is not defined" in told
    assert (tmp_path / "x.css").as_uri() in requests(browser)


def test_what_a_person_sees_has_the_numbers_of_the_json(browser: Browser, page: Path, records: list[Path]) -> None:
    browser.open(page)
    seen = " ".join(browser.evaluate(SEEN).split())
    for file in records:
        document = json.loads(file.read_text())
        for engine in document.get("engines", []):
            p50, ratio = engine["latency"]["p50_ms"], engine["speed_up"]["median"]
            assert f"{p50:.3g} ms" in seen or f"{p50:.2f} ms" in seen, p50
            assert f"{ratio:.3f}×" in seen
        if "agreement" in document:
            assert f"{document['agreement']:.1f} %" in seen
            if document["top1"] is not None:
                assert f"{document['reference_top1']:.1f} → {document['top1']:.1f} %" in seen


def test_the_first_screen_of_a_desktop_answers_the_three_questions(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280)
    tops = browser.evaluate(f"{PANELS}.map(e => e.getBoundingClientRect().top)")
    values = browser.evaluate(f"{PANELS}.map(e => e.querySelector('.value').innerText)")
    assert len(tops) == 3 and max(tops) < 250
    assert [re.sub(r"\s+", " ", value) for value in values] == ["14 of 72 heads", "72.2 → 71.9 %", "1.071× faster"]


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_only_tables_scroll_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    beyond = browser.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && "
        "e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    )
    assert beyond == []


def test_dark_and_light_are_different_and_print_is_light(browser: Browser, page: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    browser.open(page, dark=False)
    light = browser.evaluate(ground)
    browser.open(page, dark=True)
    assert browser.evaluate(ground) != light
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.call("Emulation.setEmulatedMedia", media="print", features=[dark])
    assert browser.evaluate(ground) == "rgb(255, 255, 255)"
    browser.call("Emulation.setEmulatedMedia", media="", features=[])


def test_every_mark_of_a_picture_lies_inside_it(browser: Browser, page: Path) -> None:
    browser.open(page, width=390)
    outside = browser.evaluate(
        "[...document.querySelectorAll('svg[role=img]')].flatMap(s => { const box = s.getBoundingClientRect(); "
        "return [...s.querySelectorAll('rect, circle')].filter(m => { const b = m.getBoundingClientRect(); "
        "return b.width < 0 || b.left < box.left - 3 || b.right > box.right + 3 || b.bottom > box.bottom + 3; }) })"
        ".map(m => m.outerHTML)"
    )
    assert outside == []
