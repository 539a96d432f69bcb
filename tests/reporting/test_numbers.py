from __future__ import annotations

import pytest

from eamdeploy.reporting import numbers


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.00001234, "1.23e-05"), (0.000437, "0.000437"), (0.0970, "0.0970"), (0.54803, "0.548")),
        *((0.9994, "0.999"), (0.9996, "1.00"), (9.994, "9.99"), (9.996, "10.0"), (99.94, "99.9"), (99.96, "100")),
        (1234.5, "1,234"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert numbers.significant(value) == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (numbers.milliseconds(0.548034), "0.548 ms"),
        (numbers.percent(96.338), "96.3 %"),
        (numbers.share(1 / 6), "16.7 %"),
        (numbers.points(71.9, 72.2), "−0.30 points"),
        (numbers.points(72.2, 71.9), "+0.30 points"),
        (numbers.points(72.2, 72.201), "±0.00 points"),
        (numbers.change(90, 100), "−10.0 %"),
        (numbers.ratio(1.07149), "1.071×"),
        (numbers.interval(1.0611, 1.0809), "95 % interval 1.061× – 1.081×"),
        (numbers.power(850), "850 mW"),
        (numbers.power(6711.4), "6.71 W"),
        (numbers.energy(12.34), "12.3 mJ"),
        (numbers.energy(-0.0291), "−0.0291 mJ"),
        (numbers.count(5259), "5,259"),
        (numbers.plural(1, "thread"), "1 thread"),
        (numbers.plural(1200, "run"), "1,200 runs"),
        (numbers.size(999), "999 B"),
        (numbers.size(-12), "−12 B"),
        (numbers.size(-3_100_000), "−3.10 MB"),
        (numbers.size(858_725), "859 kB"),
        (numbers.size(23_400_000), "23.4 MB"),
        (numbers.size(25_276_502_016), "25.3 GB"),
        (numbers.rate(1736.04), "1,736"),
        (numbers.rate(71.6), "71.6"),
        (numbers.scientific(1.43e-6), "1.4e-06"),
        (numbers.digest(f"sha256:{'0123456789abcdef' * 4}"), "sha256:0123456789abcdef…"),
        (numbers.digest("short"), "short"),
    ],
)
def test_numbers_carry_their_units(written: str, text: str) -> None:
    assert written.replace("\N{NO-BREAK SPACE}", " ") == text


def test_a_number_is_never_parted_from_its_unit() -> None:
    assert " " not in numbers.milliseconds(1) + numbers.percent(1) + numbers.points(1, 2) + numbers.size(1)
