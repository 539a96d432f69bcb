"""What makes an array an attention map: finite values in [0, 1], rows that sum to 1."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.errors import CheckpointError

RANGE_TOLERANCE = 1e-5
ROW_SUM_TOLERANCE = 1e-3


def check_maps(maps: NDArray[Any], where: str, what: str = "attention maps") -> None:
    """Every row of `maps` is a probability distribution, up to `RANGE_TOLERANCE` and `ROW_SUM_TOLERANCE`.

    Args:
        maps: float [..., N]; the last axis are the keys.
        where: what the error calls the module, e.g. `blocks.3.attn`.
        what: what the error calls the array.

    Raises:
        CheckpointError: the array is empty or not floating point, a value is NaN, infinite or outside [0, 1], or a row
            does not sum to 1; the message gives the index of one such place.
    """
    if maps.ndim < 1 or maps.size == 0 or not np.issubdtype(maps.dtype, np.floating):
        raise CheckpointError(
            f"{what} of {where} have the wrong form",
            expected="a non-empty floating-point array [..., keys]",
            got=f"{maps.dtype} {list(maps.shape)}",
        )
    with np.errstate(invalid="ignore", over="ignore"):  # reported below, with the place
        row_sums = maps.sum(axis=-1, dtype=np.float32 if maps.dtype == np.float16 else None)
        lowest, highest = float(maps.min()), float(maps.max())
    if not np.isfinite(row_sums).all() and (broken := ~np.isfinite(maps)).any():
        raise CheckpointError(
            f"{what} of {where} are not finite",
            expected="finite values",
            got=f"{np.count_nonzero(broken)} NaN or infinite of {maps.size}, the first at {_index(broken)}",
            hint="Look for NaN or very large numbers in the model's weights and in its input.",
        )
    if lowest < -RANGE_TOLERANCE or highest > 1 + RANGE_TOLERANCE:
        outside = (maps < -RANGE_TOLERANCE) | (maps > 1 + RANGE_TOLERANCE)
        raise CheckpointError(
            f"{what} of {where} leave [0, 1] at {_index(outside)}",
            expected="values in [0, 1]",
            got=f"minimum {lowest:.6g}, maximum {highest:.6g}",
            hint="Maps are taken after the softmax, without dropout.",
        )
    off = np.abs(row_sums - 1) > ROW_SUM_TOLERANCE
    if off.any():
        worst = np.unravel_index(int(np.abs(row_sums - 1).argmax()), row_sums.shape)
        raise CheckpointError(
            f"{np.count_nonzero(off)} of {off.size} rows in the {what} of {where} do not sum to 1",
            expected=f"row sums within {ROW_SUM_TOLERANCE:g} of 1 (over the last axis)",
            got=f"{row_sums[worst]:.6g} at {[int(i) for i in worst]}",
            hint="Take them behind the softmax, or divide every row by its sum.",
        )


def _index(where: NDArray[np.bool_]) -> list[int]:
    """Index of the first true value."""
    return [int(i) for i in np.unravel_index(int(where.argmax()), where.shape)]
