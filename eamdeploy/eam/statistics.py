"""Streaming statistics of one attention module's maps, exact under any order and split of the images or windows.

Every accumulator is an integer, so that adding is associative: two halves of a data set merged are bit for bit the
whole, however the images were batched and whichever half came first.

| accumulator | dtype, shape | one unit |
|---|---|---|
| histogram | uint32 [bins − 1, *shape] | one sample (bin 0 is implied: samples − the others) |
| value | int64 [*shape] | 2⁻³² |
| squared value | int64 [*shape] | 2⁻⁴⁰ |
| row entropy | int64 [*shape[:-1]] | 2⁻³² nats |

A mean is thus exact to 2⁻³³, a mean square to 2⁻⁴¹ and a row entropy to the rounding of its float32 sum. The squares
fill int64 first: their limit, `MAX_SAMPLES`, is checked and never silently exceeded.
Memory: 4·(bins − 1) + 16 bytes per entry; DeiT-Base (12 × 12 × 197 × 197) at 16 bins takes 425 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from eamdeploy.eam.maps import check_maps
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.vocabulary import Spacing

MAX_SAMPLES = 2**23 - 1
_VALUE_UNIT = 2.0**-32
_SQUARE_UNIT = 2.0**-40
_LEAST = np.finfo(np.float32).tiny


def bin_edges(bins: int, spacing: Spacing) -> NDArray[np.float64]:
    """Edges of the histogram, float64 [bins + 1] from 0 to 1; a value on an edge belongs to the bin above it.

    `uniform` puts edge i at i/bins (the paper's histogram). `squared` puts it at (i/bins)², which resolves the small
    values that most of an attention map consists of.
    """
    edges = np.arange(bins + 1) / bins
    return edges if spacing == "uniform" else edges**2


class MapStatistics:
    """Histogram, mean and variance of every entry of one module's attention maps, and the entropy of its rows.

    Args:
        shape: shape of one sample's maps (H, N, N); the first axis are the heads, the last the keys. A sample is an
            image, or one window of an image in a model with windows.
        bins: number of histogram bins, 2…256.
        spacing: where the bins' edges lie, see `bin_edges`.
        module: path of the attention module, named in errors.

    Raises:
        ConfigError: `shape`, `bins` or `spacing` can't be used.
    """

    def __init__(
        self, shape: Sequence[int], *, bins: int = 16, spacing: Spacing = "uniform", module: str = "attention"
    ) -> None:
        if len(shape) < 2 or min(shape) < 1:
            raise ConfigError(
                f"no statistics for maps of {module}", expected="a shape (heads, …, keys)", got=tuple(shape)
            )
        if not 2 <= bins <= 256:
            raise ConfigError(f"histogram of {module}", expected="2 to 256 bins", got=bins)
        if spacing not in get_args(Spacing):
            raise ConfigError(f"histogram of {module}", expected=f"a spacing of {get_args(Spacing)}", got=spacing)
        self.shape = tuple(int(length) for length in shape)
        self.bins = bins
        self.spacing: Spacing = spacing
        self.module = module
        self._n_samples = 0
        self._counts = np.zeros((bins - 1, *self.shape), np.uint32)
        self._values = np.zeros(self.shape, np.int64)
        self._squares = np.zeros(self.shape, np.int64)
        self._row_entropies = np.zeros(self.shape[:-1], np.int64)

    @property
    def n_samples(self) -> int:
        """Number of samples seen."""
        return self._n_samples

    @property
    def nbytes(self) -> int:
        """Bytes of all accumulators."""
        return sum(array.nbytes for array in (self._counts, self._values, self._squares, self._row_entropies))

    def update(self, maps: NDArray[Any]) -> None:
        """The statistics include `maps`, floating point [S, *shape] (taken as float32), S ≥ 0.

        Values up to `RANGE_TOLERANCE` outside [0, 1] count as 0 or 1. Temporary memory: about 30 bytes per entry of
        one sample, whatever S is.

        Raises:
            CheckpointError: the shape is another, a value is not finite or not in [0, 1], or a row does not sum to 1.
            ConfigError: more than `MAX_SAMPLES` samples. Either way the statistics are unchanged.
        """
        if maps.shape[1:] != self.shape:
            raise CheckpointError(
                f"attention maps of {self.module} have the wrong shape",
                expected=["samples", *self.shape],
                got=list(maps.shape),
            )
        self._check_room(len(maps))
        for sample in maps:
            check_maps(sample, self.module)
        scratch = _Scratch(self.shape)
        for sample in maps:
            self._add(sample, scratch)

    def _add(self, sample: NDArray[Any], scratch: _Scratch) -> None:
        value, work, wide, whole = scratch.value, scratch.work, scratch.wide, scratch.whole
        np.clip(sample, 0, 1, out=value, casting="same_kind")

        np.sqrt(value, out=work) if self.spacing == "squared" else np.copyto(work, value)
        np.multiply(work, np.float32(self.bins), out=work)
        np.minimum(work, np.float32(self.bins - 1), out=work)
        bin_of = work.astype(np.uint8).reshape(-1)
        # Most of a map lies in bin 0, so leaving that bin implied saves most of the scattered memory accesses. An
        # entry occurs once in a sample, hence no slot twice, and `+= 1` through the index array counts right.
        entries = np.flatnonzero(bin_of)
        slots = (bin_of[entries].astype(np.intp) - 1) * bin_of.size + entries
        self._counts.reshape(-1)[slots] += 1

        # A power of two changes no mantissa: only `rint` rounds.
        np.multiply(value, np.float32(1 / _VALUE_UNIT), out=work)
        np.copyto(whole, np.rint(work, out=work), casting="unsafe")
        self._values += whole

        np.multiply(value, value, out=wide, dtype=np.float64)
        np.multiply(wide, 1 / _SQUARE_UNIT, out=wide)
        np.copyto(whole, np.rint(wide, out=wide), casting="unsafe")
        self._squares += whole

        np.log(np.maximum(value, _LEAST, out=work), out=work)  # 0 · log 0 = 0
        np.multiply(work, value, out=work)
        self._row_entropies -= np.rint(work.sum(axis=-1).astype(np.float64) / _VALUE_UNIT).astype(np.int64)

        self._n_samples += 1

    def merge(self, other: MapStatistics) -> None:
        """The statistics include everything that `other` has seen, exactly as if this object had seen it.

        Raises:
            ConfigError: `other` has another shape, number of bins or spacing, or together there are more than
                `MAX_SAMPLES` samples; the statistics are unchanged.
        """
        mine, theirs = ((s.shape, s.bins, s.spacing) for s in (self, other))
        if mine != theirs:
            raise ConfigError(
                f"cannot merge statistics of {self.module}", expected=f"(shape, bins, spacing) {mine}", got=theirs
            )
        self._check_room(other.n_samples)
        self._counts += other._counts
        self._values += other._values
        self._squares += other._squares
        self._row_entropies += other._row_entropies
        self._n_samples += other._n_samples

    def _check_room(self, more: int) -> None:
        if self._n_samples + more > MAX_SAMPLES:
            raise ConfigError(
                f"too many samples for the statistics of {self.module}",
                expected=f"at most {MAX_SAMPLES}",
                got=self._n_samples + more,
            )

    def histogram(self) -> NDArray[np.uint32]:
        """How many samples fell into each bin, uint32 [bins, *shape]; over the bins it sums to `n_samples`."""
        rest = self._n_samples - self._counts.sum(axis=0, dtype=np.uint32)
        return np.concatenate([rest.astype(np.uint32)[None], self._counts])

    def entropy(self) -> NDArray[np.float64]:
        """Shannon entropy of each entry's histogram in nats, float64 [*shape], in [0, ln bins].

        Raises:
            ConfigError: no samples yet.
        Source: arXiv 2508.16311, the entropy of an attention entry over a data set.
        """
        n = self._samples()
        rest = np.full(self.shape, n, np.float64)
        weighted = np.zeros(self.shape)  # Σ count · ln count
        for counts in self._counts:
            rest -= counts
            weighted += _xlogx(counts.astype(np.float64))
        weighted += _xlogx(rest)
        return np.asarray(np.maximum(np.log(n) - weighted / n, 0))

    def mean(self) -> NDArray[np.float64]:
        """Mean of each entry over the samples, float64 [*shape].

        Raises:
            ConfigError: no samples yet.
        """
        return np.asarray(self._values * (_VALUE_UNIT / self._samples()), np.float64)

    def variance(self) -> NDArray[np.float64]:
        """Variance of each entry over the samples (divided by their number, not one less), float64 [*shape], ≥ 0.

        Raises:
            ConfigError: no samples yet.
        """
        return np.maximum(self._squares * (_SQUARE_UNIT / self._samples()) - self.mean() ** 2, 0)

    def row_entropy(self) -> NDArray[np.float64]:
        """−Σ A ln A of each row in nats, averaged over the samples, float64 [*shape[:-1]], in [0, ln keys].

        Raises:
            ConfigError: no samples yet.
        """
        return np.asarray(self._row_entropies * (_VALUE_UNIT / self._samples()), np.float64)

    def _samples(self) -> int:
        if self._n_samples == 0:
            raise ConfigError(f"no statistics for {self.module}", expected="at least one sample", got="none")
        return self._n_samples


class _Scratch:
    """Buffers for one sample, so that a batch of any size needs no more memory than one image."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.value = np.empty(shape, np.float32)
        self.work = np.empty(shape, np.float32)
        self.wide = np.empty(shape, np.float64)
        self.whole = np.empty(shape, np.int64)


def _xlogx(x: NDArray[np.float64]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = x * np.log(np.maximum(x, 1))  # only for whole numbers: 0 → 0 and 1 → 0
    return product
