from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from made_checkpoints import make
from numpy.typing import NDArray

from eamdeploy.eam.checkpoint import Checkpoint
from eamdeploy.eam.int8 import LARGEST, fit_int8, int8_checkpoint, rows_over_int8
from eamdeploy.eam.quantizers import integer_values, quantize_rows
from eamdeploy.vocabulary import Granularity


def maps(seed: int = 0, keys: int = 49) -> NDArray[np.float64]:
    """Rows [2, 7, keys] that sum to 1."""
    return np.random.default_rng(seed).dirichlet(np.full(keys, 0.4), size=(2, 7))


@pytest.mark.parametrize(("bits", "quantizer"), [(4, "uniform"), (3, "squared"), (2, "squared"), (2, "uniform")])
def test_what_fits_stays_bit_for_bit(bits: Any, quantizer: Any) -> None:
    codes, scales = quantize_rows(maps(), bits, quantizer)
    integers = integer_values(codes, quantizer)
    fitted, new_scales = fit_int8(integers, scales)
    np.testing.assert_array_equal(fitted, integers)
    np.testing.assert_array_equal(new_scales, scales)
    assert (fitted.dtype, new_scales.dtype, rows_over_int8(integers)) == (np.dtype(np.uint8), np.dtype(np.float32), 0)


@pytest.mark.parametrize("largest", [11, 12])
def test_the_border_is_the_square_of_11(largest: int) -> None:
    integers = np.array([[largest**2, 1, 0]], np.uint8)
    assert rows_over_int8(integers) == (largest == 12)
    assert (fit_int8(integers, np.array([0.5], np.float32))[0].max() == largest**2) == (largest == 11)
    assert (rows_over_int8(np.array([[127]])), rows_over_int8(np.array([[128]]))) == (0, 1)


@pytest.mark.parametrize(("bits", "quantizer"), [(8, "uniform"), (4, "squared"), (8, "squared")])
def test_rows_that_do_not_fit_keep_their_sum_and_almost_their_values(bits: Any, quantizer: Any) -> None:
    codes, scales = quantize_rows(maps(), bits, quantizer)
    scales *= np.linspace(0.1, 1, 14, dtype=np.float32).reshape(2, 7)  # frozen in part
    integers = integer_values(codes, quantizer)
    assert rows_over_int8(integers) > 0
    fitted, new_scales = fit_int8(integers, scales)
    assert fitted.max() <= LARGEST and (new_scales > 0).all()
    before, after = (i * s[..., None].astype(np.float64) for i, s in ((integers, scales), (fitted, new_scales)))
    np.testing.assert_allclose(after.sum(axis=-1), before.sum(axis=-1), rtol=1e-6)
    error, whole = np.linalg.norm(after - before), np.linalg.norm(before)
    assert 0 < error < 0.02 * whole
    np.testing.assert_array_equal(after[integers == 0], 0)  # nothing appears where nothing is frozen


def test_rows_without_a_frozen_entry_stay_empty() -> None:
    integers = np.array([[0, 0, 0], [200, 0, 100]], np.uint8)
    fitted, scales = fit_int8(integers, np.array([0, 0.003], np.float32))
    np.testing.assert_array_equal(fitted[0], 0)
    assert scales[0] == 0 and fitted[1, 1] == 0


@pytest.mark.parametrize("granularity", ["head", "row", "entry"])
def test_a_checkpoint_keeps_what_is_frozen(granularity: Granularity, checkpoint: Checkpoint) -> None:
    small = make(checkpoint, granularity)
    same, changed = int8_checkpoint(small)
    assert changed == 0
    quantizer = small.header.freezing.quantizer
    for path, item in small.frozen.items():
        np.testing.assert_array_equal(same.frozen[path].maps("uniform"), item.maps(quantizer))

    item = small.frozen["blocks.1.attn"]
    wide = item.codes.astype(np.int64) * 2  # squares of up to 14
    item.codes[...] = wide
    fitted, changed = int8_checkpoint(small)
    assert changed == rows_over_int8(wide**2) > 0
    new = fitted.frozen["blocks.1.attn"]
    np.testing.assert_array_equal(new.heads, item.heads)
    np.testing.assert_array_equal(new.frozen(), item.frozen())
    np.testing.assert_allclose(
        new.maps("uniform").sum(axis=-1), item.maps(quantizer).sum(axis=-1), rtol=1e-5, atol=1e-7
    )
    assert new.codes.max() <= LARGEST
    assert (fitted.header.freezing.bits, fitted.header.freezing.quantizer) == (8, "uniform")
