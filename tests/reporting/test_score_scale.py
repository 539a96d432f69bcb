from __future__ import annotations

import pytest

from eamdeploy.reporting.records.score_scale import colour_scale, exponent, layer_names, short_number, unit


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (0.009, "<.01"), (-0.009, ">−.01"), (0.01, "0.01"), (0.994, "0.99"), (0.9951, "1.0")),
        *((9.94, "9.9"), (9.96, "10"), (123.4, "123"), (-1.26, "−1.3")),
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("largest", "power"), [(0, 0), (0.1, 0), (0.099, -3), (0.001, -3), (0.00099, -6), (9999, 0), (10_000, 3)]
)
def test_exponents(largest: float, power: int) -> None:
    assert exponent(largest) == power


@pytest.mark.parametrize(
    ("values", "logarithmic", "positions"),
    [
        ([1.0, 2.0, 3.0], False, [0, 0.5, 1]),
        ([2.0, 2.0], False, [0.5, 0.5]),
        ([0.0, 0.0], False, [0.5, 0.5]),
        ([1.0, 1.0, 100.0], True, [0, 0, 1]),
        ([1.0, 10.0, 1.0, 1.0, 100.0], True, [0, 0.5, 0, 0, 1]),
        ([0.0, 1.0, 1e5], True, [0, 0, 1]),
    ],
)
def test_positions_on_the_colour_scale(values: list[float], logarithmic: bool, positions: list[float]) -> None:
    scale = colour_scale(values)
    assert scale.logarithmic == logarithmic and scale.low < scale.high
    assert [scale.position(value) for value in values] == pytest.approx(positions)


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        (["blocks.0.attn", "blocks.1.attn"], ("blocks.0", "blocks.1")),
        (["layers.0.blocks.1.attn"], ("layers.0.blocks.1",)),
        (["blocks.0.attn", "other"], ("blocks.0.attn", "other")),
    ],
)
def test_rows_leave_out_what_all_have_in_common(modules: list[str], names: tuple[str, ...]) -> None:
    assert layer_names(modules) == names


@pytest.mark.parametrize(
    ("name", "power", "text"),
    [("entropy", 0, "nats"), ("entropy", -3, "10⁻³ nats"), ("variance", -6, "10⁻⁶"), ("given", 0, "")],
)
def test_units(name: str, power: int, text: str) -> None:
    assert unit(name, power) == text
