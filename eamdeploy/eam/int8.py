"""Frozen maps whose integers fit INT8, for TensorRT, which takes no other integer constants.

Uniform codes of up to 7 bits and squares of codes up to 11 fit as they are. A row with a larger integer is quantized
anew to integers up to 127, whatever its quantizer (the squares up to 121 are some of them), and keeps its sum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.eam.quantizers import integer_values, quantize_rows
from eamdeploy.eam.records import Checkpoint, FrozenFactors, FrozenMaps

LARGEST = 127


def fit_int8(
    integers: NDArray[np.integer[Any]], scales: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Integers of at most 127 and scales that stand for the same rows, exactly where that is possible.

    Args:
        integers: [..., N], none negative; entry j of a row stands for scale·integer.
        scales: float32 [...], positive where a row has integers other than 0.

    Returns:
        integers uint8 [..., N] and scales float32 [...]; rows that fitted are unchanged, any other has the same sum up
        to float32's rounding.
    """
    flat = integers.reshape(-1, integers.shape[-1])
    over = flat.max(axis=1, initial=0) > LARGEST
    fitted = np.where(over[:, None], 0, flat).astype(np.uint8)
    new_scales = scales.reshape(-1).astype(np.float32)
    if over.any():
        old = flat[over].astype(np.float64)
        sums = old.sum(axis=1)
        fitted[over], _ = quantize_rows(old / sums[:, None], 8, "uniform", max_code=LARGEST)
        new_scales[over] *= sums / fitted[over].sum(axis=1, dtype=np.int64)
    return fitted.reshape(integers.shape), new_scales.reshape(scales.shape)


def rows_over_int8(integers: NDArray[np.integer[Any]]) -> int:
    """How many rows of `integers` [..., N] `fit_int8` has to quantize anew."""
    return int(np.count_nonzero(integers.max(axis=-1, initial=0) > LARGEST))


def int8_checkpoint(checkpoint: Checkpoint) -> tuple[Checkpoint, int]:
    """`checkpoint` with maps whose codes are INT8 integers (its header says uniform, 8 bits), to export for TensorRT.

    Returns:
        the checkpoint, and the number of rows that are quantized anew; without such rows its maps are the same.
    """
    quantizer = checkpoint.header.freezing.quantizer
    changed = 0

    def fitted(codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        nonlocal changed
        integers = integer_values(codes, quantizer)
        changed += rows_over_int8(integers)
        return fit_int8(integers, scales)

    frozen = {
        path: FrozenMaps(item.heads, *fitted(item.codes, item.scales), item.mask)
        for path, item in checkpoint.frozen.items()
    }
    factors = {
        path: tuple(
            FrozenFactors(
                group.heads,
                *fitted(group.mix_codes, group.mix_scales),
                *fitted(group.pool_codes, group.pool_scales),
            )
            for group in groups
        )
        for path, groups in checkpoint.factors.items()
    }
    freezing = checkpoint.header.freezing.model_copy(update={"bits": 8, "quantizer": "uniform"})
    header = checkpoint.header.model_copy(update={"freezing": freezing})
    return replace(checkpoint, frozen=frozen, factors=factors, header=header), changed
