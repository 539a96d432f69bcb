"""Codes and scales: row sums, rows frozen in part, and errors against what a cheaper rule would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from eamdeploy.eam.quantizers import dequantize, integer_values, quantize_rows
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.vocabulary import BITS, QUANTIZERS, Bits, Quantizer

every_bits = pytest.mark.parametrize("bits", BITS)
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)


def attention_rows(seed: int = 0, rows: int = 200, keys: int = 197) -> NDArray[np.float64]:
    """Rows as in a trained model: a broad local bump, a class-token spike of varying size, long tails."""
    rng = np.random.default_rng(seed)
    distance = np.abs(np.arange(keys) - rng.integers(keys, size=(rows, 1)))
    logits = -distance / rng.uniform(2, 200, size=(rows, 1)) + rng.normal(scale=0.5, size=(rows, keys))
    logits[:, 0] += rng.uniform(0, 5, size=rows)
    maps = np.exp(logits)
    return maps / maps.sum(axis=-1, keepdims=True)


def relative_error(rows: NDArray[np.float64], approximation: NDArray[np.floating]) -> float:
    return float(np.sqrt(((approximation - rows) ** 2).sum() / (rows**2).sum()))


def largest_at_maximum(rows: NDArray[np.float64], bits: int, quantizer: Quantizer) -> NDArray[np.float64]:
    """The plain rule: the row's maximum gets the largest code, then the row is scaled to sum 1."""
    power = 1 if quantizer == "uniform" else 2
    codes = np.rint((rows / rows.max(axis=-1, keepdims=True)) ** (1 / power) * (2**bits - 1))
    return codes**power / (codes**power).sum(axis=-1, keepdims=True)


SPECIAL_ROWS = {
    "one spike": np.eye(197)[:3],
    "uniform": np.full((2, 197), 1 / 197),
    "half zero": np.repeat([[0, 2 / 198]], 99, axis=0).reshape(1, 198),
    "spike on a floor": np.concatenate([np.full((1, 1), 0.9), np.full((1, 196), 0.1 / 196)], axis=1),
    "two keys": np.array([[0.5, 0.5], [1, 0], [0.999, 0.001]]),
    "one key": np.ones((2, 1)),
    "denormals": np.array([[1.0, 1e-42, 0.0]]),
    "sums to 0.9992": np.full((1, 4), 0.2498),
}


@every_bits
@every_quantizer
@pytest.mark.parametrize("name", SPECIAL_ROWS)
def test_rows_sum_to_1_and_are_never_empty(bits: Bits, quantizer: Quantizer, name: str) -> None:
    rows = SPECIAL_ROWS[name].astype(np.float32)
    codes, scales = quantize_rows(rows, bits, quantizer)
    assert codes.dtype == np.uint8
    assert scales.dtype == np.float32
    assert codes.shape == rows.shape
    assert scales.shape == rows.shape[:-1]
    assert codes.max() <= 2**bits - 1
    assert (codes.max(axis=-1) > 0).all()
    maps = dequantize(codes, scales, quantizer)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps.sum(axis=-1, dtype=np.float64), 1, rtol=0, atol=2e-7)


@settings(max_examples=100, deadline=None)
@given(
    raw=hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=3, max_side=12),
        elements=st.floats(0, 1) | st.sampled_from([0, 1e-30, 1e-6, 100]),
    ),
    bits=st.sampled_from(BITS),
    quantizer=st.sampled_from(QUANTIZERS),
    max_code=st.none() | st.integers(1, 255),
)
def test_row_sums_and_ranges_hold_for_any_row(
    raw: NDArray[np.float64], bits: Bits, quantizer: Quantizer, max_code: int | None
) -> None:
    raw[..., 0] += 1e-3
    rows = raw / raw.sum(axis=-1, keepdims=True)
    codes, scales = quantize_rows(rows, bits, quantizer, max_code=max_code)
    assert codes.max() <= min(2**bits - 1, max_code or 255)
    maps = dequantize(codes, scales, quantizer)
    np.testing.assert_allclose(maps.sum(axis=-1, dtype=np.float64), 1, rtol=0, atol=2e-7)
    assert (maps >= 0).all()
    # A larger probability never gets a smaller code.
    order = np.argsort(rows, axis=-1, kind="stable")
    assert (np.diff(np.take_along_axis(codes.astype(int), order, axis=-1), axis=-1) >= 0).all()


@every_bits
@every_quantizer
def test_uniform_and_one_hot_rows_are_exact(bits: Bits, quantizer: Quantizer) -> None:
    for rows in (np.full((1, 197), 1 / 197), np.eye(5)):
        np.testing.assert_allclose(dequantize(*quantize_rows(rows, bits, quantizer), quantizer), rows, rtol=1e-6)


@every_bits
@every_quantizer
def test_what_was_quantized_stays_as_it_is(bits: Bits, quantizer: Quantizer) -> None:
    maps = dequantize(*quantize_rows(attention_rows(), bits, quantizer), quantizer)
    again = dequantize(*quantize_rows(maps, bits, quantizer), quantizer)
    np.testing.assert_allclose(again, maps, rtol=0, atol=2e-7)


# Relative L2 errors on `attention_rows`, at most; measured values are a little lower.
@pytest.mark.parametrize(
    ("bits", "quantizer", "error"),
    [
        (2, "squared", 0.34),
        (3, "squared", 0.13),
        (4, "squared", 0.063),
        (8, "squared", 0.0037),
        (2, "uniform", 0.58),
        (3, "uniform", 0.36),
        (4, "uniform", 0.21),
        (8, "uniform", 0.0145),
    ],
)
def test_errors_on_realistic_rows(bits: Bits, quantizer: Quantizer, error: float) -> None:
    rows = attention_rows()
    assert relative_error(rows, dequantize(*quantize_rows(rows, bits, quantizer), quantizer)) < error


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_bits_work_because_codes_are_squared(bits: Bits) -> None:
    rows = attention_rows()
    squared, uniform = (relative_error(rows, dequantize(*quantize_rows(rows, bits, q), q)) for q in QUANTIZERS[::-1])
    assert squared < 0.75 * uniform


@pytest.mark.parametrize("bits", [2, 3, 4])
@every_quantizer
def test_few_bits_work_because_rows_are_renormalized(bits: Bits, quantizer: Quantizer) -> None:
    """The same codes with the step they were rounded with, instead of 1/Σ, lose or invent attention."""
    rows = attention_rows()
    power = 1 if quantizer == "uniform" else 2
    peak = rows.max(axis=-1, keepdims=True)
    plain = np.rint((rows / peak) ** (1 / power) * (2**bits - 1)) ** power * peak / (2**bits - 1) ** power
    assert np.abs(plain.sum(axis=-1) - 1).mean() > 0.008
    ours = dequantize(*quantize_rows(rows, bits, quantizer), quantizer)
    assert np.abs(ours.sum(axis=-1, dtype=np.float64) - 1).max() < 2e-7


@every_bits
@every_quantizer
def test_the_search_beats_the_plain_rule(bits: Bits, quantizer: Quantizer) -> None:
    rows = attention_rows(seed=1)
    ours = dequantize(*quantize_rows(rows, bits, quantizer), quantizer)
    plain = largest_at_maximum(rows, bits, quantizer)
    assert relative_error(rows, ours) < relative_error(rows, plain)
    if bits == 2:
        assert relative_error(rows, ours) < 0.7 * relative_error(rows, plain)


def test_more_bits_are_better() -> None:
    rows = attention_rows(seed=2)
    for quantizer in QUANTIZERS:
        errors = [relative_error(rows, dequantize(*quantize_rows(rows, bits, quantizer), quantizer)) for bits in BITS]
        assert errors == sorted(errors, reverse=True)


def test_rows_are_independent_of_their_neighbours() -> None:
    rows = attention_rows(rows=1100)
    codes, scales = quantize_rows(rows, 4, "squared")
    for index in (0, 511, 512, 1099):
        one_codes, one_scales = quantize_rows(rows[index], 4, "squared")
        np.testing.assert_array_equal(one_codes, codes[index])
        assert one_scales == scales[index]
    folded, _ = quantize_rows(rows.reshape(11, 100, 197), 4, "squared")
    np.testing.assert_array_equal(folded.reshape(codes.shape), codes)


def test_squares_of_codes_up_to_11_fit_int8() -> None:
    codes, _ = quantize_rows(attention_rows(), 4, "squared", max_code=11)
    assert codes.max() == 11
    assert integer_values(codes, "squared").max() == 121


def test_integer_values() -> None:
    small, large = np.array([0, 1, 15], np.uint8), np.array([0, 16, 255], np.uint8)
    for values, dtype, expected in (
        (integer_values(small, "squared"), np.uint8, [0, 1, 225]),
        (integer_values(large, "squared"), np.uint16, [0, 256, 65025]),
        (integer_values(large, "uniform"), np.uint8, [0, 16, 255]),
    ):
        assert values.dtype == dtype
        assert values.tolist() == expected


def test_bad_rows_and_options_are_refused() -> None:
    good = np.full((2, 4), 0.25)
    with pytest.raises(CheckpointError, match=r"blocks\.0.*do not sum to 1.*got 1.25 at \[0\]"):
        quantize_rows(good * [[1.25], [1]], 4, "squared", where="blocks.0")
    with pytest.raises(CheckpointError, match="do not sum to 1"):
        quantize_rows(np.zeros((2, 4)), 4, "squared")
    with pytest.raises(CheckpointError, match="not finite"):
        quantize_rows(good * [[np.nan], [1]], 4, "squared")
    with pytest.raises(CheckpointError, match="wrong form"):
        quantize_rows(np.zeros((0, 4)), 4, "squared")
    with pytest.raises(ConfigError, match=r"width of codes.*got 5"):
        quantize_rows(good, 5, "squared")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"unknown quantizer.*got cubed"):
        quantize_rows(good, 4, "cubed")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="largest code"):
        quantize_rows(good, 4, "squared", max_code=0)


# --- rows frozen in part ---------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    raw=hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=3, max_side=10),
        elements=st.floats(0, 1) | st.sampled_from([0, 0, 1e-30, 1e-6, 100]),
    ),
    bits=st.sampled_from(BITS),
    quantizer=st.sampled_from(QUANTIZERS),
)
def test_the_frozen_part_of_any_row_keeps_its_sum(
    data: st.DataObject, raw: NDArray[np.float64], bits: Bits, quantizer: Quantizer
) -> None:
    raw[..., 0] += 1e-3
    rows = raw / raw.sum(axis=-1, keepdims=True)
    mask = data.draw(hnp.arrays(np.bool_, rows.shape))
    codes, scales = quantize_rows(rows, bits, quantizer, mask=mask)
    assert (codes.dtype, scales.dtype) == (np.dtype(np.uint8), np.dtype(np.float32))
    assert (codes.shape, scales.shape) == (rows.shape, rows.shape[:-1])
    assert codes.max() <= 2**bits - 1
    assert not codes[~mask].any()
    in_use = mask.any(axis=-1)
    assert (scales[~in_use] == 0).all()
    assert (scales[in_use] > 0).all() and np.isfinite(scales).all()
    maps = dequantize(codes, scales, quantizer)
    sums = np.where(mask, rows, 0).sum(axis=-1)
    np.testing.assert_allclose(maps.sum(axis=-1, dtype=np.float64), sums, rtol=2e-7, atol=1e-23)
    np.testing.assert_allclose(maps[mask.all(axis=-1)].sum(axis=-1, dtype=np.float64), 1, rtol=0, atol=2e-7)


@every_bits
@every_quantizer
def test_a_full_mask_changes_nothing(bits: Bits, quantizer: Quantizer) -> None:
    rows = attention_rows(rows=600)
    full = np.ones(rows.shape, np.bool_)
    for one, other in zip(
        quantize_rows(rows, bits, quantizer), quantize_rows(rows, bits, quantizer, mask=full), strict=True
    ):
        np.testing.assert_array_equal(one, other, strict=True)


@every_bits
@every_quantizer
def test_a_frozen_part_is_quantized_as_a_row_of_its_own(bits: Bits, quantizer: Quantizer) -> None:
    rows = attention_rows(rows=600)
    kept = 120
    codes, scales = quantize_rows(rows, bits, quantizer, mask=np.arange(197) < kept)  # broadcast over the rows
    sums = rows[:, :kept].sum(axis=-1)
    alone_codes, alone_scales = quantize_rows(rows[:, :kept] / sums[:, None], bits, quantizer)
    assert np.mean(codes[:, :kept] != alone_codes) < 1e-3  # rounding of the division may move a value over an edge
    same = (codes[:, :kept] == alone_codes).all(axis=-1)
    np.testing.assert_allclose(scales[same], (alone_scales * sums)[same], rtol=1e-6)


@every_bits
@every_quantizer
def test_one_frozen_entry_of_a_row_is_exact(bits: Bits, quantizer: Quantizer) -> None:
    rows = attention_rows(rows=197)
    maps = dequantize(*quantize_rows(rows, bits, quantizer, mask=np.eye(197, dtype=np.bool_)), quantizer)
    np.testing.assert_allclose(np.diagonal(maps), np.diagonal(rows), rtol=1e-6, atol=1e-24)
    assert np.count_nonzero(maps) == np.count_nonzero(np.diagonal(rows) > 1e-24) > 190


@every_bits
@every_quantizer
@pytest.mark.parametrize("nothing", [0, 1e-42, 1e-310, 1e-25])
def test_a_frozen_part_that_sums_to_nothing_is_zero_behind_a_sound_scale(
    bits: Bits, quantizer: Quantizer, nothing: float
) -> None:
    rows = np.array([[0.25, nothing, 0.75, nothing]])
    codes, scales = quantize_rows(rows, bits, quantizer, mask=np.array([False, True, False, True]))
    assert not codes.any()
    assert scales.tolist() == [1.0]


def test_a_tiny_frozen_part_has_a_scale_among_the_normal_numbers() -> None:
    rows = np.array([[1.0, 2e-24, 1e-24]])
    codes, scales = quantize_rows(rows, 8, "squared", mask=np.array([False, True, True]))
    assert scales[0] > np.finfo(np.float32).tiny
    np.testing.assert_allclose(dequantize(codes, scales, "squared")[0], [0, 2e-24, 1e-24], rtol=0.01)


def test_rows_are_checked_whole_even_where_a_part_is_frozen() -> None:
    rows = np.array([[0.5, 0.6]])
    with pytest.raises(CheckpointError, match=r"do not sum to 1.*got 1.1"):
        quantize_rows(rows, 4, "squared", mask=np.array([True, False]))
    maps = dequantize(*quantize_rows(np.array([[0.5, 0.4992]]), 8, "squared", mask=np.array([True, False])), "squared")
    assert maps[0, 0] == pytest.approx(0.5 / 0.9992, rel=1e-6)
