"""What a heat map shows, however it is drawn."""

from __future__ import annotations

import pytest
from report_records import analysis, freezing

from eamdeploy.errors import ConfigError
from eamdeploy.reporting.draw import heat_svg
from eamdeploy.reporting.records.heat_map import Head, HeatMap, of_analysis, of_freezing, of_heads

HEADS = {"blocks.0.attn": 3, "blocks.1.attn": 3}
SCORES = {"blocks.0.attn": [0.11, 0.22, 0.33], "blocks.1.attn": [0.44, 0.55, 0.66]}
FROZEN = {"blocks.0.attn": [0, 2], "blocks.1.attn": [1]}
SHARES = {"blocks.0.attn": [0.5, 1.0], "blocks.1.attn": [0.125]}


def test_heads_have_their_score_and_what_is_frozen_of_them() -> None:
    made = of_heads("m", "entropy", HEADS, SCORES, FROZEN, SHARES, planned=False)
    assert made.layers == (
        ("blocks.0", (Head(0.11, "part", 0.5), Head(0.22, "nothing", 0.0), Head(0.33, "whole", 1.0))),
        ("blocks.1", (Head(0.44, "nothing", 0.0), Head(0.55, "part", 0.125), Head(0.66, "nothing", 0.0))),
    )
    assert [head.mark for head in made.heads] == ["bar", "nothing", "snowflake", "nothing", "bar", "nothing"]
    assert (made.marked("bar"), made.marked("snowflake")) == (2, 1)


def test_heads_of_low_rank_show_it() -> None:
    by_head = freezing()
    (path, *_), heads = by_head.heads, {path: len(s) for path, s in by_head.scores.items()}
    count = len(by_head.heads[path])
    ranked = by_head.model_copy(update={"ranks": {path: [4, *[None] * (count - 1)]}})
    made = of_freezing("m", ranked, heads, None)
    assert [head.rank for head in made.heads if head.kind] == [4]
    assert next(head for head in made.heads if head.rank).kind == "r4"
    assert made.snowflake_means == "frozen (r4: with that rank)"
    drawn = heat_svg.heat_map(made)
    assert drawn.count('class="rank"') == 1 and ", frozen with rank 4" in drawn
    assert "rank" not in heat_svg.heat_map(of_freezing("m", by_head, heads, None))


def test_modules_without_scores_are_shown() -> None:
    made = of_heads("m", "given", HEADS, {}, FROZEN, SHARES, planned=False)
    assert len(made.heads) == 6 and made.scores == [] and made.scale is None and made.power == 0


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"blocks.0.attn": [0.5, 0.5]}, r"frozen shares of blocks\.1\.attn; expected 1 numbers in \(0, 1\]; got \[\]"),
        ({"blocks.0.attn": [0.5], "blocks.1.attn": [0.5]}, r"of blocks\.0\.attn; expected 2 .*; got \[0\.5\]"),
        ({"blocks.0.attn": [0.5, 0.0], "blocks.1.attn": [0.5]}, r"of blocks\.0\.attn; expected 2 .*; got \[0\.5, 0\.0"),
        ({"blocks.0.attn": [0.5, 1.5], "blocks.1.attn": [0.5]}, r"of blocks\.0\.attn"),
        ({"blocks.0.attn": [0.5, float("nan")], "blocks.1.attn": [0.5]}, r"of blocks\.0\.attn"),
    ],
)
def test_shares_that_contradict_the_frozen_heads_are_refused(shares: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        of_heads("m", "entropy", HEADS, SCORES, FROZEN, shares, planned=False)


@pytest.mark.parametrize(
    ("heads", "scores", "frozen", "message"),
    [
        ({}, {}, {}, "at least one attention head"),
        ({"blocks.0.attn": 0}, {"blocks.0.attn": []}, {}, "at least one attention head"),
        ({"blocks.0.attn": 2}, {"blocks.0.attn": [1.0, float("nan")]}, {}, r"head 1 of blocks\.0\.attn"),
        ({"blocks.0.attn": 2}, {"blocks.0.attn": [1.0, float("inf")]}, {}, r"head 1 of blocks\.0\.attn"),
        (
            {"blocks.0.attn": 3},
            {"blocks.0.attn": [1.0, 2.0]},
            {},
            r"scores of blocks\.0\.attn; expected 3 numbers; got 2",
        ),
        (HEADS, {"blocks.2.attn": [1.0]}, {}, r"scores of blocks\.2\.attn"),
        (HEADS, SCORES, {"blocks.1.attn": [3]}, r"frozen head 3 of blocks\.1\.attn.*below 3"),
        (HEADS, SCORES, {"blocks.1.attn": [-1]}, r"frozen head -1 of blocks\.1\.attn"),
        (HEADS, SCORES, {"blocks.2.attn": [0]}, r"frozen head 0 of blocks\.2\.attn.*blocks\.0\.attn, blocks\.1\.attn"),
    ],
)
def test_contradicting_heads_and_scores_are_refused(
    heads: dict[str, int], scores: dict[str, list[float]], frozen: dict[str, list[int]], message: str
) -> None:
    shares = {module: [1.0] * len(indices) for module, indices in frozen.items()}
    with pytest.raises(ConfigError, match=message):
        of_heads("m", "entropy", heads, scores, frozen, shares, planned=False)


def test_without_recorded_shares_only_whole_heads_are_known_to_be_whole() -> None:
    by_head = freezing()
    heads = {path: len(scores) for path, scores in by_head.scores.items()}
    whole = {path: [1.0] * len(indices) for path, indices in by_head.heads.items()}
    assert by_head.granularity == "head"
    assert of_freezing("m", by_head, heads, None) == of_freezing("m", by_head, heads, whole)
    by_row = by_head.model_copy(update={"granularity": "row"})
    made = of_freezing("m", by_row, heads, None)
    assert {head.share for head in made.heads if head.frozen != "nothing"} == {None}
    assert made.snowflake_means == "frozen in part; how much is not recorded" and made.marked("bar") == 0


def test_an_analysis_begins_with_the_score_that_decided() -> None:
    record = analysis()
    made = of_analysis(record)
    assert made[0].score == record.score and {each.score for each in made} == set(record.scores)
    assert all(each.planned and each.snowflake_means == "would be frozen" for each in made)


def test_written_scores_share_a_power_of_ten() -> None:
    made = HeatMap("m", "sensitivity", False, (("l", (Head(2e-5, "nothing", 0.0), Head(4.5e-4, "nothing", 0.0))),))
    assert (made.written(2e-5), made.written(4.5e-4), made.unit) == ("20", "450", "10⁻⁶ nats")
