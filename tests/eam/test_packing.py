"""Codes and masks as bytes: the layout, by hand and for any array, and damaged streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from eamdeploy.eam.packing import pack_codes, pack_mask, packed_size, unpack_codes, unpack_mask
from eamdeploy.errors import CheckpointError
from eamdeploy.vocabulary import BITS, Bits


# The layout that the docstring of `pack_codes` promises, computed by hand.
@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (2, [1, 2, 3, 0, 3], [0b00_11_10_01, 0b11]),
        (3, [1, 2, 3, 4, 5, 6, 7, 0, 7], [0b11_010_001, 0b0_101_100_0, 0b000_111_11, 0b111]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (8, [1, 255], [1, 255]),
        (4, [], []),
    ],
)
def test_packed_bytes(bits: Bits, codes: list[int], packed: list[int]) -> None:
    array = np.array(codes, np.uint8)
    got = pack_codes(array, bits)
    assert got.dtype == np.uint8
    assert got.tolist() == packed
    np.testing.assert_array_equal(unpack_codes(got, bits, array.shape), array)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), bits=st.sampled_from(BITS), shape=hnp.array_shapes(max_dims=3, max_side=7))
def test_packing_round_trip(data: st.DataObject, bits: Bits, shape: tuple[int, ...]) -> None:
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = pack_codes(np.asfortranarray(codes), bits)
    assert packed.shape == (packed_size(codes.size, bits),)
    stream = sum(int(byte) << (8 * i) for i, byte in enumerate(packed))
    assert stream == sum(int(code) << (bits * i) for i, code in enumerate(codes.ravel()))
    unpacked = unpack_codes(packed, bits, shape)
    assert unpacked.dtype == np.uint8
    np.testing.assert_array_equal(unpacked, codes)


def test_unpacking_checks_length_and_padding() -> None:
    packed = pack_codes(np.array([1, 2, 3], np.uint8), 3)
    assert packed.size == 2
    wrong: Any  # of another size or type
    for wrong in (packed[:1], np.append(packed, np.uint8(0)), packed.astype(np.int8), packed[None]):
        with pytest.raises(CheckpointError, match=r"eam\.a\.codes has the wrong size.*uint8 \[2\]"):
            unpack_codes(wrong, 3, (3,), where="eam.a.codes")
    for bit in range(9, 16):
        broken = packed.copy()
        broken[bit // 8] |= 1 << bit % 8
        with pytest.raises(CheckpointError, match=r"eam\.a\.codes goes on.*padding"):
            unpack_codes(broken, 3, (3,), where="eam.a.codes")


def test_codes_that_do_not_fit_are_not_packed() -> None:
    with pytest.raises(CheckpointError, match="at most 7; got 8"):
        pack_codes(np.array([7, 8], np.uint8), 3)


def test_packed_bytes_of_a_mask() -> None:
    mask = np.array([[1, 0, 0, 1, 1], [0, 0, 0, 0, 1]], np.bool_)
    packed = pack_mask(mask)
    assert (packed.dtype, packed.tolist()) == (np.dtype(np.uint8), [0b000_11001, 0b10])
    np.testing.assert_array_equal(unpack_mask(packed, (2, 5)), mask, strict=True)


@settings(deadline=None)
@given(mask=hnp.arrays(np.bool_, hnp.array_shapes(max_dims=3, max_side=9)))
def test_mask_round_trip(mask: NDArray[np.bool_]) -> None:
    packed = pack_mask(np.asfortranarray(mask))
    np.testing.assert_array_equal(packed, np.packbits(mask.reshape(-1), bitorder="little"), strict=True)
    np.testing.assert_array_equal(unpack_mask(packed, mask.shape), mask, strict=True)


@settings(deadline=None)
@given(data=st.data(), bits=st.sampled_from(BITS), mask=hnp.arrays(np.bool_, hnp.array_shapes(max_dims=3, max_side=7)))
def test_round_trip_of_the_codes_under_a_mask(data: st.DataObject, bits: Bits, mask: NDArray[np.bool_]) -> None:
    codes = data.draw(hnp.arrays(np.uint8, mask.shape, elements=st.integers(0, 2**bits - 1))) * mask
    packed = pack_codes(codes[mask], bits)
    assert packed.size == packed_size(int(np.count_nonzero(mask)), bits)
    again = np.zeros(mask.shape, np.uint8)
    again[mask] = unpack_codes(packed, bits, (int(np.count_nonzero(mask)),))
    np.testing.assert_array_equal(again, codes)


def test_unpacking_a_mask_checks_length_and_padding() -> None:
    packed = pack_mask(np.ones(9, np.bool_))
    wrong: Any  # of another size or type
    for wrong in (packed[:1], np.append(packed, np.uint8(0)), packed.astype(np.int8), packed.astype(np.bool_)):
        with pytest.raises(
            CheckpointError, match=r"eam\.a\.mask has the wrong size.*uint8 \[2\] for the mask \[3, 3\]"
        ):
            unpack_mask(wrong, (3, 3), where="eam.a.mask")
    with pytest.raises(CheckpointError, match=r"eam\.a\.mask goes on.*padding bits 0; got 3"):
        unpack_mask(packed | np.array([0, 2], np.uint8), (3, 3), where="eam.a.mask")
