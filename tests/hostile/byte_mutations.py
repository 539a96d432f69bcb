"""Ways to hurt any file, whatever is in it: bits, ranges, lengths, other files' contents."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import MappingProxyType

Mutation = Callable[[bytes, Random, Sequence[bytes]], bytes]
"""Hurt bytes of good ones; the third argument has the contents of other good files."""


def flip_bit(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    return _flipped(data, rng, 1)


def flip_bits(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    return _flipped(data, rng, rng.randint(2, 32))


def flip_bit_in_front(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """Where headers are."""
    front = min(len(data), 1024)
    return _flipped(data[:front], rng, 1) + data[front:]


def flip_bit_at_end(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """Where directories are."""
    back = max(0, len(data) - 1024)
    return data[:back] + _flipped(data[back:], rng, 1)


def set_byte(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    hurt = bytearray(data)
    if hurt:
        hurt[rng.randrange(len(hurt))] = rng.choice((0, 1, 0x22, 0x2C, 0x5B, 0x7B, 0x7F, 0x80, 0xC3, 0xFE, 0xFF))
    return bytes(hurt)


def truncate(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    return data[: rng.randint(0, len(data))]


def truncate_a_little(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    return data[: max(0, len(data) - rng.randint(1, 64))]


def extend(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    return data + (bytes(rng.randint(1, 300)) if rng.random() < 0.5 else rng.randbytes(rng.randint(1, 300)))


def put_in_front(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    return rng.choice((b"\xef\xbb\xbf", b"\n", b"\0" * 8, rng.randbytes(9))) + data


def fill_range(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + rng.choice((b"\0", b"\xff", b" ", b"9", b"(")) * (stop - start) + data[stop:]


def delete_range(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + data[stop:]


def repeat_range(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    start, stop = _range(data, rng)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 2, 50)) + data[stop:]


def swap_ranges(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    (a, b), (c, d) = sorted((_range(data, rng), _range(data, rng)))
    if b > c:
        return data[b:] + data[:b]
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def huge_number(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """A number somewhere, little-endian or big-endian, is very large."""
    kind = rng.choice(("<H", "<I", "<Q", ">I", ">Q"))
    bits = 8 * struct.calcsize(kind)
    number = rng.choice((2**bits - 1, 2 ** (bits - 1), 2 ** (bits - 1) - 1, 2 ** (bits // 2)))
    packed = struct.pack(kind, number)
    at = rng.randint(0, max(0, len(data) - len(packed)))
    if rng.random() < 0.5:
        at = min(at, rng.choice((0, 4, 8, 16, 24)))
    return data[:at] + packed + data[at + len(packed) :]


def not_utf8(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    at = rng.randint(0, len(data))
    return data[:at] + rng.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\x80\x80", b"\xf5")) + data[at:]


def splice(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    """The head of the file, then the tail of another one."""
    other = rng.choice(others) if others else data
    return data[: rng.randint(0, len(data))] + other[rng.randint(0, len(other)) :]


def another_file(data: bytes, rng: Random, others: Sequence[bytes]) -> bytes:
    pages = (b"", b"\0", b"<!DOCTYPE html><html>404</html>" * 40, b"version https://git-lfs.github.com/spec/v1\n")
    return rng.choice((*others, *pages))


def unhurt(data: bytes, rng: Random, _: Sequence[bytes]) -> bytes:
    """For files that are hurt otherwise: by their names."""
    return data


STRANGE_NAMES = (
    *("\udcff\udcfe", "a\nb", "-x", "--help", "~", "x" * 200, "\u202ex", "[red]x", "%s%n", "a b", "'", '"', "\x1b[31m"),
    *("\x7f", "con", "é", "e\u0301", "日本", ".hidden", "x;y", "$(touch pwned)", "*", "?", "{x}", "\\", "..x", "x."),
    *("a,b", "#", "&amp;", "<b>", "@x", "x:y", "=x", "\t", " x ", "\ufeff", "😀", "&", "|", "a\rb", "file:x", "http:x"),
)
"""Of files, without their endings."""


BYTE_MUTATIONS: Mapping[str, Mutation] = MappingProxyType(
    {
        mutation.__name__: mutation
        for mutation in (
            *(flip_bit, flip_bit_in_front, flip_bit_at_end, flip_bits, set_byte, truncate, truncate_a_little, extend),
            *(put_in_front, fill_range, delete_range, repeat_range, swap_ranges, huge_number, not_utf8, splice),
            another_file,
        )
    }
)


def _flipped(data: bytes, rng: Random, count: int) -> bytes:
    hurt = bytearray(data)
    for _ in range(count if hurt else 0):
        hurt[rng.randrange(len(hurt))] ^= 1 << rng.randrange(8)
    return bytes(hurt)


def _range(data: bytes, rng: Random) -> tuple[int, int]:
    start = rng.randint(0, len(data))
    return start, min(len(data), start + int(2 ** rng.uniform(0, 12)))
