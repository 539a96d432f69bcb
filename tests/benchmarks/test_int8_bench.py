"""benchmarks/int8_processors.py on a tiny model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from processors import SATURATES_HERE, Kind, emulation
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import int8_processors


def test_it_measures_every_kind_of_weights_on_every_kind_of_processor(
    eam_model: Path, pictures: Path, tmp_path: Path
) -> None:
    kinds: list[Kind] = ["this machine", "avx512"]
    if emulation("avx512").missing is not None:
        kinds.pop()
    arguments = argparse.Namespace(
        model=eam_model,
        twin=eam_model.with_name("base.onnx"),
        data=pictures,
        split="odd",
        images=4,
        calib_data=pictures,
        calib_split="even",
        kinds=kinds,
        threads=1,
        rounds=2,
    )
    rows = int8_processors.measure(arguments, tmp_path)
    by_name = {(row["kind"], str(row["engine"]).rpartition(": ")[2]): row for row in rows}
    assert len(rows) == len(by_name) == 9 * len(kinds)
    assert {row["agreement"] for row in rows if row["engine"] == "FP32"} == {100.0}
    for kind in kinds:
        assert by_name[kind, "unsigned"]["kl"] == pytest.approx(by_name[kind, "8 full bits, x64quantprecision"]["kl"])
        assert by_name[kind, "neighbours fit (ours)"]["from_here"] == 0
    if "avx512" in kinds and not SATURATES_HERE:
        assert by_name["avx512", "8 full bits"]["from_here"] > 0
    console = Console(width=220)
    with console.capture() as shown:
        console.print(int8_processors.table(rows))
    assert "7 bits" in shown.get()
