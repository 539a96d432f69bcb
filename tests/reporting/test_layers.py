from __future__ import annotations

from pathlib import Path

import pytest
from report_records import card, device_build, engine, manifest, profile, write_all

from eamdeploy.artifacts.records import Record
from eamdeploy.reporting.records.layers import SLOWEST_LAYERS, LayerTimes, layer_times
from eamdeploy.reporting.records.sources import read_sources
from eamdeploy.reporting.write.content import gather


def test_the_slowest_come_first_and_the_sum_is_of_all() -> None:
    found = layer_times("x", "sha256:0", "now", {f"layer {n}": float(n) for n in range(20)})
    assert found is not None
    assert found.slowest[:2] == (("layer 19", 19.0), ("layer 18", 18.0)) and len(found.slowest) == SLOWEST_LAYERS
    assert (found.total_ms, found.timed) == (190.0, 20)
    assert found.shares[:2] == pytest.approx([1, 18 / 19])


@pytest.mark.parametrize("nothing", [None, {}])
def test_without_times_there_is_nothing(nothing: dict[str, float] | None) -> None:
    assert layer_times("x", "sha256:0", "now", nothing) is None


def test_layers_of_no_time_have_no_length() -> None:
    assert LayerTimes("x", "sha256:0", "now", (("a", 0.0),), 0.0, 1).shares == [0.0]


def layers_of(folder: Path, records: dict[str, Record]) -> list[tuple[str, str]]:
    found = gather(read_sources(write_all(folder, records))).layers
    return [(times.engine, times.occasion.partition(",")[0]) for times in found]


def test_an_engine_timed_by_its_build_and_by_profile_has_both_side_by_side(tmp_path: Path) -> None:
    times = {"a": 1.0}
    records: dict[str, Record] = {
        "p.json": profile(
            [engine("y.ort.onnx", None, 2.0, layer_ms=times), engine("x.plan", None, 1.0, layer_ms=times)],
            engine("b.plan", None, 1.0),
        ),
        "x.json": manifest("x.plan", card(), backend="trt", device=device_build()),
        "z.json": manifest("z.plan", card(), backend="trt", device=device_build()),
        "w.json": manifest("w.plan", card(), backend="trt", device=device_build(layer_ms=None)),
    }
    assert layers_of(tmp_path, records) == [
        ("x.plan", "when it was built"),
        ("x.plan", "by profile"),
        ("z.plan", "when it was built"),
        ("y.ort.onnx", "by profile"),
    ]
