"""benchmarks/local_heads.py and local_graphs.py, on small grids."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eamdeploy.errors import ConfigError, ParityError
from eamdeploy.profiling.timing import Schedule

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import local_heads
from local_graphs import FORMS, Form, conv_graph, drawn, map_graph
from local_heads import Local, locality

QUICK = Schedule(warmup_ms=0, min_seconds=0, min_runs=2, sittings=1)


def test_a_scaled_head_has_rows_that_sum_to_1_and_only_neighbours() -> None:
    heads = drawn(np.random.default_rng(0), 2, 4, 3, scaled=True)
    maps = heads.maps()
    np.testing.assert_allclose(maps.sum(axis=2), 1, rtol=1e-5)
    between = maps[0, 1:, 1:].reshape(4, 4, 4, 4)
    assert (between[1, 1, :3, :3] > 0).all() and between[1, 1].astype(bool).sum() == 9
    assert between[0, 3].astype(bool).sum() == 4
    plain = drawn(np.random.default_rng(0), 2, 4, 3, scaled=False)
    assert plain.maps()[0, 1, 1:].sum() < plain.maps()[0, 6, 1:].sum() == pytest.approx(1)
    np.testing.assert_allclose(plain.maps()[0, 6, 1:].reshape(4, 4)[:3, :3], plain.kernel[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_form_that_computes_something_else_is_not_timed(form: Form, scaled: bool) -> None:
    rng = np.random.default_rng(1)
    layers = [drawn(rng, 2, 4, 3, scaled=scaled) for _ in range(2)]
    values = [rng.standard_normal((1, 17, 2 * 8)).astype(np.float32) for _ in layers]
    for graph in (conv_graph(layers, 8, form), map_graph(layers, 8)):
        local_heads._check(graph, layers, values, 1, form)
        for part in ("kernel", "column", "row"):
            changed = getattr(layers[1], part).copy()
            changed[1].flat[-1] += 0.01
            with pytest.raises(ParityError, match=f"{form} does not compute what the map does"):
                local_heads._check(graph, [layers[0], replace(layers[1], **{part: changed})], values, 1, form)


def test_every_form_is_set_against_the_product() -> None:
    rows = local_heads.measure(4, 2, 8, [3], 1, QUICK)
    assert [(row.form, row.scaled) for row in rows] == [(form, scaled) for scaled in (False, True) for form in FORMS]
    assert {(row.tokens, row.heads, row.kernel, row.map_ms) for row in rows} == {(17, 2, 3, rows[0].map_ms)}
    assert all(row.conv_ms > 0 and row.speed_up.median > 0 for row in rows)


def test_a_map_of_one_kernel_is_replaced_exactly() -> None:
    map_ = drawn(np.random.default_rng(2), 1, 6, 3, scaled=True).maps()[0].astype(np.float64)
    found = locality("blocks.0.attn", 1, map_, (6, 6), 1, 3)
    assert found.offsets == pytest.approx(1) and found.box == pytest.approx(1)
    assert found.own_error == pytest.approx(0, abs=1e-6) and found.kernel_error == pytest.approx(0, abs=1e-4)
    assert found.to_patches == pytest.approx(map_[1:, 1:].sum() / 36)
    wider = drawn(np.random.default_rng(2), 1, 6, 5, scaled=True).maps()[0].astype(np.float64)
    narrow = locality("blocks.0.attn", 1, wider, (6, 6), 1, 3)
    assert 0.3 < narrow.box <= narrow.offsets < 0.9 and narrow.kernel_error > narrow.own_error > 0.1


def test_neighbours_may_lie_anywhere_and_differ_from_patch_to_patch() -> None:
    """Two patches look two columns to the right, all others at themselves."""
    map_ = np.eye(12)
    for patch in (4, 5):
        map_[patch] = np.eye(12)[patch + 2]
    found = locality("blocks.0.attn", 0, map_, (3, 4), 0, 1)
    assert found.offsets == found.box == pytest.approx(10 / 12) and found.to_patches == 1
    assert found.own_error == pytest.approx(np.sqrt(2 / 12))
    found = locality("blocks.0.attn", 0, map_, (3, 4), 0, 3)
    assert found.offsets == pytest.approx(1) and found.box == pytest.approx(1)
    assert found.own_error == 0 and found.kernel_error > 0.2, "of the six that could, two do"


def test_a_uniform_map_is_not_local() -> None:
    found = locality("blocks.0.attn", 0, np.full((37, 37), 1 / 37), (6, 6), 1, 3)
    assert found.box == pytest.approx((6 + 5 + 5) ** 2 / 36**2)  # pairs at offsets of at most 1
    assert found.own_error > 0.8


def test_the_command_looks_at_a_checkpoint(
    eam_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "x.json"
    options = ["--checkpoint", str(eam_checkpoint), "--no-times", "--kernels", "1", "3", "-o", str(output)]
    monkeypatch.setattr(sys, "argv", ["local_heads.py", *options])
    local_heads.main()
    found = Local.read(output)
    assert [(head.path, head.head, head.kernel) for head in found.heads] == [
        (path, head, kernel)
        for path, head in (("blocks.0.attn", 1), ("blocks.1.attn", 0), ("blocks.1.attn", 1))
        for kernel in (1, 3)
    ]
    assert all(0 < head.box <= head.offsets + 1e-9 <= 1 + 1e-6 for head in found.heads) and not found.timed
    shown = capsys.readouterr().out
    assert all(f"{100 * head.kernel_error:.1f} %" in shown for head in found.heads)
    with pytest.raises(ConfigError, match="larger than the patches' grid; expected at most 4"):
        local_heads.look(eam_checkpoint, [3, 5])
