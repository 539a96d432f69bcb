"""Which of a board's power rails together are its total, without counting anything twice."""

from __future__ import annotations

from collections.abc import Iterable

# The first line whose rails a board has all of. Other rails of the board are parts of these, or of no known place.
# Source: docs/tensorrt.md, Telemetry of a Jetson; NVIDIA's device trees and design guides (what a rail's shunt feeds),
# and its answers in the forum.
_TOTALS: tuple[tuple[str, ...], ...] = (
    ("VDD_IN",),  # TX2, Xavier NX, Orin NX and Nano: the module's input
    ("POM_5V_IN",),  # TX1, Nano: the board's input
    ("VIN",),  # AGX Thor: the input of module and carrier board
    # AGX Orin: the module's 20 V input feeds the first two, its 5 V input the last, and that VDDQ_VDD2_1V8AO
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # AGX Thor without VIN: the same of its module
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier: each has its own supply from the module's input
)


def total_rails(rails: Iterable[str]) -> tuple[str, ...]:
    """Those of `rails` that together are all of what the board draws; empty if that is not known for this board."""
    names = set(rails)
    return next((total for total in _TOTALS if names.issuperset(total)), ())
