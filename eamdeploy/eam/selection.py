"""Which pieces to freeze: the lowest scores, as many as the sparsity allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from eamdeploy.eam.records import AttentionShape, FrozenMaps
from eamdeploy.errors import ConfigError

Granularity = Literal["head", "row", "entry"]

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
PLURALS: Final[Mapping[Granularity, str]] = {"head": "heads", "row": "rows", "entry": "entries"}
_SHARE_SLACK = 1e-9  # so that 0.3 of 10 heads is 3 although 0.3 * 10 may round below


@dataclass(frozen=True, eq=False)
class Selection:
    """The pieces to freeze.

    Attributes:
        pieces: by attention module path (sorted), True where frozen; bool of the shape of the module's scores, heads
            first. Modules without frozen pieces are left out.
        sparsity: frozen entries ÷ all attention entries, in [0, 1].
        sparsity_asked: what was asked for; `sparsity` is the largest that does not exceed it in score order.
    """

    pieces: dict[str, NDArray[np.bool_]]
    sparsity: float
    sparsity_asked: float

    @property
    def heads(self) -> dict[str, tuple[int, ...]]:
        """The heads with at least one frozen piece, ascending, by attention module path."""
        return {
            path: tuple(np.flatnonzero(frozen.reshape(len(frozen), -1).any(axis=1)).tolist())
            for path, frozen in self.pieces.items()
        }


def select(
    scores: Mapping[str, NDArray[np.float64]], entries_per_piece: Mapping[str, int], sparsity: float
) -> Selection:
    """The pieces with the lowest scores, as many as fit into `sparsity`.

    All pieces of all modules are ranked by ascending score; equal scores by the modules' order in `scores`, then by
    index in C order. The longest prefix of this ranking whose share of all entries is at most `sparsity` is frozen: a
    large piece that does not fit ends the prefix, no smaller one is put in its place.

    Args:
        scores: float [H] for heads, [H, N] for rows or [H, N, N] for entries, by attention module path.
        entries_per_piece: attention entries of one piece over all W windows of an image (W·N·N, W·N or W) by the same
            paths.
        sparsity: in [0, 1].

    Raises:
        ConfigError: the sparsity is outside [0, 1], the paths differ, there is no piece, or a score is not finite.
    """
    if not 0 <= sparsity <= 1:  # false for NaN too
        raise ConfigError("cannot select what to freeze: sparsity", expected="a number in [0, 1]", got=sparsity)
    _check_pieces(scores, entries_per_piece)
    total = sum(values.size * entries_per_piece[path] for path, values in scores.items())
    ranking = np.argsort(np.concatenate([values.reshape(-1) for values in scores.values()]), kind="stable")
    entries = np.repeat([entries_per_piece[path] for path in scores], [values.size for values in scores.values()])
    frozen_so_far = np.cumsum(entries[ranking])
    count = int(np.count_nonzero(frozen_so_far / total <= sparsity + _SHARE_SLACK))
    frozen = np.zeros(len(ranking), np.bool_)
    frozen[ranking[:count]] = True
    ends = np.cumsum([values.size for values in scores.values()])
    pieces = {
        path: part.reshape(values.shape)
        for (path, values), part in zip(scores.items(), np.split(frozen, ends[:-1]), strict=True)
    }
    return Selection(
        pieces={path: pieces[path] for path in sorted(pieces) if pieces[path].any()},
        sparsity=int(frozen_so_far[count - 1]) / total if count else 0.0,
        sparsity_asked=float(sparsity),
    )


def sparsity_of(frozen: Mapping[str, FrozenMaps], attention: Mapping[str, AttentionShape]) -> float:
    """Share of all attention entries that is frozen, in [0, 1]; what `select` calls sparsity.

    Args:
        frozen: by attention module path, of modules in `attention`.
        attention: every attention module of the model.

    Raises:
        ConfigError: the model has no attention module, or `frozen` has a module that is none of the model's.
    """
    if unknown := sorted(set(frozen) - set(attention)):
        raise ConfigError("frozen maps of unknown modules", expected=sorted(attention), got=unknown)
    if not attention:
        raise ConfigError("the model has no attention to freeze")
    entries = sum(maps.frozen_entries * attention[path].n_windows for path, maps in frozen.items())
    return entries / sum(shape.heads * shape.entries_per_head for shape in attention.values())


def _check_pieces(scores: Mapping[str, NDArray[np.float64]], entries_per_piece: Mapping[str, int]) -> None:
    for path, values in scores.items():
        if values.ndim < 1 or not np.isfinite(values).all():
            raise ConfigError(
                f"scores of {path} cannot be ranked",
                expected="one finite number per piece, heads first",
                got=f"{values.dtype} {list(values.shape)}, {np.count_nonzero(~np.isfinite(values))} not finite",
            )
    if set(scores) != set(entries_per_piece):
        raise ConfigError(
            "scores and attention entries belong to different modules",
            expected=sorted(entries_per_piece),
            got=sorted(scores),
        )
    if not any(values.size for values in scores.values()):
        raise ConfigError("the model has no attention to freeze")
    if min(entries_per_piece.values()) < 1:
        raise ConfigError("a piece without entries", expected="at least one per piece", got=dict(entries_per_piece))
