"""What people read about frozen heads, rows and entries."""

from __future__ import annotations

import pytest
from rich.console import Console, RenderableType

from eamdeploy.artifacts.card import Freezing, Preprocessing
from eamdeploy.cli import show
from eamdeploy.eam.analysis import Analysis
from eamdeploy.eam.records import AttentionShape, Calibration
from eamdeploy.vocabulary import Granularity

SHAPE = AttentionShape(heads=3, tokens=5)


def lines_of(shown: RenderableType) -> list[str]:
    console = Console(width=120, color_system=None)
    with console.capture() as captured:
        console.print(shown)
    return [line.rstrip() for line in captured.get().splitlines()]


def freezing(granularity: Granularity, **changes: object) -> Freezing:
    made = Freezing(
        granularity=granularity,
        bits=4,
        quantizer="squared",
        score="variance",
        sparsity_asked=0.2,
        sparsity=0.195,
        heads={"blocks.1.attn": [0, 2]},
    )
    return made.model_copy(update=changes)


@pytest.mark.parametrize(
    ("granularity", "title", "column", "what"),
    [
        ("head", "Frozen heads", "heads (* frozen)", "2 of 6 heads"),
        ("row", "Frozen rows", "heads (* with frozen rows)", "rows in 2 of 6 heads"),
        ("entry", "Frozen entries", "heads (* with frozen entries)", "entries in 2 of 6 heads"),
    ],
)
def test_frozen_heads(granularity: Granularity, title: str, column: str, what: str) -> None:
    lines = lines_of(show.frozen_heads(freezing(granularity), {"blocks.0.attn": SHAPE, "blocks.1.attn": SHAPE}))
    assert lines == [
        title,
        f"module         {column}",
        "blocks.0.attn  0  1  2",
        "blocks.1.attn  0* 1  2*",
        f"sparsity 19.5% (asked for 20.0%): {what}, by variance; 4 bits squared",
    ]


def test_ranks_are_named() -> None:
    made = freezing("head", ranks={"blocks.1.attn": [None, 4]})
    lines = lines_of(show.frozen_heads(made, {"blocks.1.attn": SHAPE}))
    assert lines[2] == "blocks.1.attn  0* 1  2*r4"
    assert "2 of 3 heads (1 with rank 4), by variance" in lines[-1]


def test_window_maps_are_named() -> None:
    windowed = AttentionShape(heads=3, tokens=5, windows=[0, 1])
    made = freezing("head", window_maps="class", sparsity_asked=None)
    last = lines_of(show.frozen_heads(made, {"blocks.1.attn": windowed}))[-1]
    assert last == "sparsity 19.5%: 2 of 3 heads, by variance; 4 bits squared; window maps: class"


@pytest.mark.parametrize(
    ("granularity", "column", "row"),
    [
        ("head", "heads (* would be frozen)", "0.25*  1   0.5*"),
        ("row", "heads (share of rows that would be frozen)", "0.25 (100%)  1 (0%)  0.5 (20%)"),
        ("entry", "heads (share of entries that would be frozen)", "0.25 (100%)  1 (0%)  0.5 (20%)"),
    ],
)
def test_analysis(granularity: Granularity, column: str, row: str) -> None:
    result = Analysis(
        timm_model="vit",
        weights="w.safetensors",
        preprocessing=Preprocessing(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1)),
        attention={"blocks.1.attn": SHAPE},
        calibration=Calibration(n_images=7, digest="", source="photos"),
        granularity=granularity,
        window_maps=None,
        bins=16,
        spacing="uniform",
        score="variance",
        scores={"variance": {"blocks.1.attn": [0.25, 1.0, 0.5]}},
        sparsity_asked=0.5,
        sparsity=0.4,
        frozen={"blocks.1.attn": [0, 2]},
        shares={"blocks.1.attn": [1.0, 1.0 if granularity == "head" else 0.2]},
        versions={},
    )
    assert lines_of(show.analysis(result)) == [
        "variance of vit",
        f"module         {column}",
        f"blocks.1.attn  {row}",
        "7 images of photos; sparsity 40.0% of 50.0% asked for",
    ]
