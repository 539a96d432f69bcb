"""What only an in-memory checkpoint can get wrong; what a file can is in `test_checkpoint.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eamdeploy.eam.checkpoint import AttentionShape, Checkpoint, FrozenMaps
from eamdeploy.eam.validation import validate
from eamdeploy.errors import CheckpointError

PATH = "blocks.1.attn"


def with_maps(
    checkpoint: Checkpoint,
    *,
    heads: NDArray[Any] | None = None,
    codes: NDArray[Any] | None = None,
    scales: NDArray[Any] | None = None,
) -> Checkpoint:
    old = checkpoint.frozen[PATH]
    new = FrozenMaps(
        old.heads if heads is None else heads,
        old.codes if codes is None else codes,
        old.scales if scales is None else scales,
    )
    return Checkpoint(checkpoint.weights, {PATH: new}, checkpoint.header)


def test_a_sound_checkpoint_passes(checkpoint: Checkpoint) -> None:
    validate(checkpoint)


@pytest.mark.parametrize("heads", [[], [2, 0], [0, 0], [-1, 2], [0, 3]])
def test_heads(checkpoint: Checkpoint, heads: list[int]) -> None:
    with pytest.raises(CheckpointError, match=r"^here: eam\.blocks\.1\.attn\.heads"):
        validate(with_maps(checkpoint, heads=np.array(heads, np.int64)), "here")


@pytest.mark.parametrize("heads", [np.int64(0), np.array([[0, 2]]), np.array([0, 2], np.int32), np.array([0.0, 2.0])])
def test_form_of_heads(checkpoint: Checkpoint, heads: NDArray[Any]) -> None:
    with pytest.raises(CheckpointError, match=r"heads has the wrong dtype or shape; expected int64"):
        validate(with_maps(checkpoint, heads=np.asarray(heads)))


def test_codes_out_of_range(checkpoint: Checkpoint) -> None:
    codes = checkpoint.frozen[PATH].codes.copy()
    codes[1, 2, 3] = 8
    with pytest.raises(CheckpointError, match=r"attn\.codes do not fit 3 bits; expected at most 7; got 8"):
        validate(with_maps(checkpoint, codes=codes))


@pytest.mark.parametrize("change", [lambda a: a[:1], lambda a: a[:, :, :4], lambda a: a.astype(np.int8)])
def test_form_of_codes(checkpoint: Checkpoint, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    with pytest.raises(CheckpointError, match=r"attn\.codes has the wrong.*expected uint8 \[2, 5, 5\]"):
        validate(with_maps(checkpoint, codes=change(checkpoint.frozen[PATH].codes)))


@pytest.mark.parametrize("bad", [0, -1, np.nan, np.inf])
def test_scales_that_are_not_positive(checkpoint: Checkpoint, bad: float) -> None:
    scales = checkpoint.frozen[PATH].scales.copy()
    scales[1, 3] = bad
    with pytest.raises(CheckpointError, match=r"attn\.scales at \(frozen head, row\) \(1, 3\)"):
        validate(with_maps(checkpoint, scales=scales))


def test_the_tolerance_of_row_sums(checkpoint: Checkpoint) -> None:
    scales = checkpoint.frozen[PATH].scales
    validate(with_maps(checkpoint, scales=scales * np.float32(1 + 9e-6)))
    with pytest.raises(CheckpointError, match="10 of 10 rows do not sum to 1"):
        validate(with_maps(checkpoint, scales=scales * np.float32(1 + 1.2e-5)))
    one = scales.copy()
    one[1, 3] *= 2
    with pytest.raises(CheckpointError, match=r"1 of 10 rows do not sum to 1.*got 2 at .* \(1, 3\)"):
        validate(with_maps(checkpoint, scales=one))


def test_frozen_maps_of_an_unknown_module(checkpoint: Checkpoint) -> None:
    moved = Checkpoint(checkpoint.weights, {"blocks.9.attn": checkpoint.frozen[PATH]}, checkpoint.header)
    with pytest.raises(CheckpointError, match=r"eam\.blocks\.9\.attn belongs to no attention module"):
        validate(moved)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (np.array([1, np.nan], np.float32), "not finite.*got 1 NaN or infinite of 2"),
        (np.array([np.inf, np.inf], np.float16), "not finite.*got 2 NaN or infinite of 2"),
        (np.array(["a"]), "dtype"),
        (np.array([1j]), "dtype"),
        (np.array([None]), "dtype"),
        (np.array([1.0], np.dtype(np.float32).newbyteorder()), "byte order"),
    ],
)
def test_weights(checkpoint: Checkpoint, weight: NDArray[Any], message: str) -> None:
    broken = Checkpoint({**checkpoint.weights, "norm.bias": weight}, checkpoint.frozen, checkpoint.header)
    with pytest.raises(CheckpointError, match=rf"model\.norm\.bias .*{message}"):
        validate(broken)


def test_no_weights(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        validate(Checkpoint({}, checkpoint.frozen, checkpoint.header))


def test_scores_that_are_not_finite(checkpoint: Checkpoint) -> None:
    scores = {**checkpoint.header.freezing.scores, PATH: [1.0, float("nan"), 2.0]}
    freezing = checkpoint.header.freezing.model_copy(update={"scores": scores})
    header = checkpoint.header.model_copy(update={"freezing": freezing})
    with pytest.raises(CheckpointError, match=r"freezing\.scores\.blocks\.1\.attn; expected finite"):
        validate(Checkpoint(checkpoint.weights, checkpoint.frozen, header))


def test_sparsity_counts_entries_not_heads(checkpoint: Checkpoint) -> None:
    """With a larger second module the same two heads are another share."""
    attention = {**checkpoint.header.attention, "blocks.0.attn": AttentionShape(heads=3, tokens=10)}
    header = checkpoint.header.model_copy(update={"attention": attention})
    with pytest.raises(CheckpointError, match=r"freezing\.sparsity; expected 0\.1333"):
        validate(Checkpoint(checkpoint.weights, checkpoint.frozen, header))
    freezing = header.freezing.model_copy(update={"sparsity": 50 / 375})
    validate(Checkpoint(checkpoint.weights, checkpoint.frozen, header.model_copy(update={"freezing": freezing})))
