"""Which layers of a transformer overflow or lose too much in FP16: the statistics of LayerNorm, and softmax.

Before:  m = mean(x) ; y = (x − m) / sqrt(mean((x − m)²) + ε), every step in FP16
After:   the same steps in FP32
Why:     a residual stream beyond ±255 overflows FP16 when it is squared; sums over hundreds of channels lose digits.

A LayerNorm that an exporter decomposed is found by its structure, from its square root upwards, so that one rule serves
ONNX graphs and TensorRT's networks: whoever calls says what kind each step is.
Source: TensorRT's own warning, "forcing layernorm layers to run in FP32 precision can help".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A node of an ONNX graph or a layer of TensorRT's network.

    Attributes:
        kind: "normalization", "softmax", "mean", "square root", "add", "subtract", "multiply", "power", "divide",
            "view" (changes shape or type, not values) or anything else.
        inputs, outputs: names of tensors.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


# From the square root upwards, each the producer of the one before: + ε, mean, square, x − m, mean.
_UPWARDS: tuple[frozenset[str], ...] = (
    frozenset({"add"}),
    frozenset({"mean"}),
    frozenset({"power", "multiply"}),
    frozenset({"subtract"}),
    frozenset({"mean"}),
)
_REQUIRED = 3  # an add, a mean and a square above a root make it a standard deviation
_BELOW = frozenset({"divide"})


def steps_to_keep(steps: Sequence[Step], kinds: Sequence[str]) -> list[int]:
    """Indices, ascending, of the steps that must stay FP32.

    Args:
        kinds: "normalization" for LayerNorm, whole or decomposed; "softmax".
    """
    kept = {index for index, step in enumerate(steps) if step.kind in kinds}
    if "normalization" in kinds:
        producers = {name: index for index, step in enumerate(steps) for name in step.outputs}
        for index, step in enumerate(steps):
            if step.kind == "square root":
                kept |= _deviation(steps, producers, index)
    return sorted(kept)


def _deviation(steps: Sequence[Step], producers: dict[str, int], root: int) -> set[int]:
    """The steps of the LayerNorm around that square root; empty where it is another root."""
    found, level, height = {root}, [root], 0
    for wanted in _UPWARDS:
        above = [index for below in level for index in _producers(steps, producers, below)]
        level = [index for index in above if steps[index].kind in wanted]
        if not level:
            break
        found |= set(level)
        height += 1
    if height < _REQUIRED:
        return set()
    return found | _consumers(steps, producers, root)


def _producers(steps: Sequence[Step], producers: dict[str, int], index: int) -> list[int]:
    """What computes the step's inputs, views looked through."""
    result = []
    for name in steps[index].inputs:
        producer = producers.get(name)
        while producer is not None and steps[producer].kind == "view":
            producer = producers.get(steps[producer].inputs[0])
        if producer is not None:
            result.append(producer)
    return result


def _consumers(steps: Sequence[Step], producers: dict[str, int], root: int) -> set[int]:
    return {
        index for index, step in enumerate(steps) if step.kind in _BELOW and root in _producers(steps, producers, index)
    }
