"""Everything in an EAM checkpoint checked against everything else, before it is written and after it is read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import Freezing
from eamdeploy.eam.quantizers import integer_values
from eamdeploy.eam.records import (
    MASK_AXES,
    AttentionShape,
    Checkpoint,
    CheckpointHeader,
    FrozenFactors,
    FrozenMaps,
    heads_of,
    ranks_of,
    spread_mask,
)
from eamdeploy.eam.selection import sparsity_of
from eamdeploy.errors import CheckpointError

_ROW_SUM_TOLERANCE = 1e-5
_SPARSITY_TOLERANCE = 1e-9
_AXES = {3: "(frozen head, row", 4: "(frozen head, window map, row"}  # by the dimensions of the codes


def validate(checkpoint: Checkpoint, where: str = "checkpoint") -> None:
    """Header, weights and frozen maps are sound and agree with each other.

    Raises:
        CheckpointError: they are or do not; the message names `where`, the tensor or header key, expected and got.
    """
    check_header(checkpoint.header, where)
    if not checkpoint.weights:
        raise CheckpointError(f"{where} holds no weights", expected="tensors named model.<timm state-dict key>")
    for key, weight in checkpoint.weights.items():
        _check_weight(weight, f"{where}: model.{key}")
    header = checkpoint.header
    for path in (*checkpoint.frozen, *checkpoint.factors):
        if path not in header.attention:
            raise CheckpointError(
                f"{where}: eam.{path} belongs to no attention module of {header.timm_model}",
                expected=f"one of {', '.join(header.attention)}",
                got=path,
            )
    for path, frozen in checkpoint.frozen.items():
        _check_maps(frozen, header.attention[path], header.freezing, f"{where}: eam.{path}")
    for path, groups in checkpoint.factors.items():
        for group in groups:
            name = f"{where}: eam.{path}.rank{group.rank}"
            _check_factors(group, header.attention[path], header.freezing, name)
        _check_apart(checkpoint, path, f"{where}: eam.{path}")
    _check_freezing(checkpoint, where)


def check_header(header: CheckpointHeader, where: str) -> None:
    """The parts of `header` agree with each other, and this version can use it.

    Raises:
        CheckpointError: they do not, or it can't; the message names `where` and the header key.
    """
    freezing = header.freezing
    if not header.attention:
        raise CheckpointError(f"{where}: header key attention is empty", expected="every attention module of the model")
    _check_windows(header, where)
    if header.class_names is not None and len(header.class_names) != header.num_classes:
        raise CheckpointError(
            f"{where}: header key class_names does not fit num_classes",
            expected=f"{header.num_classes} names",
            got=len(header.class_names),
        )
    asked = freezing.sparsity_asked
    if asked is not None and not 0 <= asked <= 1:
        raise CheckpointError(f"{where}: header key freezing.sparsity_asked", expected="a number in [0, 1]", got=asked)
    if freezing.scores:
        lengths = {path: shape.heads for path, shape in header.attention.items()}
        got = {path: len(values) for path, values in freezing.scores.items()}
        if got != lengths:
            raise CheckpointError(
                f"{where}: header key freezing.scores does not fit the model's heads", expected=lengths, got=got
            )
        for path, values in freezing.scores.items():
            if not np.isfinite(values).all():
                raise CheckpointError(
                    f"{where}: header key freezing.scores.{path}", expected="finite numbers", got=values
                )


def _check_windows(header: CheckpointHeader, where: str) -> None:
    """Either no module has windows, or all have, and use their frozen maps as `freezing.window_maps` says."""
    how = header.freezing.window_maps
    for path, shape in header.attention.items():
        name, windows = f"{where}: header key attention.{path}.windows", shape.windows
        if (windows is None) != (how is None):
            raise CheckpointError(
                f"{name} and freezing.window_maps disagree",
                expected="both, for a model with windows, or neither",
                got=f"{windows} and {how}",
            )
        if how == "shared" and shape.n_maps > 1:
            raise CheckpointError(f"{name} does not fit window_maps shared", expected="only 0", got=windows)
        if how == "window" and windows != list(range(shape.n_windows)):
            raise CheckpointError(
                f"{name} does not fit window_maps window", expected=f"0…{shape.n_windows - 1} in order", got=windows
            )


def _check_weight(weight: NDArray[Any], name: str) -> None:
    dtype = weight.dtype
    if dtype.kind not in "fiub" or dtype.itemsize > 8 or not dtype.isnative:
        raise CheckpointError(
            f"{name} has a dtype that a checkpoint cannot hold",
            expected="float16, float32, float64, an integer or bool in this machine's byte order",
            got=dtype,
            hint="Cast bfloat16 weights to float32 first.",
        )
    if dtype.kind == "f" and not np.isfinite(weight).all():
        broken = weight.size - np.count_nonzero(np.isfinite(weight))
        raise CheckpointError(
            f"{name} is not finite",
            expected="finite weights",
            got=f"{broken} NaN or infinite of {weight.size}",
            hint="The training diverged or the file is damaged.",
        )


def _check_maps(frozen: FrozenMaps, attention: AttentionShape, freezing: Freezing, name: str) -> None:
    heads, tokens = frozen.heads, attention.tokens
    _check_heads(heads, attention, name)
    _check_mask(frozen, tokens, freezing, f"{name}.mask")
    _check_form(frozen.codes, np.uint8, (len(heads), *attention.rows, tokens), f"{name}.codes")
    _check_form(frozen.scales, np.float32, (len(heads), *attention.rows), f"{name}.scales")
    mask = spread_mask(frozen.mask, frozen.codes.shape)
    _check_codes(frozen.codes, mask, 2**freezing.bits - 1, freezing, f"{name}.codes")
    _check_scales(frozen.scales, np.count_nonzero(mask, axis=-1) > 0, f"{name}.scales")
    _check_row_sums(frozen.codes, frozen.scales, mask, freezing, name)


def _check_heads(heads: NDArray[np.int64], attention: AttentionShape, name: str) -> None:
    _check_form(heads, np.int64, (len(heads) if heads.ndim else 1,), f"{name}.heads")
    if len(heads) == 0:
        raise CheckpointError(f"{name}.heads is empty", expected="at least one frozen head, or no tensors for it")
    if (np.diff(heads) <= 0).any() or heads[0] < 0 or heads[-1] >= attention.heads:
        raise CheckpointError(
            f"{name}.heads",
            expected=f"strictly ascending head indices in 0…{attention.heads - 1}",
            got=heads.tolist(),
        )


def _check_factors(group: FrozenFactors, attention: AttentionShape, freezing: Freezing, name: str) -> None:
    """Mix and pool have the forms of their rank, and rows that sum to 1."""
    if freezing.granularity != "head":
        raise CheckpointError(
            f"{name} does not fit granularity {freezing.granularity}",
            expected="granularity head: factors stand for whole heads",
            got=freezing.granularity,
            hint="Leave the masks out, or the factors.",
        )
    rank, tokens = group.rank, attention.tokens
    if not 1 <= rank <= tokens:
        raise CheckpointError(
            f"{name}: the rank",
            expected=f"a number in 1…{tokens}, the tokens",
            got=rank,
            hint="A head of that many pooled tokens saves nothing: freeze its whole map.",
        )
    _check_heads(group.heads, attention, name)
    mix_rows = (len(group.heads), *attention.rows)
    pool_rows = (len(group.heads), *attention.rows[:-1], rank)
    for part, codes, scales, rows, keys in (
        ("mix", group.mix_codes, group.mix_scales, mix_rows, rank),
        ("pool", group.pool_codes, group.pool_scales, pool_rows, tokens),
    ):
        _check_form(codes, np.uint8, (*rows, keys), f"{name}.{part}_codes")
        _check_form(scales, np.float32, rows, f"{name}.{part}_scales")
        everything = spread_mask(None, codes.shape)
        _check_codes(codes, everything, 2**freezing.bits - 1, freezing, f"{name}.{part}_codes")
        _check_scales(scales, np.ones(rows, np.bool_), f"{name}.{part}_scales")
        _check_row_sums(codes, scales, everything, freezing, f"{name}.{part}")


def _check_apart(checkpoint: Checkpoint, path: str, name: str) -> None:
    """Ranks ascend, and no head of the module is frozen twice."""
    groups = checkpoint.factors[path]
    ranks = [group.rank for group in groups]
    if ranks != sorted(set(ranks)) or not ranks:
        raise CheckpointError(f"{name}: ranks", expected="at least one, each once, ascending", got=ranks)
    maps = [checkpoint.frozen[path].heads] if path in checkpoint.frozen else []
    heads = np.concatenate([*maps, *(group.heads for group in groups)]).tolist()
    if len(set(heads)) < len(heads):
        twice = sorted({head for head in heads if heads.count(head) > 1})
        raise CheckpointError(
            f"{name} freezes a head twice",
            expected="every head either in the maps or in one rank",
            got=f"{twice} twice of {sorted(heads)}",
            hint="Leave such a head out of all arrays but one.",
        )


def _check_mask(frozen: FrozenMaps, tokens: int, freezing: Freezing, name: str) -> None:
    if (frozen.mask is None) != (freezing.granularity == "head"):
        raise CheckpointError(
            f"{name} does not fit granularity {freezing.granularity}",
            expected="a mask for granularity row or entry, none for head",
            got="none" if frozen.mask is None else "a mask",
        )
    if frozen.mask is None:
        return
    pieces = (tokens,) * MASK_AXES[freezing.granularity]
    _check_form(frozen.mask, np.bool_, (len(frozen.heads), *pieces), name)
    frozen_per_head = np.count_nonzero(frozen.mask.reshape(len(frozen.heads), -1), axis=1)
    if (frozen_per_head == 0).any():
        raise CheckpointError(
            f"{name} freezes nothing of head {int(frozen.heads[frozen_per_head.argmin()])}",
            expected=f"at least one {freezing.granularity} of every head in .heads",
        )


def _check_codes(
    codes: NDArray[np.uint8], mask: NDArray[np.bool_], largest: int, freezing: Freezing, name: str
) -> None:
    if int(codes.max()) > largest:
        raise CheckpointError(
            f"{name} do not fit {freezing.bits} bits", expected=f"at most {largest}", got=int(codes.max())
        )
    if (stray := (codes != 0) & ~mask).any():
        place = np.unravel_index(int(stray.argmax()), stray.shape)
        raise CheckpointError(
            f"{name} at {_AXES[codes.ndim]}, key) {_place(place)}",
            expected="0 where nothing is frozen",
            got=codes[place],
        )


def _check_scales(scales: NDArray[np.float32], in_use: NDArray[np.bool_], name: str) -> None:
    """`in_use`: rows with a frozen entry."""
    sound = np.where(in_use, np.isfinite(scales) & (scales > 0), scales == 0)
    if not sound.all():
        place = np.unravel_index(int((~sound).argmax()), scales.shape)
        raise CheckpointError(
            f"{name} at {_AXES[scales.ndim + 1]}) {_place(place)}",
            expected="a positive finite number" if in_use[place] else "0 in a row without frozen entries",
            got=float(scales[place]),
        )


def _check_row_sums(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    mask: NDArray[np.bool_],
    freezing: Freezing,
    name: str,
) -> None:
    """Rows frozen whole sum to 1; the frozen part of others, to at most 1."""
    integers = integer_values(codes, freezing.quantizer).sum(axis=-1, dtype=np.int64)
    row_sums = integers * scales.astype(np.float64)
    excess = row_sums - 1
    whole = np.count_nonzero(mask, axis=-1) == mask.shape[-1]
    for errors, rule, range_ in (
        (np.where(whole, np.abs(excess), 0), "do not sum to 1", "within {:g} of 1"),
        (np.where(whole, 0, excess), "have a frozen part that sums to more than 1", "at most {:g} over 1"),
    ):
        if (errors > _ROW_SUM_TOLERANCE).any():
            worst = np.unravel_index(int(errors.argmax()), errors.shape)
            raise CheckpointError(
                f"{name}: {np.count_nonzero(errors > _ROW_SUM_TOLERANCE)} of {errors.size} rows {rule}",
                expected=f"scale · Σ {'code²' if freezing.quantizer == 'squared' else 'code'}"
                f" {range_.format(_ROW_SUM_TOLERANCE)} for quantizer {freezing.quantizer}",
                got=f"{row_sums[worst]:.7g} at {_AXES[codes.ndim]}) {_place(worst)}",
            )


def _check_form(array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...], name: str) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise CheckpointError(
            f"{name} has the wrong dtype or shape",
            expected=f"{np.dtype(dtype)} {list(shape)}",
            got=f"{array.dtype} {list(array.shape)}",
        )


def _place(index: tuple[np.intp, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in index)


def _check_freezing(checkpoint: Checkpoint, where: str) -> None:
    freezing, attention = checkpoint.header.freezing, checkpoint.header.attention
    tensors = heads_of(checkpoint.frozen, checkpoint.factors)
    if tensors != freezing.heads:
        paths = set(tensors) | set(freezing.heads)
        path = min(path for path in paths if tensors.get(path) != freezing.heads.get(path))
        raise CheckpointError(
            f"{where}: header key freezing.heads and tensor eam.{path}.heads disagree",
            expected=f"{freezing.heads.get(path, 'no frozen heads')} as in the header",
            got=tensors.get(path, "no such tensor"),
        )
    ranks = ranks_of(checkpoint.frozen, checkpoint.factors)
    if ranks != freezing.ranks:
        raise CheckpointError(
            f"{where}: header key freezing.ranks and the tensors disagree", expected=ranks, got=freezing.ranks
        )
    sparsity = sparsity_of(checkpoint.frozen, attention, checkpoint.factors)
    if not abs(freezing.sparsity - sparsity) <= _SPARSITY_TOLERANCE:  # true for NaN too
        raise CheckpointError(
            f"{where}: header key freezing.sparsity", expected=f"{sparsity} for what is frozen", got=freezing.sparsity
        )
