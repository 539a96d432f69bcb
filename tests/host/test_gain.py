from __future__ import annotations

from pathlib import Path

import pytest

from eamdeploy import export
from eamdeploy.cli import show
from eamdeploy.errors import EngineError
from eamdeploy.host.gain import measure_gain
from eamdeploy.profiling.timing import Schedule, SpeedUp
from eamdeploy.records.gain import Gain

QUICK = Schedule(warmup_ms=0, min_seconds=0.01, min_runs=3, sittings=2)


def test_export_says_what_freezing_gained_only_when_asked(eam_checkpoint: Path, tmp_path: Path) -> None:
    done = export(eam_checkpoint, tmp_path / "x.onnx", measure=True)
    assert done.gain is not None and done.gain.speed_up.rounds >= 20
    assert done.baseline is None and [file.name for file in tmp_path.glob("*.onnx")] == ["x.onnx"]
    assert export(eam_checkpoint, tmp_path / "x.onnx").gain is None


def test_a_model_is_as_fast_as_itself_and_what_it_does_not_read_is_told(eam_model: Path) -> None:
    model = eam_model.read_bytes()
    gain = measure_gain(model, model, 1, QUICK)
    assert 0.2 < gain.speed_up.median < 5 and gain.threads == 1
    with pytest.raises(EngineError, match="the unfrozen twin"):
        measure_gain(model, b"no model", 1, QUICK)


@pytest.mark.parametrize(
    ("low", "median", "high", "verdict"),
    [(1.02, 1.1, 1.2, "faster"), (0.8, 0.9, 0.98, "slower"), (0.95, 1.02, 1.1, "no difference beyond the noise")],
)
def test_faster_is_only_said_beyond_the_noise(low: float, median: float, high: float, verdict: str) -> None:
    speed = SpeedUp(rounds=50, sittings=5, median=median, low=low, high=high, p5=0.5, p25=median, p75=median, p95=1.5)
    assert f"2 threads: {verdict} (95 % interval" in show._gain(Gain(speed_up=speed, threads=2, machine="x"))
