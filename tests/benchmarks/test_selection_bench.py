"""benchmarks/selection.py on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny_models import SWIN_KWARGS, SWIN_NAME, make_model, save_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import selection


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["selection.py", *map(str, arguments)])
    selection.main()


def test_every_rule_is_measured_at_every_sparsity(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = save_weights(make_model(SWIN_NAME), tmp_path / "swin.safetensors")
    output = tmp_path / "x.json"
    run(
        monkeypatch,
        *("--model", SWIN_NAME, "--model-kwargs", json.dumps(SWIN_KWARGS), "--weights", weights),
        *("--calibration", pictures, "--images", 6, "--sparsity", 0.2, 0.5, "--threads", 1, "-o", output),
    )
    rows = json.loads(output.read_text())["rows"]
    assert [row["rule"] for row in rows] == ["score", "score per entry", "together", "default"] * 2
    # with 6 images the default takes all of them
    assert [rows[i + 2] | {"rule": ""} for i in (0, 4)] == [rows[i + 3] | {"rule": ""} for i in (0, 4)]
    assert all(0 < row["sparsity"] <= asked for row, asked in zip(rows, [0.2] * 4 + [0.5] * 4, strict=True))
    assert all(row["kl"] == pytest.approx(row["calibration_kl"], rel=0.5) for row in rows)
    assert "ratio" in capsys.readouterr().out


def test_time_alone_is_extrapolated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "--model", SWIN_NAME, "--model-kwargs", json.dumps(SWIN_KWARGS), "--timed", 2, "--threads", 1)
    assert "extrapolated from 2 images" in capsys.readouterr().out
