"""Codes and masks as the bytes that a checkpoint stores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.errors import CheckpointError
from eamdeploy.vocabulary import Bits


def packed_size(n_codes: int, bits: int) -> int:
    """Bytes that `n_codes` codes take when packed."""
    return (n_codes * bits + 7) // 8


def pack_codes(codes: NDArray[np.uint8], bits: Bits) -> NDArray[np.uint8]:
    """`codes` (any shape, C order) as a little-endian bit stream, uint8 [ceil(codes · bits / 8)].

    Bit j of the stream is bit j mod 8 (value 2^(j mod 8)) of byte j div 8. Code i occupies the stream's bits
    i·bits … i·bits + bits − 1, least significant first. Bits after the last code are 0. So:

    - 2 bits: byte = c0 | c1 << 2 | c2 << 4 | c3 << 6
    - 3 bits: eight codes in three bytes, the 24-bit little-endian number c0 | c1 << 3 | … | c7 << 21
    - 4 bits: byte = c0 | c1 << 4
    - 8 bits: byte = c0

    Raises:
        CheckpointError: a code needs more bits.
    """
    if codes.size and int(codes.max()) >= 2**bits:
        raise CheckpointError(f"codes do not fit {bits} bits", expected=f"at most {2**bits - 1}", got=int(codes.max()))
    return _pack(codes, bits)


def unpack_codes(
    packed: NDArray[np.uint8], bits: Bits, shape: Sequence[int], *, where: str = "packed codes"
) -> NDArray[np.uint8]:
    """The codes, uint8 of `shape`, that `pack_codes` wrote into `packed`.

    Raises:
        CheckpointError: `packed` has another length than `shape` needs, or a bit after the last code is set; the
            message begins with `where`.
    """
    return _unpack(packed, bits, shape, f"{bits}-bit codes", where)


def pack_mask(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """`mask` (any shape, C order) as uint8 [ceil(pieces / 8)]: the bit stream of `pack_codes`, one bit a piece."""
    return _pack(mask.astype(np.uint8), 1)


def unpack_mask(packed: NDArray[np.uint8], shape: Sequence[int], *, where: str = "packed mask") -> NDArray[np.bool_]:
    """The mask, bool of `shape`, that `pack_mask` wrote into `packed`.

    Raises:
        CheckpointError: as `unpack_codes`.
    """
    return _unpack(packed, 1, shape, "the mask", where).astype(np.bool_)


def _pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    stream = np.unpackbits(values.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return np.packbits(stream, bitorder="little")


def _unpack(packed: NDArray[Any], bits: int, shape: Sequence[int], what: str, where: str) -> NDArray[np.uint8]:
    count = math.prod(shape)
    size = packed_size(count, bits)
    if packed.dtype != np.uint8 or packed.shape != (size,):
        raise CheckpointError(
            f"{where} has the wrong size",
            expected=f"uint8 [{size}] for {what} {list(shape)}",
            got=f"{packed.dtype} {list(packed.shape)}",
        )
    stream = np.unpackbits(packed, bitorder="little")
    if stream[count * bits :].any():
        raise CheckpointError(f"{where} goes on after the last value", expected="padding bits 0", got=int(packed[-1]))
    values = np.packbits(stream[: count * bits].reshape(count, bits), axis=1, bitorder="little")
    return values.reshape(tuple(shape))
