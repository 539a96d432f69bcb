"""How a score becomes a row, a colour and a short number, in the picture for files and on the page alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

_SCORE_UNITS: Final = {"entropy": "nats", "row-entropy": "nats", "variance": "", "sensitivity": "nats", "random": ""}

_SKEWED_RATIO, _LOGARITHMIC_RANGE = 10.0, 1e4
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class ColourScale:
    """Where the colours begin and end.

    Attributes:
        low, high: the values of the first and the last colour, `low` below `high`; both over 0 if `logarithmic`.
    """

    low: float
    high: float
    logarithmic: bool

    def position(self, value: float) -> float:
        """Where `value` lies between first and last colour, in [0, 1]; values beyond take the nearer one."""
        inside = min(max(value, self.low), self.high)
        if self.logarithmic:
            return math.log(inside / self.low) / math.log(self.high / self.low)
        return (inside - self.low) / (self.high - self.low)


def colour_scale(values: Sequence[float]) -> ColourScale:
    """Linear over the values, or logarithmic where the largest is over 10 times the median.

    Args:
        values: finite, at least one.
    """
    low, high = min(values), max(values)
    if high > _SKEWED_RATIO * median(values) > 0:
        return ColourScale(max(low, high / _LOGARITHMIC_RANGE), high, logarithmic=True)
    margin = 0 if high > low else 0.5 * abs(high) or 0.5
    return ColourScale(low - margin, high + margin, logarithmic=False)


def layer_names(modules: Iterable[str]) -> tuple[str, ...]:
    """What stands beside the rows: module paths, without the `.attn` that they all end in."""
    paths = tuple(modules)
    suffix = ".attn" if all(path.endswith(".attn") for path in paths) else ""
    return tuple(path[: len(path) - len(suffix)] for path in paths)


def exponent(largest: float) -> int:
    """The power of ten, a multiple of 3, that brings `largest` into [1, 1000); 0 for ordinary numbers."""
    if largest == 0 or 0.1 <= largest < 10_000:
        return 0
    return 3 * math.floor(math.log10(largest) / 3)


def unit(score_name: str, power: int) -> str:
    """The score's unit with that power of ten, e.g. `10⁻³ nats`; empty where there is neither."""
    factor = f"10{str(power).translate(_SUPERSCRIPTS)}" if power else ""
    return f"{factor} {_SCORE_UNITS.get(score_name, '')}".strip()


def short_number(value: float) -> str:
    """Two significant digits, without an exponent."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.01:
        return "<.01" if value > 0 else ">−.01"
    digits = 0 if size >= 9.95 else 1 if size >= 0.995 else 2
    return f"{value:.{digits}f}".replace("-", "−")
