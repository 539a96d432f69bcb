from __future__ import annotations

import pytest

from eamdeploy.engines.trt.precision import Step, steps_to_keep

BOTH = ("normalization", "softmax")

# mean → subtract → square → mean → + ε → root → divide → · γ → + β
LAYER_NORM = [
    Step("mean", ("x",), ("m",)),
    Step("subtract", ("x", "m"), ("d",)),
    Step("power", ("d", "two"), ("s",)),
    Step("mean", ("s",), ("v",)),
    Step("add", ("v", "eps"), ("e",)),
    Step("square root", ("e",), ("r",)),
    Step("divide", ("d", "r"), ("n",)),
    Step("multiply", ("n", "gamma"), ("g",)),
    Step("add", ("g", "beta"), ("y",)),
]


def test_statistics_of_a_decomposed_layer_norm_are_kept_and_its_affine_part_is_not() -> None:
    assert steps_to_keep(LAYER_NORM, BOTH) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("kind", ["multiply", "power"])
def test_square_may_be_a_product(kind: str) -> None:
    steps = [Step(kind, ("d", "d"), ("s",)) if step.kind == "power" else step for step in LAYER_NORM]
    assert steps_to_keep(steps, BOTH) == [0, 1, 2, 3, 4, 5, 6]


def test_views_in_between_are_looked_through_and_not_kept() -> None:
    steps = [Step("mean", ("s0",), ("v",)) if step.outputs == ("v",) else step for step in LAYER_NORM] + [
        Step("view", ("s",), ("s1",)),
        Step("view", ("s1",), ("s0",)),
    ]
    assert steps_to_keep(steps, BOTH) == [0, 1, 2, 3, 4, 5, 6]


def test_whole_normalization_and_softmax_are_kept_as_asked() -> None:
    steps = [Step("normalization", ("x",), ("y",)), Step("softmax", ("y",), ("z",)), Step("MatMul", ("z", "w"), ("o",))]
    assert steps_to_keep(steps, BOTH) == [0, 1]
    assert steps_to_keep(steps, ("normalization",)) == [0]
    assert steps_to_keep(steps, ()) == []
    assert steps_to_keep(LAYER_NORM, ("softmax",)) == []


@pytest.mark.parametrize(
    "steps",
    [
        # Gelu by erf: a division whose divisor is a constant
        [Step("divide", ("x", "sqrt2"), ("a",)), Step("Erf", ("a",), ("b",)), Step("add", ("b", "one"), ("c",))],
        # the length of a vector: no ε
        [Step("multiply", ("x", "x"), ("a",)), Step("mean", ("a",), ("b",)), Step("square root", ("b",), ("c",))],
        # a root of a shifted mean of something that is no square
        [Step("mean", ("x",), ("a",)), Step("add", ("a", "e"), ("b",)), Step("square root", ("b",), ("c",))],
        # a pooled mean
        [Step("mean", ("x",), ("a",)), Step("divide", ("a", "n"), ("b",))],
    ],
    ids=["gelu", "norm without epsilon", "root of a mean", "pooling"],
)
def test_what_only_looks_like_one_is_left_alone(steps: list[Step]) -> None:
    assert steps_to_keep(steps, BOTH) == []
