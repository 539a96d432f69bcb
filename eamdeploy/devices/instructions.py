"""The processor's instruction sets, as far as they decide how a runtime multiplies."""

from __future__ import annotations

import platform
from pathlib import Path

from eamdeploy.devices.sysfs import read_text

_KNOWN = {  # by the kernel's name for each
    "sse4_1": "sse4.1",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512",
    "avx_vnni": "avx_vnni",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni_int8": "avx_vnni_int8",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "neon": "neon",
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
_X86 = ("x86_64", "amd64", "i386", "i686", "x86")
_VNNI = {"avx_vnni", "avx512_vnni"}


def instruction_sets(root: Path = Path("/"), architecture: str | None = None) -> str:
    """Architecture and instruction sets in one line, such as `x86_64: avx avx2 avx512 avx512_vnni fma sse4.1`.

    Two processors with the same line compute an engine with the same kernels of a runtime. Where the system does not
    tell, the architecture stands alone.

    Args:
        root: where `/proc` is looked for.
        architecture: by `platform.machine`; None for this machine's.
    """
    found: set[str] = set()
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            found = {_KNOWN[flag] for flag in value.split() if flag in _KNOWN}
            break  # every core has the same ones: the kernel names only what all have
    return f"{architecture or platform.machine()}: {' '.join(sorted(found))}".removesuffix(": ")


def products_saturate(instructions: str) -> bool:
    """Whether sums of two products of unsigned and signed bytes are cut to 16 bits, by x86 without VNNI.

    Models whose weights have 8 full bits then give something else than elsewhere.

    Args:
        instructions: as `instruction_sets` gives it; of an x86 processor that does not tell, it is assumed.
    """
    architecture, _, found = instructions.partition(": ")
    return architecture.lower() in _X86 and not _VNNI & set(found.split())
