"""What an EAM checkpoint holds: the header's records and the frozen maps, without any file.

F heads of a module have something frozen. A map is [N, N] over the N tokens of a window, or of the image where the
model has no windows. A model with windows keeps M frozen maps per head, and every window of the image uses one of them;
*rows* below is (N,) without windows and (M, N) with them. What is frozen is the same in all M, only its values differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, JsonValue, field_validator

from eamdeploy.artifacts.card import Freezing, Preprocessing, Recovery
from eamdeploy.artifacts.records import Record
from eamdeploy.eam.quantizers import dequantize
from eamdeploy.vocabulary import Quantizer

FORMAT: Final = 3
"""What `save` writes. Format 2 is the same without heads of low rank, format 1 without a seal."""
MASK_AXES: Final = {"row": 1, "entry": 2}  # of a mask after its heads, by granularity
_RANK = re.compile(r"(.+)\.rank([1-9][0-9]{0,5})")


class AttentionShape(Record):
    """One attention module: `heads` maps of [tokens, tokens] in every window.

    Attributes:
        tokens: per window.
        windows: for every window of an image, row by row, which of the M frozen maps it uses; the numbers 0…M − 1,
            each at least once. None for a model without windows.
    """

    heads: int = Field(ge=1)
    tokens: int = Field(ge=1)
    windows: list[int] | None = None

    @field_validator("windows")
    @classmethod
    def _numbered(cls, windows: list[int] | None) -> list[int] | None:
        if windows is not None and (not windows or min(windows) != 0 or max(windows) != len(set(windows)) - 1):
            raise ValueError(f"must be the numbers 0…M − 1, each at least once, got {windows}")
        return windows

    @property
    def n_windows(self) -> int:
        """Windows of one image; 1 without windows."""
        return 1 if self.windows is None else len(self.windows)

    @property
    def n_maps(self) -> int:
        """M, the frozen maps that each head keeps; 1 without windows."""
        return 1 if self.windows is None else max(self.windows) + 1

    @property
    def rows(self) -> tuple[int, ...]:
        """(N,) without windows, (M, N) with them: the axes between heads and keys."""
        return (self.tokens,) if self.windows is None else (self.n_maps, self.tokens)

    @property
    def entries_per_head(self) -> int:
        """Attention entries of one head and one image, over all windows."""
        return self.n_windows * self.tokens**2


class Calibration(Record):
    """What the frozen maps were averaged over.

    Attributes:
        n_images: how many images.
        digest: SHA-256 of the images' contents.
        source: the folder's name, as the user gave it.
        exif_transpose: whether the images were turned as their EXIF orientation says.
    """

    n_images: int = Field(ge=1)
    digest: str
    source: str
    exif_transpose: bool = False


class CheckpointHeader(Record):
    """The JSON in the file's metadata: all that is not a tensor.

    Attributes:
        timm_model, timm_kwargs: arguments of `timm.create_model`.
        weights: where the weights came from; `random` marks a model that is good for latency only.
        attention: every attention module by its path, in the model's order, frozen or not.
        calibration: None when the maps came from the user's own training.
        recovery: how the weights were changed after freezing; None where they are the unfrozen model's own.
        versions: version by package name.
        content_digest: the seal (see `seal`) of header and tensors; None in files of format 1, and before `save`.
    """

    format: Literal[1, 2, 3] = FORMAT
    timm_model: str
    timm_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    weights: str
    num_classes: int = Field(ge=1)
    class_names: list[str] | None = None
    preprocessing: Preprocessing
    attention: dict[str, AttentionShape]
    freezing: Freezing
    calibration: Calibration | None = None
    recovery: Recovery | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    content_digest: str | None = None


@dataclass(frozen=True, eq=False)
class FrozenMaps:
    """What is frozen in one attention module.

    Attributes:
        heads: int64 [F], strictly ascending: the heads with something frozen.
        codes: uint8 [F, *rows, N], unpacked; 0 where nothing is frozen.
        scales: float32 [F, *rows]; 0 in rows without a frozen entry.
        mask: what is frozen, by granularity: None for head (everything), bool [F, N] for row, bool [F, N, N] for entry.
    """

    heads: NDArray[np.int64]
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    mask: NDArray[np.bool_] | None = None

    def maps(self, quantizer: Quantizer) -> NDArray[np.float32]:
        """The maps themselves, float32 [F, *rows, N], 0 where not frozen; rows that are frozen whole sum to 1."""
        return dequantize(self.codes, self.scales, quantizer)

    def frozen(self) -> NDArray[np.bool_]:
        """Which entries are frozen, bool [F, N, N] (read-only), whatever the granularity."""
        keys = self.codes.shape[-1]
        return spread_mask(self.mask, (len(self.heads), keys, keys))

    @property
    def shares(self) -> list[float]:
        """For every head, the share of its entries that is frozen, in (0, 1]."""
        shares: list[float] = self.frozen().reshape(len(self.heads), -1).mean(axis=1).tolist()
        return shares

    @property
    def frozen_entries(self) -> int:
        """Frozen entries of all heads in one window."""
        return int(np.count_nonzero(self.frozen()))


@dataclass(frozen=True, eq=False)
class FrozenFactors:
    """The heads of one attention module that are frozen with one rank r, see `eam.factors`.

    Attributes:
        heads: int64 [G], strictly ascending.
        mix_codes: uint8 [G, *rows, r], unpacked.
        mix_scales: float32 [G, *rows].
        pool_codes: uint8 [G, *maps, r, N], unpacked; *maps* is (M,) with windows and () without.
        pool_scales: float32 [G, *maps, r].
    """

    heads: NDArray[np.int64]
    mix_codes: NDArray[np.uint8]
    mix_scales: NDArray[np.float32]
    pool_codes: NDArray[np.uint8]
    pool_scales: NDArray[np.float32]

    @property
    def rank(self) -> int:
        """r, the pooled tokens of each head."""
        return int(self.mix_codes.shape[-1])

    def mix(self, quantizer: Quantizer) -> NDArray[np.float32]:
        """U, float32 [G, *rows, r]; rows sum to 1."""
        return dequantize(self.mix_codes, self.mix_scales, quantizer)

    def pool(self, quantizer: Quantizer) -> NDArray[np.float32]:
        """P, float32 [G, *maps, r, N]; rows sum to 1."""
        return dequantize(self.pool_codes, self.pool_scales, quantizer)

    def maps(self, quantizer: Quantizer) -> NDArray[np.float32]:
        """The maps U·P that the factors stand for, float32 [G, *rows, N]."""
        return self.mix(quantizer) @ self.pool(quantizer)


def split_rank(name: str) -> tuple[str, int] | None:
    """Module path and rank of a name such as `blocks.3.attn.rank4`; None for a name without a rank."""
    found = _RANK.fullmatch(name)
    return None if found is None else (found[1], int(found[2]))


def spread_mask(mask: NDArray[np.bool_] | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """`mask` of a `FrozenMaps` as bool of `shape` [F, *rows, N] (a read-only view): the same in every window map.

    Args:
        mask: None (everything is frozen), [F, N] or [F, N, N].
        shape: (F, N, N), or (F, M, N, N) with windows.
    """
    if mask is None:
        return np.broadcast_to(np.True_, shape)
    rows = mask[..., None] if mask.ndim == 2 else mask  # [F, N, 1 or N]
    return np.broadcast_to(rows if len(shape) == 3 else rows[:, None], shape)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model with frozen attention maps.

    Attributes:
        weights: the timm state dict; float16, float32 or float64 parameters, integer and boolean buffers.
        frozen: whole maps, rows or entries by attention module path; only modules that have some.
        factors: heads of low rank by attention module path, ranks ascending; only modules that have
            some.
    """

    weights: dict[str, NDArray[Any]]
    frozen: dict[str, FrozenMaps]
    header: CheckpointHeader
    factors: dict[str, tuple[FrozenFactors, ...]] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, list[float]]:
        """For every head in `freezing.heads` the share of its entries that is frozen, in (0, 1]."""
        shares: dict[str, list[float]] = {}
        for path, heads in self.header.freezing.heads.items():
            maps = self.frozen.get(path)
            parts = {} if maps is None else dict(zip(maps.heads.tolist(), maps.shares, strict=True))
            shares[path] = [parts.get(head, 1.0) for head in heads]
        return shares


def heads_of(
    frozen: Mapping[str, FrozenMaps], factors: Mapping[str, tuple[FrozenFactors, ...]]
) -> dict[str, list[int]]:
    """The heads with something frozen, of either kind, ascending, by attention module path."""
    return {path: sorted(ranks) for path, ranks in _kinds(frozen, factors).items()}


def ranks_of(
    frozen: Mapping[str, FrozenMaps], factors: Mapping[str, tuple[FrozenFactors, ...]]
) -> dict[str, list[int | None]]:
    """The rank of every head in `heads_of`, None for one that is no head of low rank; modules
    without heads of low rank are left out.
    """
    kinds = _kinds(frozen, factors)
    return {path: [kinds[path][head] for head in sorted(kinds[path])] for path in factors}


def _kinds(
    frozen: Mapping[str, FrozenMaps], factors: Mapping[str, tuple[FrozenFactors, ...]]
) -> dict[str, dict[int, int | None]]:
    """By module path and head, the rank, or None for whole maps and parts of them."""
    found: dict[str, dict[int, int | None]] = {}
    for path in sorted({*frozen, *factors}):
        found[path] = dict.fromkeys(frozen[path].heads.tolist()) if path in frozen else {}
        for group in factors.get(path, ()):
            found[path] |= dict.fromkeys(group.heads.tolist(), group.rank)
    return found
