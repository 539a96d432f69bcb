"""Frozen maps and factors that learn, as they are deployed: quantized in every forward pass.

    logits θ [.., N] ─softmax─▶ p·S ─nearest codes─▶ scale·integer        (what an engine computes with)
                 ◀───────────── gradient of p·S ──────────────            (straight-through)

S is what a row, or its frozen part, sums to: 1 where all of it is frozen. The codes of a row follow from the peak that
`eam.quantizers` found best for the row when it was last stored.
Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons, 2013 (straight-through).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eamdeploy.eam.quantizers import integer_values, nearest_codes
from eamdeploy.eam.records import AttentionShape, FrozenFactors, FrozenMaps, spread_mask
from eamdeploy.host.attention import Constants, Factors, FrozenAttention
from eamdeploy.host.reference import constants_of_module
from eamdeploy.vocabulary import Bits, Quantizer

_UNSEEN = 0.05  # what an entry of code 0 starts at, in steps of its row; code 1 begins at half a step


class LearningRows(nn.Module):
    """Rows of frozen entries with one parameter for each entry.

    Args:
        codes: uint8 [..., N], what the rows start as.
        scales: float32 [...].
        mask: which entries are frozen, broadcast to `codes`; the others stay 0.
    """

    def __init__(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        mask: NDArray[np.bool_],
        bits: Bits,
        quantizer: Quantizer,
    ) -> None:
        super().__init__()
        self._bits, self._quantizer = bits, quantizer
        self._mask = np.broadcast_to(mask, codes.shape)
        integers = integer_values(codes, quantizer).astype(np.float64)
        sums = (integers * scales[..., None]).sum(axis=-1)
        start = np.where(self._mask, np.where(integers > 0, integers, _UNSEEN), 0)
        with np.errstate(divide="ignore"):
            logits = np.log(start / np.maximum(start.sum(axis=-1, keepdims=True), _UNSEEN))
        self.frozen: torch.Tensor
        self.sums: torch.Tensor
        self.peaks: torch.Tensor
        self.register_buffer("frozen", torch.from_numpy(self._mask.copy()), persistent=False)
        self.register_buffer("sums", torch.from_numpy(sums.astype(np.float32))[..., None], persistent=False)
        self.register_buffer("peaks", torch.ones(*scales.shape, 1))
        self.logits = nn.Parameter(torch.from_numpy(np.where(self._mask, logits, 0).astype(np.float32)))
        self.stored()

    def rows(self) -> torch.Tensor:
        """The rows before they are quantized, float32 [..., N]."""
        allowed = self.logits.masked_fill(~self.frozen, -torch.inf)
        return torch.nan_to_num(allowed.softmax(dim=-1)) * self.sums

    def forward(self) -> torch.Tensor:
        """The quantized rows, float32 [..., N], with the gradient of the rows."""
        rows = self.rows()
        with torch.no_grad():
            change = self._quantized(rows) - rows
        return rows + change

    def _quantized(self, rows: torch.Tensor) -> torch.Tensor:
        largest = 2**self._bits - 1
        top = largest if self._quantizer == "uniform" else largest**2
        steps = rows * (self.peaks * top / rows.amax(dim=-1, keepdim=True).clamp_min(1e-30))
        if self._quantizer == "squared":
            steps = (steps - 0.25).clamp_min(0).sqrt()
        codes = (steps + 0.5).floor().clamp_max(largest)
        values = codes if self._quantizer == "uniform" else codes * codes
        return values * (self.sums / values.sum(dim=-1, keepdim=True).clamp_min(1))

    @torch.no_grad()
    def stored(self) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Codes and scales as a checkpoint has them; from now on the forward pass has the same peaks."""
        codes, peaks = nearest_codes(self.rows().double().cpu().numpy(), self._bits, self._quantizer)
        self.peaks.copy_(torch.from_numpy(peaks)[..., None])
        totals = integer_values(codes, self._quantizer).sum(axis=-1, dtype=np.int64)
        sums = self.sums[..., 0].double().cpu().numpy()
        scales = np.where(totals > 0, sums / np.maximum(totals, 1), np.where(self._mask.any(axis=-1), 1.0, 0.0))
        return codes, scales.astype(np.float32)


class LearningFactors(nn.Module):
    """The mix and the pool of heads of one rank, both as rows that learn.

    Args:
        start: what they start as.
    """

    def __init__(self, start: FrozenFactors, bits: Bits, quantizer: Quantizer) -> None:
        super().__init__()
        self._heads = start.heads
        everything = np.ones((), np.bool_)
        self.mix = LearningRows(start.mix_codes, start.mix_scales, everything, bits, quantizer)
        self.pool = LearningRows(start.pool_codes, start.pool_scales, everything, bits, quantizer)

    def forward(self) -> Factors:
        """The quantized factors."""
        return Factors(torch.from_numpy(self._heads), self.mix.forward(), self.pool.forward())

    def stored(self) -> FrozenFactors:
        """The factors as a checkpoint has them."""
        return FrozenFactors(self._heads, *self.mix.stored(), *self.pool.stored())


class LearningAttention(FrozenAttention):
    """timm's attention with frozen maps and factors that learn.

    Args:
        attention: the module to stand in for.
        maps, factors: what they start as.
    """

    def __init__(
        self,
        attention: nn.Module,
        maps: FrozenMaps | None,
        factors: tuple[FrozenFactors, ...],
        shape: AttentionShape,
        bits: Bits,
        quantizer: Quantizer,
    ) -> None:
        super().__init__(attention, constants_of_module(maps, factors, quantizer, shape))
        self._maps = maps
        self.rows: LearningRows | None = None
        if maps is not None:
            mask = spread_mask(maps.mask, maps.codes.shape)
            self.rows = LearningRows(maps.codes, maps.scales, mask, bits, quantizer)
        self._groups = [LearningFactors(each, bits, quantizer) for each in factors]
        self.groups = nn.ModuleList(self._groups)

    def constants(self) -> Constants:
        """What would be deployed if nothing more were learnt."""
        start = super().constants()
        maps = start.maps if self.rows is None else self.rows.forward()
        return start._replace(maps=maps, factors=tuple(group.forward() for group in self._groups))

    def stored(self) -> tuple[FrozenMaps | None, tuple[FrozenFactors, ...]]:
        """What a checkpoint has of the module."""
        maps = None
        if self._maps is not None and self.rows is not None:
            codes, scales = self.rows.stored()
            maps = replace(self._maps, codes=codes, scales=scales)
        return maps, tuple(group.stored() for group in self._groups)
