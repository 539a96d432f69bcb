"""What maps and factors in a file for `pack` have in common: their heads, and codes by rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.eam.quantizers import integer_values
from eamdeploy.errors import CheckpointError
from eamdeploy.vocabulary import Bits, Quantizer


def check_given_heads(heads: NDArray[Any], where: str, letter: str) -> None:
    """The array is a list of distinct heads.

    Args:
        where: what the error calls the array.
        letter: what the documents call the number of these heads.

    Raises:
        CheckpointError: it is none.
    """
    if heads.ndim != 1 or not np.issubdtype(heads.dtype, np.integer) or len(np.unique(heads)) != len(heads):
        raise CheckpointError(where, expected=f"distinct integers [{letter}]", got=heads.tolist())


def read_codes(codes: NDArray[Any], frozen: NDArray[np.bool_], where: str, shape: str, bits: Bits) -> NDArray[np.uint8]:
    """The codes, 0 where nothing is frozen.

    Args:
        frozen: which codes count, of the codes' shape.
        where: what the error calls the array.
        shape: what the documents say of its shape.

    Raises:
        CheckpointError: there is none, they are no integers, or one does not fit the bits.
    """
    largest = 2**bits - 1
    if codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise CheckpointError(
            f"{where} are no codes",
            expected=f"integers {shape}",
            got=f"{codes.dtype} {list(codes.shape)}",
        )
    kept = np.where(frozen, codes, 0)
    if kept.min() < 0 or kept.max() > largest:
        raise CheckpointError(
            f"{where} out of range",
            expected=f"integers in 0 … {largest} ({bits} bits)",
            got=f"{kept.min()} … {kept.max()}",
            hint="See --bits.",
        )
    return kept.astype(np.uint8)


def whole_row_scales(
    codes: NDArray[np.uint8], frozen: NDArray[np.bool_], where: str, quantizer: Quantizer
) -> NDArray[np.float64]:
    """The scales with which rows of codes sum to 1.

    Args:
        frozen: which codes count, of the codes' shape.
        where: what the error calls the codes.

    Raises:
        CheckpointError: a row that counts has no code but 0.
    """
    sums = integer_values(codes, quantizer).sum(axis=-1, dtype=np.int64)
    empty = frozen.any(axis=-1) & (sums == 0)
    if empty.any():
        place = [int(i) for i in np.unravel_index(int(empty.argmax()), empty.shape)]
        raise CheckpointError(
            f"{where}: a row has no code but 0",
            expected="rows that can sum to 1",
            got=f"only 0 at {place}",
            hint="Give the row a code above 0, or give floats, which are quantized here.",
        )
    scales: NDArray[np.float64] = 1 / np.maximum(sums, 1)
    return scales
