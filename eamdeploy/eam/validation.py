"""Everything in an EAM checkpoint checked against everything else, before it is written and after it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifact import Freezing
from eamdeploy.eam.quantizers import integer_values
from eamdeploy.eam.selection import sparsity_of
from eamdeploy.errors import CheckpointError

if TYPE_CHECKING:
    from eamdeploy.eam.checkpoint import AttentionShape, Checkpoint, CheckpointHeader, FrozenMaps

_ROW_SUM_TOLERANCE = 1e-5
_SPARSITY_TOLERANCE = 1e-9


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
    for path, frozen in checkpoint.frozen.items():
        if path not in header.attention:
            raise CheckpointError(
                f"{where}: eam.{path} belongs to no attention module of {header.timm_model}",
                expected=f"one of {', '.join(header.attention)}",
                got=path,
            )
        _check_maps(frozen, header.attention[path], header.freezing, f"{where}: eam.{path}")
    _check_freezing(checkpoint, where)


def check_header(header: CheckpointHeader, where: str) -> None:
    """The parts of `header` agree with each other, and this version can use it.

    Raises:
        CheckpointError: they do not, or it can't; the message names `where` and the header key.
    """
    freezing = header.freezing
    if freezing.granularity != "head":
        raise CheckpointError(
            f"{where}: granularity {freezing.granularity} is not supported yet",
            expected="head: whole maps, the only pieces that this version exports",
            got=freezing.granularity,
            hint="Freeze whole heads, or use a later version of eamdeploy.",
        )
    if not header.attention:
        raise CheckpointError(f"{where}: header key attention is empty", expected="every attention module of the model")
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
    _check_form(heads, np.int64, (len(heads) if heads.ndim else 1,), f"{name}.heads")
    if len(heads) == 0:
        raise CheckpointError(f"{name}.heads is empty", expected="at least one frozen head, or no tensors for it")
    if (np.diff(heads) <= 0).any() or heads[0] < 0 or heads[-1] >= attention.heads:
        raise CheckpointError(
            f"{name}.heads",
            expected=f"strictly ascending head indices in 0…{attention.heads - 1}",
            got=heads.tolist(),
        )
    _check_form(frozen.codes, np.uint8, (len(heads), tokens, tokens), f"{name}.codes")
    _check_form(frozen.scales, np.float32, (len(heads), tokens), f"{name}.scales")
    largest = 2**freezing.bits - 1
    if int(frozen.codes.max()) > largest:
        raise CheckpointError(
            f"{name}.codes do not fit {freezing.bits} bits", expected=f"at most {largest}", got=int(frozen.codes.max())
        )
    if not (np.isfinite(frozen.scales) & (frozen.scales > 0)).all():
        worst = np.unravel_index(int((~(frozen.scales > 0) | np.isinf(frozen.scales)).argmax()), frozen.scales.shape)
        raise CheckpointError(
            f"{name}.scales at (frozen head, row) {_place(worst)}",
            expected="a positive finite number",
            got=float(frozen.scales[worst]),
        )
    integers = integer_values(frozen.codes, freezing.quantizer).sum(axis=-1, dtype=np.int64)
    row_sums = integers * frozen.scales.astype(np.float64)
    errors = np.abs(row_sums - 1)
    if (errors > _ROW_SUM_TOLERANCE).any():
        worst = np.unravel_index(int(errors.argmax()), errors.shape)
        raise CheckpointError(
            f"{name}: {np.count_nonzero(errors > _ROW_SUM_TOLERANCE)} of {errors.size} rows do not sum to 1",
            expected=f"scale · Σ {'code²' if freezing.quantizer == 'squared' else 'code'} within"
            f" {_ROW_SUM_TOLERANCE:g} of 1 for quantizer {freezing.quantizer}",
            got=f"{row_sums[worst]:.7g} at (frozen head, row) {_place(worst)}",
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
    tensors = {path: frozen.heads.tolist() for path, frozen in checkpoint.frozen.items()}
    if tensors != freezing.heads:
        paths = set(tensors) | set(freezing.heads)
        path = min(path for path in paths if tensors.get(path) != freezing.heads.get(path))
        raise CheckpointError(
            f"{where}: header key freezing.heads and tensor eam.{path}.heads disagree",
            expected=f"{freezing.heads.get(path, 'no frozen heads')} as in the header",
            got=tensors.get(path, "no such tensor"),
        )
    sparsity = sparsity_of(
        freezing.heads,
        {path: shape.heads for path, shape in attention.items()},
        {path: shape.entries_per_head for path, shape in attention.items()},
    )
    if not abs(freezing.sparsity - sparsity) <= _SPARSITY_TOLERANCE:  # true for NaN too
        raise CheckpointError(
            f"{where}: header key freezing.sparsity", expected=f"{sparsity} for its heads", got=freezing.sparsity
        )
