"""Heads of low rank in checkpoint files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_checkpoints import WINDOWS, WindowMaps, frozen_maps, with_frozen
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from eamdeploy.eam.checkpoint import AttentionShape, Checkpoint, FrozenFactors, load, save
from eamdeploy.eam.int8 import int8_checkpoint
from eamdeploy.eam.quantizers import quantize_rows
from eamdeploy.eam.records import heads_of, ranks_of
from eamdeploy.errors import CheckpointError
from eamdeploy.vocabulary import Granularity

PATH = "blocks.1.attn"
Tensors = dict[str, NDArray[Any]]


def made_factors(shape: AttentionShape, heads: list[int], rank: int, seed: int = 0) -> FrozenFactors:
    rng = np.random.default_rng(seed)
    mix = rng.dirichlet(np.ones(rank), size=(len(heads), *shape.rows))
    pool = rng.dirichlet(np.ones(shape.tokens), size=(len(heads), *shape.rows[:-1], rank))
    parts = (*quantize_rows(mix, 3, "squared"), *quantize_rows(pool, 3, "squared"))
    return FrozenFactors(np.array(heads, np.int64), *parts)


def mixed(base: Checkpoint, window_maps: WindowMaps | None = None) -> Checkpoint:
    """A module with a live head, a whole map, and heads of rank 1 and 4; one of low rank alone."""
    shape = AttentionShape(heads=4, tokens=5, windows=WINDOWS[window_maps])
    maps = {PATH: frozen_maps(np.random.default_rng(1), shape, [1], "head")}
    factors = {
        PATH: (made_factors(shape, [3], 1), made_factors(shape, [0], 4)),
        "blocks.0.attn": (made_factors(shape, [0, 2], 2, 5),),
    }
    attention = {"blocks.0.attn": shape, PATH: shape}
    plain = with_frozen(base, attention, maps, granularity="head", window_maps=window_maps)
    freezing = plain.header.freezing.model_copy(
        update={
            "heads": heads_of(maps, factors),
            "ranks": ranks_of(maps, factors),
            "sparsity": 5 / 8,
            "scores": {},
        }
    )
    header = plain.header.model_copy(update={"freezing": freezing})
    return Checkpoint(plain.weights, maps, header, factors)


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "m.eam.safetensors"
    save(mixed(checkpoint), path)
    return path


def read_raw(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("window_maps", [None, "shared", "class", "window"])
def test_round_trip(checkpoint: Checkpoint, tmp_path: Path, window_maps: WindowMaps | None) -> None:
    first = mixed(checkpoint, window_maps)
    save(first, tmp_path / "x")
    second = load(tmp_path / "x")
    assert second.factors.keys() == first.factors.keys()
    for path, groups in first.factors.items():
        assert [group.rank for group in second.factors[path]] == [each.rank for each in groups]
        for one, other in zip(groups, second.factors[path], strict=True):
            for field in dataclasses.fields(FrozenFactors):
                np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), strict=True)


def test_the_file_is_laid_out_as_documented(saved: Path) -> None:
    tensors, metadata = read_raw(saved)
    name = f"eam.{PATH}.rank4"
    assert tensors[f"{name}.heads"].tolist() == [0]
    assert tensors[f"{name}.mix_codes"].shape == (8,)  # 5 · 4 codes of 3 bits
    assert tensors[f"{name}.mix_scales"].shape == (1, 5)
    assert tensors[f"{name}.pool_codes"].shape == (8,)
    assert tensors[f"{name}.pool_scales"].shape == (1, 4)
    freezing = json.loads(metadata["eam"])["freezing"]
    assert freezing["heads"] == {"blocks.0.attn": [0, 2], PATH: [0, 1, 3]}
    assert freezing["ranks"] == {"blocks.0.attn": [2, 2], PATH: [4, None, 1]}


def test_the_header_tells_the_kind_of_every_head(checkpoint: Checkpoint) -> None:
    made = mixed(checkpoint)
    assert [made.header.freezing.rank_of(PATH, head) for head in range(4)] == [4, None, None, 1]
    assert made.header.freezing.rank_of("blocks.7.attn", 0) is None
    assert made.shares == {"blocks.0.attn": [1, 1], PATH: [1, 1, 1]}


def test_the_factors_rows_and_their_products_sum_to_1(checkpoint: Checkpoint) -> None:
    for group in mixed(checkpoint, "class").factors[PATH]:
        for part in (group.mix("squared"), group.pool("squared"), group.maps("squared")):
            np.testing.assert_allclose(part.sum(axis=-1), 1, atol=1e-6)
        assert group.maps("squared").shape == (1, 3, 5, 5)


def test_for_tensorrt_factors_fit_int8(checkpoint: Checkpoint) -> None:
    made = mixed(checkpoint)
    wide = Checkpoint(made.weights, made.frozen, made.header, made.factors)
    fitted, changed = int8_checkpoint(wide)
    assert changed == 0  # squares of 3-bit codes
    for path, groups in wide.factors.items():
        for before, after in zip(groups, fitted.factors[path], strict=True):
            assert after.pool_codes.max() <= 127
            np.testing.assert_allclose(after.maps("uniform"), before.maps("squared"), rtol=1e-6)


def edit(path: Path, tensor: str, change: Any) -> None:
    tensors, metadata = read_raw(path)
    tensors[tensor] = np.ascontiguousarray(change(tensors[tensor]))
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("tensor", "change", "message"),
    [
        ("rank4.mix_scales", lambda a: a * 1.01, r"rank4\.mix: 5 of 5 rows do not sum to 1"),
        ("rank4.pool_scales", lambda a: a * 0, r"rank4\.pool_scales at .* a positive finite"),
        ("rank1.pool_scales", lambda a: a * np.nan, r"rank1\.pool_scales"),
        ("rank4.mix_scales", lambda a: np.full_like(a, np.inf), r"rank4\.mix_scales at .* finite number; got inf"),
        ("rank4.mix_scales", lambda a: a * [1, 1, 1.5, 1, 1], r"rank4\.mix_scales has the wrong dtype"),
        (
            "rank4.mix_scales",
            lambda a: a * np.array([1, 1, 1.5, 1, 1], np.float32),
            r"rank4\.mix: 1 of 5 rows do not sum to 1; .*got 1\.5 at \(frozen head, row\) \(0, 2\)",
        ),
        ("rank4.pool_codes", lambda a: a * 0, r"rank4\.pool: 4 of 4 rows do not sum to 1; .*got 0 at"),
        ("rank1.mix_codes", lambda a: a * 0, r"rank1\.mix: 5 of 5 rows do not sum to 1; .*got 0 at"),
        ("rank4.heads", lambda a: a + 1, r"attn freezes a head twice"),
        ("rank4.heads", lambda a: a + 2, r"freezing\.heads.*disagree"),
        ("rank4.heads", lambda a: a + 4, r"strictly ascending head indices in 0…3"),
        ("rank4.heads", lambda a: a[:0], r"rank4\.mix_codes has the wrong size"),
        ("rank4.pool_codes", lambda a: a[:-1], r"rank4\.pool_codes has the wrong size"),
        ("rank4.mix_scales", lambda a: a[:, :-1], r"rank4\.mix_scales has the wrong dtype or shape"),
    ],
)
def test_damaged_factors_are_named(saved: Path, tensor: str, change: Any, message: str) -> None:
    edit(saved, f"eam.{PATH}.{tensor}", change)
    with pytest.raises(CheckpointError, match=message):
        load(saved, verify=False)
    with pytest.raises(CheckpointError):
        load(saved)


def regrouped(made: Checkpoint, *groups: FrozenFactors, granularity: Granularity = "head") -> Checkpoint:
    """`made` with other factors in the module that has a map of head 1."""
    freezing = made.header.freezing.model_copy(update={"granularity": granularity})
    header = made.header.model_copy(update={"freezing": freezing})
    return Checkpoint(made.weights, made.frozen, header, {**made.factors, PATH: groups})


SHAPE = AttentionShape(heads=4, tokens=5)
FOUR = made_factors(SHAPE, [0], 4)
REFUSED: dict[str, tuple[tuple[FrozenFactors, ...], str]] = {
    "a rank above the tokens": (
        (made_factors(SHAPE, [0], 6),),
        r"rank6: the rank; expected a number in 1…5, the tokens; got 6\. .*freeze its whole map",
    ),
    "a head in two ranks": (
        (made_factors(SHAPE, [3], 2), made_factors(SHAPE, [0, 3], 4)),
        r"attn freezes a head twice; .*got \[3\] twice of \[0, 1, 3, 3\]\. Leave",
    ),
    "a head in maps too": (
        (made_factors(SHAPE, [1, 2], 4),),
        r"attn freezes a head twice; .*got \[1\] twice of \[1, 1, 2\]",
    ),
    "a rank twice": (
        (FOUR, made_factors(SHAPE, [2], 4)),
        r"ranks; expected at least one, each once, ascending; got \[4, 4\]",
    ),
    "ranks that descend": ((FOUR, made_factors(SHAPE, [2], 1)), r"ranks; .*got \[4, 1\]"),
    "no ranks": ((), r"ranks; expected at least one.*got \[\]"),
    "a code that the bits don't hold": (
        (dataclasses.replace(FOUR, mix_codes=FOUR.mix_codes + np.uint8(8)),),
        r"rank4\.mix_codes do not fit 3 bits; expected at most 7; got",
    ),
    "a pool of another rank": (
        (dataclasses.replace(FOUR, pool_codes=FOUR.pool_codes[:, :3], pool_scales=FOUR.pool_scales[:, :3]),),
        r"rank4\.pool_codes has the wrong dtype or shape; expected uint8 \[1, 4, 5\]; got uint8 \[1, 3, 5\]",
    ),
}


@pytest.mark.parametrize(("groups", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_factors_that_do_not_fit_are_never_saved(
    checkpoint: Checkpoint, tmp_path: Path, groups: tuple[FrozenFactors, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(regrouped(mixed(checkpoint), *groups), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_factors_together_with_masks_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = regrouped(mixed(checkpoint), FOUR, granularity="row")
    maps = dataclasses.replace(made.frozen[PATH], mask=np.ones((1, 5), np.bool_))
    masked = dataclasses.replace(made, frozen={PATH: maps})
    with pytest.raises(
        CheckpointError, match=r"rank\d does not fit granularity row; expected granularity head: .*got row"
    ):
        save(masked, tmp_path / "x")
    alone = dataclasses.replace(made, frozen={})
    with pytest.raises(CheckpointError, match=r"rank\d does not fit granularity row.*Leave the masks out"):
        save(alone, tmp_path / "x")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank4", "rank6", r"rank6\.mix_codes has the wrong size"),
        ("rank4", "rank04", "unknown tensor"),
        ("rank4", "rank0", "unknown tensor"),
        ("rank4.mix_codes", "rank4.codes", "unknown tensor"),
        (f"{PATH}.rank4", "blocks.9.attn.rank4", "belongs to no attention module"),
        ("rank4.heads", "rank2.heads", r"rank\d is incomplete"),
    ],
)
def test_tensors_of_other_names_are_refused(saved: Path, old: str, new: str, message: str) -> None:
    tensors, metadata = read_raw(saved)
    save_file({key.replace(old, new): tensor for key, tensor in tensors.items()}, saved, metadata)
    with pytest.raises(CheckpointError, match=message):
        load(saved, verify=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": {}}, r"freezing\.ranks and the tensors disagree"),
        ({"ranks": {PATH: [4, None, 2], "blocks.0.attn": [2, 2]}}, r"freezing\.ranks"),
        ({"sparsity": 0.5}, r"freezing\.sparsity"),
        ({"granularity": "row"}, "got no mask|does not fit granularity row"),
    ],
)
def test_a_header_that_says_something_else_is_refused(saved: Path, changes: dict[str, object], message: str) -> None:
    tensors, metadata = read_raw(saved)
    header = json.loads(metadata["eam"])
    header["freezing"] |= changes
    save_file(tensors, saved, {"eam": json.dumps(header)})
    with pytest.raises(CheckpointError, match=message):
        load(saved, verify=False)
