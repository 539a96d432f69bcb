"""Which heads to freeze: the lowest scores, as many as the sparsity allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eamdeploy.errors import ConfigError

_SHARE_SLACK = 1e-9  # so that 0.3 of 10 heads is 3 although 0.3 * 10 may round below


@dataclass(frozen=True)
class Selection:
    """The heads to freeze.

    Attributes:
        heads: ascending head indices by attention module path (sorted); modules without frozen heads are left out.
        sparsity: frozen entries ÷ all attention entries, in [0, 1].
        sparsity_asked: what was asked for; `sparsity` is the largest that does not exceed it in score order.
    """

    heads: dict[str, tuple[int, ...]]
    sparsity: float
    sparsity_asked: float


def select(
    scores: Mapping[str, NDArray[np.float64]], entries_per_head: Mapping[str, int], sparsity: float
) -> Selection:
    """The heads with the lowest scores, as many as fit into `sparsity`.

    All heads of all modules are ranked by ascending score; equal scores by the modules' order in `scores`, then by
    head index. The longest prefix of this ranking whose share of all entries is at most `sparsity` is frozen: a large
    head that does not fit ends the prefix, no smaller one is put in its place.

    Args:
        scores: float [H] by attention module path.
        entries_per_head: attention entries of one head (N·N) by the same paths.
        sparsity: in [0, 1].

    Raises:
        ConfigError: the sparsity is outside [0, 1], the paths differ, there is no head, or a score is not finite.
    """
    if not 0 <= sparsity <= 1:  # false for NaN too
        raise ConfigError("cannot select heads: sparsity", expected="a number in [0, 1]", got=sparsity)
    for path, values in scores.items():
        if values.ndim != 1 or not np.isfinite(values).all():
            raise ConfigError(
                f"scores of {path} cannot be ranked", expected="one finite number per head", got=values.tolist()
            )
    total = _total_entries({path: len(values) for path, values in scores.items()}, entries_per_head)
    ranked = sorted(
        (float(value), order, head, path)
        for order, (path, values) in enumerate(scores.items())
        for head, value in enumerate(values)
    )
    heads: dict[str, list[int]] = {}
    frozen = 0
    for _, _, head, path in ranked:
        if (frozen + entries_per_head[path]) / total > sparsity + _SHARE_SLACK:
            break
        frozen += entries_per_head[path]
        heads.setdefault(path, []).append(head)
    return Selection(
        heads={path: tuple(sorted(heads[path])) for path in sorted(heads)},
        sparsity=frozen / total,
        sparsity_asked=float(sparsity),
    )


def sparsity_of(
    heads: Mapping[str, Sequence[int]], heads_per_module: Mapping[str, int], entries_per_head: Mapping[str, int]
) -> float:
    """Share of all attention entries that belongs to `heads`, in [0, 1]; what `select` calls sparsity.

    Args:
        heads: frozen head indices by attention module path.
        heads_per_module: number of heads of every attention module.
        entries_per_head: attention entries of one head (N·N) of every attention module.

    Raises:
        ConfigError: the paths differ, or there is no head.
    """
    total = _total_entries(heads_per_module, entries_per_head)
    if unknown := sorted(set(heads) - set(heads_per_module)):
        raise ConfigError("frozen heads in unknown modules", expected=sorted(heads_per_module), got=unknown)
    return sum(len(frozen) * entries_per_head[path] for path, frozen in heads.items()) / total


def _total_entries(heads_per_module: Mapping[str, int], entries_per_head: Mapping[str, int]) -> int:
    if set(heads_per_module) != set(entries_per_head):
        raise ConfigError(
            "scores and attention entries belong to different modules",
            expected=sorted(entries_per_head),
            got=sorted(heads_per_module),
        )
    if heads_per_module and min(entries_per_head.values()) < 1:
        raise ConfigError("a head without entries", expected="at least one per head", got=dict(entries_per_head))
    total = sum(count * entries_per_head[path] for path, count in heads_per_module.items())
    if total == 0:
        raise ConfigError("the model has no attention head to freeze")
    return total
