"""The mark of a frozen head."""

from __future__ import annotations

import cmath
import math
from typing import Final

# an arm as strokes from point to point: the real axis runs outwards, the tip is at 1
_ARM: Final = ((0, 1), (0.52, 0.82 + 0.3j), (0.52, 0.82 - 0.3j))


def snowflake(radius: float, centre: complex = 0) -> list[tuple[complex, complex]]:
    """The strokes of a snowflake with six arms of that length: where each begins and ends, x real and y imaginary."""
    turns = [cmath.rect(radius, math.radians(60 * arm + 30)) for arm in range(6)]
    return [(centre + turn * start, centre + turn * end) for turn in turns for start, end in _ARM]
