"""How numbers are written in reports, with their units; three significant digits where nothing else is said."""

from __future__ import annotations

_SPACE = "\N{NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"
_BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def milliseconds(value: float) -> str:
    """`0.545 ms`."""
    return f"{significant(value)}{_SPACE}ms"


def power(milliwatts: float) -> str:
    """`850 mW`, `6.71 W`."""
    return f"{significant(milliwatts / 1e3)}{_SPACE}W" if milliwatts >= 1e3 else f"{significant(milliwatts)}{_SPACE}mW"


def energy(millijoules: float) -> str:
    """`12.3 mJ`."""
    return f"{significant(millijoules)}{_SPACE}mJ"


def percent(value: float) -> str:
    """`96.3 %`, of a number in [0, 100]."""
    return f"{value:.1f}{_SPACE}%"


def share(value: float) -> str:
    """`16.7 %`, of a number in [0, 1]."""
    return percent(100 * value)


def points(after: float, before: float) -> str:
    """`−0.28 points`: what a percentage gained, or lost."""
    return f"{difference(after, before)}{_SPACE}points"


def difference(after: float, before: float) -> str:
    """`−0.28`."""
    return _signed(after - before, 2)


def change(after: float, before: float) -> str:
    """`−1.7 %`: how much larger or smaller than `before`, which is not 0."""
    return f"{_signed(100 * (after / before - 1), 1)}{_SPACE}%"


def ratio(value: float) -> str:
    """`1.010×`."""
    return f"{value:.3f}×"


def between(low: float, high: float) -> str:
    """`1.061× – 1.081×`."""
    return f"{ratio(low)} – {ratio(high)}"


def interval(low: float, high: float) -> str:
    """`95 % interval 1.061× – 1.081×`: of a speed-up."""
    return f"95{_SPACE}% interval {between(low, high)}"


def count(value: int) -> str:
    """`5,259`."""
    return f"{value:,}"


def plural(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count(number)} {noun}{'s' * (number != 1)}"


def size(n_bytes: float) -> str:
    """`859 kB`: powers of 1000."""
    for factor, unit in _BYTE_UNITS:
        if abs(n_bytes) >= factor:
            return f"{significant(n_bytes / factor)}{_SPACE}{unit}"
    return f"{n_bytes:.0f}{_SPACE}B".replace("-", _MINUS)


def rate(images_per_s: float) -> str:
    """`1,736`, of images in a second."""
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else significant(images_per_s)


def significant(value: float) -> str:
    """`value` with three significant digits and no exponent unless it is tiny."""
    if value < 0:
        return f"{_MINUS}{significant(-value)}"
    if value >= 99.95:
        return f"{value:,.0f}"
    if value >= 9.995:
        return f"{value:.1f}"
    if value >= 0.9995:
        return f"{value:.2f}"
    return "0" if value == 0 else f"{value:#.3g}" if value >= 1e-4 else f"{value:.2e}"


def digest(text: str) -> str:
    """`sha256:076ed99907db7de8…`: the beginning, which is enough to tell files apart."""
    return f"{text[:23]}…" if len(text) > 24 else text


def scientific(value: float) -> str:
    """`1.4e-06`."""
    return f"{value:.1e}"


def _signed(value: float, digits: int) -> str:
    rounded = f"{abs(value):.{digits}f}"
    sign = "±" if float(rounded) == 0 else "+" if value > 0 else _MINUS
    return f"{sign}{rounded}"
