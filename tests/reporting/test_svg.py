"""Pictures say what the figures say: places are read back from the SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_records import card, engine, freezing, profile

from eamdeploy.reporting.draw import svg
from eamdeploy.reporting.draw.heat_svg import heat_map, score_range, snowflake_definition
from eamdeploy.reporting.draw.svg import Bar
from eamdeploy.reporting.records.heat_map import Head, HeatMap
from eamdeploy.reporting.records.measurements import Measurement, measurements
from eamdeploy.reporting.records.sources import Sourced, Sources


def measured(*ratios: float | None) -> Measurement:
    engines = [engine(f"e{n}", card(freezing()), 10.0 + n, ratio) for n, ratio in enumerate(ratios)]
    record = profile(engines, engine("base", card(), 12.0))
    names = {name: name for name in ("base", *(each.engine for each in engines))}
    (made,) = measurements(Sources((Sourced("p.json", "profile", record),), ()), names)
    return made


def marks(picture: str, kind: str) -> list[float]:
    """Where the marks of that kind are across, in percent, from top to bottom."""
    root = ElementTree.fromstring(picture)
    found = [each for each in root.iter() if each.get("class") == kind]
    return [float((each.get("x1") or each.get("x") or each.get("cx") or "").rstrip("%")) for each in found]


def widths(picture: str, kind: str) -> list[float]:
    root = ElementTree.fromstring(picture)
    return [float(each.get("width", "").rstrip("%")) for each in root.iter() if each.get("class") == kind]


def test_strips_lie_where_the_times_are() -> None:
    picture = svg.latency_strips(measured(1.2, 1.1))
    end = float(re.findall(r">([\d.]+) ms</text></g>", picture)[0])
    assert marks(picture, "median") == pytest.approx([100 * ms / end for ms in (12, 10, 11)])
    for kind, low, high in (("box", 98, 104), ("whisker", 95, 115)):
        assert marks(picture, kind) == pytest.approx([low * ms / end for ms in (12, 10, 11)], abs=1e-3)
        assert widths(picture, kind) == pytest.approx([(high - low) * ms / end for ms in (12, 10, 11)], abs=1e-3)
    assert marks(picture, "dot") == pytest.approx([131 * ms / end for ms in (12, 10, 11)], abs=1e-3)
    assert 'aria-label="Time of one inference, p50: base 12.0' in picture
    assert [each.get("class") for each in ElementTree.fromstring(picture)] == ["axis", "base", "main", "main"]


def test_intervals_lie_around_the_line_of_the_baseline() -> None:
    picture = svg.speed_up_intervals(measured(1.2, 0.9))
    (one,) = marks(picture, "one")
    faster, slower = marks(picture, "box")
    assert faster > one > slower + widths(picture, "box")[1]
    assert "e0 1.200×, faster; e1 0.900×, slower" in picture


def test_without_a_speed_up_there_is_no_picture_of_it() -> None:
    assert svg.speed_up_intervals(measured(None)) == ""


def test_bars_are_as_long_as_their_values() -> None:
    items = [Bar("a", 50, None, "50", is_baseline=True), Bar("b", 200, 50, "200", is_baseline=False)]
    picture = svg.bars("Size", items)
    assert widths(picture, "bar") == pytest.approx([25, 25]) and widths(picture, "box") == pytest.approx([100])
    assert svg.bars("Size", []) == ""
    assert widths(svg.bars("Size", [Bar("a", 0, None, "0", is_baseline=False)]), "bar") == [0]


def test_long_names_lose_their_middle() -> None:
    picture = svg.bars("x", [Bar("a" * 30 + "b" * 30, 1, None, "1", is_baseline=False)])
    texts = [each.text for each in ElementTree.fromstring(picture).iter("text")]
    assert texts[0] == "a" * 18 + "…" + "b" * 19


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_axes_have_a_few_round_ticks_that_hold_everything(low: float, width: float) -> None:
    high = low + width
    ticks = svg.axis_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-3)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 7 and all(b > a for a, b in pairwise(ticks))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 19.2, [0, 5, 10, 15, 20]), (0.994, 1.081, [0.975, 1.0, 1.025, 1.05, 1.075, 1.1]), (0, 0, [0, 0.25])],
)
def test_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert svg.axis_ticks(low, high)[: len(ticks)] == ticks


# --- the heat map ----------------------------------------------------------------------------------------------------


def drawn(heads: list[Head]) -> str:
    return heat_map(HeatMap("m", "entropy", False, (("l0", tuple(heads)),)))


def cells(picture: str) -> list[str]:
    found = [each.get("class", "") for each in ElementTree.fromstring(picture).iter("g")]
    return [kind.removeprefix("cell ") for kind in found]


def test_cells_have_the_colour_of_their_score_and_say_what_is_frozen() -> None:
    heads = [Head(0.0, "whole", 1.0), Head(0.5, "part", 0.25), Head(1.0, "nothing", 0.0), Head(0.5, "part", None)]
    picture = drawn(heads)
    assert cells(picture) == ["s0 whole", "s4 part", "s8 nothing", "s4 some"]
    assert picture.count("#flake") == 2
    assert widths(picture, "share")[0] / widths(picture, "track")[0] == pytest.approx(0.25, abs=1e-3)
    assert "entropy of 4 attention heads of m, 3 of them marked as frozen" in picture


def test_heads_without_a_score_have_no_colour() -> None:
    picture = drawn([Head(None, "whole", 1.0), Head(None, "nothing", 0.0)])
    assert cells(picture) == ["none whole", "none nothing"] and "l0, head 0: no score, frozen" in picture
    assert score_range(HeatMap("m", "given", False, (("l0", (Head(None, "whole", 1.0),)),))) is None


def test_layers_with_fewer_heads_keep_the_width_of_a_cell() -> None:
    heads = tuple(Head(float(n), "nothing", 0.0) for n in range(4))
    picture = heat_map(HeatMap("m", "entropy", False, (("a", heads[:2]), ("b", heads))))
    found = [each for each in ElementTree.fromstring(picture).iter("rect")]
    assert len(found) == 6 and len({each.get("width") for each in found}) == 1


@pytest.mark.parametrize(("n_heads", "kind"), [(3, "upto4"), (4, "upto4"), (6, "upto6"), (16, "upto16"), (24, "many")])
def test_the_style_can_tell_how_many_heads_share_the_width(n_heads: int, kind: str) -> None:
    picture = drawn([Head(1.0, "nothing", 0.0)] * n_heads)
    assert ElementTree.fromstring(picture).get("class") == f"heat {kind}"


def test_the_range_is_written_like_the_cells() -> None:
    layers = (("a", (Head(0.0001, "nothing", 0.0), Head(0.0012, "nothing", 0.0))),)
    assert score_range(HeatMap("m", "entropy", False, layers)) == ("0.10", "1.2", "× 10⁻³ nats")
    plain = (("a", (Head(0.2, "nothing", 0.0), Head(0.4, "nothing", 0.0))),)
    assert score_range(HeatMap("m", "entropy", False, plain)) == ("0.20", "0.40", "nats")
    skewed = (("a", tuple(Head(value, "nothing", 0.0) for value in (1.0, 1.0, 1.0, 100.0))),)
    assert score_range(HeatMap("m", "variance", False, skewed)) == ("1.0", "100", ", logarithmic")


def test_the_snowflake_is_defined_once_and_has_six_arms() -> None:
    assert ElementTree.fromstring(snowflake_definition()).find(".//path").get("d", "").count("M") == 18  # type: ignore[union-attr]
