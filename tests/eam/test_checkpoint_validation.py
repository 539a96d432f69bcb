"""What only an in-memory checkpoint can get wrong; what a file can is in `test_checkpoint.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from made_checkpoints import WINDOWS, WindowMaps, make, with_frozen
from numpy.typing import NDArray

from eamdeploy.eam.records import AttentionShape, Checkpoint, FrozenMaps
from eamdeploy.eam.validation import validate
from eamdeploy.errors import CheckpointError
from eamdeploy.vocabulary import GRANULARITIES, Granularity

PATH = "blocks.1.attn"


def with_maps(
    checkpoint: Checkpoint,
    *,
    heads: NDArray[Any] | None = None,
    codes: NDArray[Any] | None = None,
    scales: NDArray[Any] | None = None,
    mask: NDArray[Any] | None = None,
) -> Checkpoint:
    old = checkpoint.frozen[PATH]
    new = FrozenMaps(
        old.heads if heads is None else heads,
        old.codes if codes is None else codes,
        old.scales if scales is None else scales,
        old.mask if mask is None else mask,
    )
    return Checkpoint(checkpoint.weights, {PATH: new}, checkpoint.header)


@pytest.mark.parametrize("window_maps", WINDOWS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_sound_checkpoint_passes(
    checkpoint: Checkpoint, granularity: Granularity, window_maps: WindowMaps | None
) -> None:
    validate(checkpoint)
    validate(make(checkpoint, granularity, window_maps))


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


# --- rows, entries, windows ------------------------------------------------------------------------------------------


def with_mask(checkpoint: Checkpoint, mask: NDArray[Any] | None) -> Checkpoint:
    old = checkpoint.frozen[PATH]
    return Checkpoint(checkpoint.weights, {PATH: FrozenMaps(old.heads, old.codes, old.scales, mask)}, checkpoint.header)


def test_a_mask_belongs_to_rows_and_entries(checkpoint: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"attn\.mask does not fit granularity head; .*none for head; got a mask"):
        validate(with_mask(checkpoint, np.ones((2, 5), np.bool_)))
    for granularity in ("row", "entry"):
        with pytest.raises(CheckpointError, match=rf"attn\.mask does not fit granularity {granularity}; .*got none"):
            validate(with_mask(make(checkpoint, granularity), None))


@pytest.mark.parametrize("change", [lambda a: a[:1], lambda a: a[..., :4], lambda a: a.astype(np.uint8)])
@pytest.mark.parametrize(("granularity", "form"), [("row", r"\[2, 5\]"), ("entry", r"\[2, 5, 5\]")])
def test_form_of_a_mask(
    checkpoint: Checkpoint, granularity: Granularity, form: str, change: Callable[[NDArray[Any]], NDArray[Any]]
) -> None:
    made = make(checkpoint, granularity, "class")
    mask = made.frozen[PATH].mask
    assert mask is not None
    with pytest.raises(CheckpointError, match=rf"attn\.mask has the wrong dtype or shape; expected bool {form}"):
        validate(with_mask(made, change(mask)))


@pytest.mark.parametrize("granularity", ["row", "entry"])
def test_every_head_has_something_frozen(checkpoint: Checkpoint, granularity: Granularity) -> None:
    made = make(checkpoint, granularity)
    mask = made.frozen[PATH].mask
    assert mask is not None
    mask[1] = False
    with pytest.raises(
        CheckpointError, match=rf"mask freezes nothing of head 2; expected at least one {granularity} of"
    ):
        validate(made)


@pytest.mark.parametrize("granularity", ["row", "entry"])
def test_codes_where_nothing_is_frozen(checkpoint: Checkpoint, granularity: Granularity) -> None:
    made = make(checkpoint, granularity, "class")
    maps = made.frozen[PATH]
    head, row, key = (int(i) for i in np.argwhere(~maps.frozen())[0])
    maps.codes[head, 1, row, key] = 3
    place = rf"\(frozen head, window map, row, key\) \({head}, 1, {row}, {key}\)"
    with pytest.raises(CheckpointError, match=rf"attn\.codes at {place}; expected 0 where nothing is frozen; got 3"):
        validate(made)


@pytest.mark.parametrize("granularity", ["row", "entry"])
@pytest.mark.parametrize("bad", [1e-6, -1, np.nan, np.inf])
def test_scales_of_rows_without_frozen_entries(checkpoint: Checkpoint, granularity: Granularity, bad: float) -> None:
    made = make(checkpoint, granularity, "class")
    maps = made.frozen[PATH]
    maps.codes[0, :, 1] = 0
    maps.scales[0, :, 1] = 0
    assert maps.mask is not None
    maps.mask[0, 1] = False
    maps.scales[0, 2, 1] = bad
    with pytest.raises(CheckpointError, match=r"\(frozen head, window map, row\) \(0, 2, 1\); expected 0 in a row"):
        validate(made)


@pytest.mark.parametrize("bad", [0, -1, np.nan, np.inf])
@pytest.mark.parametrize("granularity", ["row", "entry"])
def test_scales_of_rows_with_frozen_entries(checkpoint: Checkpoint, granularity: Granularity, bad: float) -> None:
    made = make(checkpoint, granularity)
    maps = made.frozen[PATH]
    row = int(maps.frozen()[0].any(axis=-1).argmax())
    maps.scales[0, row] = bad
    with pytest.raises(CheckpointError, match=rf"\(frozen head, row\) \(0, {row}\); expected a positive finite"):
        validate(made)


def entry_row(codes: list[int], mask: list[bool], scale: float) -> FrozenMaps:
    """One head of two tokens; its second row is not frozen."""
    return FrozenMaps(
        np.array([0]),
        np.array([[codes, [0, 0]]], np.uint8),
        np.array([[scale, 0]], np.float32),
        np.array([[mask, [False, False]]]),
    )


@pytest.mark.parametrize(
    ("codes", "mask", "scale", "message"),
    [
        ([1, 0], [True, False], 1, None),
        ([1, 0], [True, False], 1e-30, None),
        ([0, 0], [True, False], 1, None),
        ([1, 0], [True, False], 1 + 9e-6, None),
        (
            [1, 0],
            [True, False],
            1 + 1.2e-5,
            "1 of 2 rows have a frozen part that sums to more than 1; expected .*at most",
        ),
        ([1, 1], [True, True], 0.5, None),
        ([1, 1], [True, True], 0.4, "1 of 2 rows do not sum to 1; expected .*within 1e-05 of 1.*got 0.8 at"),
        ([1, 1], [True, True], 0.6, "1 of 2 rows do not sum to 1"),
        ([0, 0], [True, True], 1, "1 of 2 rows do not sum to 1.*got 0 at"),
    ],
)
def test_row_sums_of_entries(
    checkpoint: Checkpoint, codes: list[int], mask: list[bool], scale: float, message: str | None
) -> None:
    frozen = {"a": entry_row(codes, mask, scale)}
    attention = {"a": AttentionShape(heads=1, tokens=2)}
    made = with_frozen(checkpoint, attention, frozen, granularity="entry", window_maps=None)
    if message is None:
        validate(made)
        return
    with pytest.raises(CheckpointError, match=message):
        validate(made)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_row_sums_are_checked_in_every_window_map(checkpoint: Checkpoint, granularity: Granularity) -> None:
    made = make(checkpoint, granularity, "window")
    maps = made.frozen[PATH]
    row = int(maps.frozen()[1].any(axis=-1).argmax())
    maps.scales[1, 3, row] *= 1000
    with pytest.raises(CheckpointError, match=rf"1 of 40 rows .*\(frozen head, window map, row\) \(1, 3, {row}\)"):
        validate(made)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sparsity_is_exact_for_every_granularity(checkpoint: Checkpoint, granularity: Granularity) -> None:
    made = make(checkpoint, granularity, "shared")
    exact = made.header.freezing.sparsity
    for wrong in (exact + 1 / 150, exact - 1 / 150, exact + 2e-9):  # one entry of 6 maps of 25 is 1/150
        freezing = made.header.freezing.model_copy(update={"sparsity": wrong})
        header = made.header.model_copy(update={"freezing": freezing})
        with pytest.raises(CheckpointError, match=r"freezing\.sparsity; expected .* for what is frozen"):
            validate(Checkpoint(made.weights, made.frozen, header))


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
