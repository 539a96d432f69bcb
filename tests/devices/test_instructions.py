from __future__ import annotations

from pathlib import Path

import pytest

from eamdeploy.devices.instructions import instruction_sets, products_saturate

X86 = "processor\t: 0\nmodel name\t: A processor\nflags\t\t: fpu sse4_1 avx fma avx2 {}\n\nprocessor\t: 1\n"
PI5 = "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm aes fphp asimdhp cpuid asimdrdm asimddp\n"
PI3 = "processor\t: 0\nmodel name\t: ARMv7 Processor rev 4 (v7l)\nFeatures\t: half thumb neon vfpv4\n"


@pytest.mark.parametrize(
    ("cpuinfo", "architecture", "line", "saturates"),
    [
        (X86.format(""), "x86_64", "x86_64: avx avx2 fma sse4.1", True),
        (X86.format("avx512f avx512bw"), "x86_64", "x86_64: avx avx2 avx512 fma sse4.1", True),
        (X86.format("avx512f avx512_vnni"), "x86_64", "x86_64: avx avx2 avx512 avx512_vnni fma sse4.1", False),
        (X86.format("avx_vnni"), "x86_64", "x86_64: avx avx2 avx_vnni fma sse4.1", False),
        ("flags : fpu sse4_1", "x86_64", "x86_64: sse4.1", True),
        (PI5, "aarch64", "aarch64: dotprod fp16 neon", False),
        (PI3, "armv7l", "armv7l: neon", False),
        (None, "x86_64", "x86_64", True),
        (None, "AMD64", "AMD64", True),
        (None, "arm64", "arm64", False),
        ("flags : ", "riscv64", "riscv64", False),
    ],
)
def test_what_the_kernel_tells(
    cpuinfo: str | None, architecture: str, line: str, saturates: bool, tmp_path: Path
) -> None:
    if cpuinfo is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cpuinfo").write_text(cpuinfo)
    assert instruction_sets(tmp_path, architecture) == line
    assert products_saturate(line) is saturates


def test_this_machine_tells_its_own() -> None:
    assert instruction_sets() == instruction_sets(Path("/"))
