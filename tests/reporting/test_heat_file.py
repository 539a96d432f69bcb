from __future__ import annotations

import errno
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from eamdeploy.errors import ConfigError, MissingDependency
from eamdeploy.reporting.draw.heat_file import write_heat_map
from eamdeploy.reporting.records.heat_map import Head, HeatMap, of_heads

matplotlib = pytest.importorskip("matplotlib", reason="heat maps need the extra 'host'")

SCORES = {"blocks.0.attn": [0.11, 0.22, 0.33], "blocks.1.attn": [0.44, 0.55, 0.66]}
FROZEN = {"blocks.0.attn": [0, 2], "blocks.1.attn": [1]}


def draw(
    path: Path,
    scores: Mapping[str, Sequence[float]] = SCORES,
    frozen: Mapping[str, Sequence[int]] = FROZEN,
    score: str = "entropy",
    shares: Mapping[str, Sequence[float]] | None = None,
    planned: bool = False,
) -> Path:
    heads = {module: len(values) for module, values in scores.items()}
    known = {module: [1.0] * len(indices) for module, indices in frozen.items()} if shares is None else shares
    write_heat_map(of_heads("a model", score, heads, scores, frozen, known, planned=planned), path)
    return path


def ids(svg: Path, prefix: str) -> list[str]:
    elements = ElementTree.parse(svg).getroot().iter()
    return [name for element in elements if (name := element.get("id", "")).startswith(prefix)]


def words(svg: Path) -> list[str]:
    """The texts of the picture, which matplotlib notes in comments beside the glyphs' outlines."""
    return re.findall(r"<!-- (.*?) -->", svg.read_text())


def test_every_frozen_head_and_no_other_is_marked_once(tmp_path: Path) -> None:
    marks = ids(draw(tmp_path / "map.svg"), "frozen:")
    assert sorted(marks) == ["frozen:blocks.0:0", "frozen:blocks.0:2", "frozen:blocks.1:1"]


def test_a_head_of_low_rank_has_its_rank_in_its_cell(tmp_path: Path) -> None:
    heads = {module: len(values) for module, values in SCORES.items()}
    shares = {module: [1.0] * len(indices) for module, indices in FROZEN.items()}
    ranks = {("blocks.0.attn", 2): 4, ("blocks.1.attn", 1): 1}
    drawn = of_heads("m", "entropy", heads, SCORES, FROZEN, shares, planned=False, ranks=ranks)
    write_heat_map(drawn, tmp_path / "map.svg")
    shown = words(tmp_path / "map.svg")
    assert shown.count("r4") == shown.count("r1") == 1
    assert "frozen (r1, r4: with that rank): 3 of 6 heads" in shown


def test_a_frozen_head_given_twice_counts_once(tmp_path: Path) -> None:
    svg = draw(tmp_path / "map.svg", frozen={"blocks.0.attn": [1, 1]})
    assert ids(svg, "frozen:") == ["frozen:blocks.0:1"]
    assert "frozen: 1 of 6 heads" in words(svg)


def test_legend_counts_and_disappears_when_nothing_is_frozen(tmp_path: Path) -> None:
    with_marks, without = draw(tmp_path / "a.svg"), draw(tmp_path / "b.svg", frozen={})
    assert "frozen: 3 of 6 heads" in words(with_marks)
    assert ids(with_marks, "legend") == ["legend"]
    assert "no head is frozen" in words(without)
    assert ids(without, "legend") == []


def bar_lengths(svg: Path, prefix: str) -> dict[str, float]:
    """Length of the filled part of every bar by its id, in the picture's unit."""
    root = ElementTree.parse(svg).getroot()
    found = {}
    for element in root.iter():
        if (name := element.get("id", "")).startswith(prefix):
            outline = next(child for child in element.iter() if child.tag.endswith("path")).get("d", "")
            across = [float(x) for x in re.findall(r"[ML] ([\d.]+)", outline)]
            found[name] = max(across) - min(across)
    return found


def test_a_head_frozen_in_part_has_a_bar_of_that_length_and_a_whole_one_its_snowflake(tmp_path: Path) -> None:
    shares = {"blocks.0.attn": [0.5, 1.0], "blocks.1.attn": [0.125]}
    svg = draw(tmp_path / "map.svg", shares=shares)
    lengths = bar_lengths(svg, "frozen:")
    assert lengths.keys() == {"frozen:blocks.0:0", "frozen:blocks.0:2", "frozen:blocks.1:1"}
    assert lengths["frozen:blocks.0:0"] == pytest.approx(4 * lengths["frozen:blocks.1:1"], rel=1e-3)
    assert {"frozen: 1 of 6 heads", "frozen share: 2 of 6 heads"} <= set(words(svg))
    assert ids(svg, "legend") == ["legend", "legend-share"]
    only_parts = draw(tmp_path / "parts.svg", shares={"blocks.0.attn": [0.5, 0.1], "blocks.1.attn": [0.125]})
    assert ids(only_parts, "legend") == ["legend-share"] and "no head is frozen" not in words(only_parts)


@pytest.mark.parametrize("heads", [1, 3, 24], ids=["wide cells", "labelled cells", "narrow cells"])
def test_bars_stay_inside_their_cells(tmp_path: Path, heads: int) -> None:
    scores = {"blocks.0.attn": [0.1] * heads}
    svg = draw(tmp_path / "map.svg", scores, {"blocks.0.attn": [0]}, shares={"blocks.0.attn": [0.999]})
    (length,) = bar_lengths(svg, "frozen:").values()
    widths = {1: 1.15, 3: 1.15, 24: 0.3}  # inches; a point is 1/72
    assert 0.6 * widths[heads] < length / 72 < 0.85 * widths[heads]


def test_an_analysis_says_what_would_be_frozen(tmp_path: Path) -> None:
    shares = {"blocks.0.attn": [0.5, 1.0], "blocks.1.attn": [0.125]}
    found = words(draw(tmp_path / "map.svg", shares=shares, planned=True))
    assert {"would be frozen: 1 of 6 heads", "share that would be frozen: 2 of 6 heads"} <= set(found)


def test_heads_without_a_score_have_neither_colour_nor_number(tmp_path: Path) -> None:
    svg = tmp_path / "map.svg"
    heads = (Head(None, "whole", 1.0), Head(None, "part", None), Head(None, "nothing", 0.0))
    write_heat_map(HeatMap("a model", "given", False, (("blocks.0", heads),)), svg)
    assert ids(svg, "frozen:") == ["frozen:blocks.0:0", "frozen:blocks.0:1"]
    assert words(svg)[:5] == ["0", "1", "2", "head", "blocks.0"]
    assert "frozen in part; how much is not recorded: 2 of 3 heads" in words(svg)
    one_scored = (Head(0.25, "nothing", 0.0), *heads)
    write_heat_map(HeatMap("a model", "given", False, (("blocks.0", one_scored),)), svg)
    assert "0.25" in words(svg) and "given" in words(svg)  # the cell and the colour bar


def test_layers_may_have_different_numbers_of_heads(tmp_path: Path) -> None:
    scores = {
        "layers.0.blocks.0.attn": [0.11, 0.12, 0.13],
        "layers.1.blocks.0.attn": [0.21, 0.22, 0.23, 0.24, 0.26, 0.27],
        "layers.2.blocks.0.attn": [0.31],
    }
    svg = draw(tmp_path / "map.svg", scores, {"layers.1.blocks.0.attn": [5]})
    # the colour bar's own numbers end in 0 or 5
    shown = [word for word in words(svg) if re.fullmatch(r"0\.\d[1-46-9]", word)]
    assert shown == [str(value) for values in scores.values() for value in values]
    assert ids(svg, "frozen:") == ["frozen:layers.1.blocks.0:5"]
    assert {"layers.0.blocks.0", "layers.1.blocks.0", "layers.2.blocks.0"} <= set(words(svg))


@pytest.mark.parametrize(
    ("layers", "heads", "shown"), [(12, 3, True), (12, 12, True), (12, 16, False), (32, 12, False)]
)
def test_values_are_written_while_they_stay_readable(tmp_path: Path, layers: int, heads: int, shown: bool) -> None:
    scores = {f"blocks.{layer}.attn": [7.3] * heads for layer in range(layers)}
    assert words(draw(tmp_path / "map.svg", scores, {})).count("7.3") == (layers * heads if shown else 0)


@pytest.mark.parametrize(
    ("score_name", "label"),
    [("entropy", "entropy [nats]"), ("variance", "variance"), ("my own score", "my own score")],
)
def test_colour_bar_gives_the_unit(tmp_path: Path, score_name: str, label: str) -> None:
    assert label in words(draw(tmp_path / "map.svg", score=score_name))


def test_tiny_scores_share_a_power_of_ten(tmp_path: Path) -> None:
    found = words(draw(tmp_path / "map.svg", {"blocks.0.attn": [2e-5, 4.5e-4]}, {}, "sensitivity"))
    assert {"20", "450", "sensitivity [10⁻⁶ nats]"} <= set(found)


@pytest.mark.parametrize(
    "scores",
    [[0.0, 0.0, 0.0], [5.0], [0.0, 1e-9, 1e-3, 2e-3, 9.0], [-0.5, 0.0, 0.5], [1e-30, 1e-30, 1.0]],
    ids=["all zero", "one head", "zero on a logarithmic scale", "negative", "thirty decades"],
)
def test_unusual_values_are_drawn(tmp_path: Path, scores: list[float]) -> None:
    svg = draw(tmp_path / "map.svg", {"blocks.0.attn": scores}, {"blocks.0.attn": [0]})
    assert ids(svg, "frozen:") == ["frozen:blocks.0:0"]
    assert "opacity: 0" not in svg.read_text()


def test_png_is_an_image_and_shows_high_scores_lighter(tmp_path: Path) -> None:
    path = draw(tmp_path / "map.png", {"blocks.0.attn": [0.0, 1.0]}, {})
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        seen = image.convert("RGB").getcolors(1 << 20)
    assert seen is not None
    colours = {colour for count, colour in seen if count > 3000}
    assert {(68, 1, 84), (253, 231, 37)} <= colours  # viridis' two ends


@pytest.mark.parametrize("suffix", [".svg", ".PNG"])
def test_same_input_gives_the_same_bytes_whatever_the_users_style(tmp_path: Path, suffix: str) -> None:
    first = draw(tmp_path / f"a{suffix}").read_bytes()
    with matplotlib.rc_context({"figure.facecolor": "red", "font.size": 30, "svg.fonttype": "none", "savefig.dpi": 20}):
        second = draw(tmp_path / f"b{suffix}").read_bytes()
        assert matplotlib.rcParams["font.size"] == 30
    assert first == second


@pytest.mark.parametrize("name", ["map.jpg", "map", "map.svg.gz"])
def test_other_suffixes_are_refused_and_the_old_file_stays(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        draw(path)
    assert path.read_bytes() == b"old"


def test_full_disk_leaves_the_old_picture_and_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "map.png"
    path.write_bytes(b"old")

    def fill_disk(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fill_disk)
    with pytest.raises(ConfigError, match="No space left"):
        draw(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match="matplotlib is not installed"):
        draw(tmp_path / "map.png")
