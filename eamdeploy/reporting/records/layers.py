"""How long the layers of engines took, whoever timed them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

SLOWEST_LAYERS: Final = 15


@dataclass(frozen=True)
class LayerTimes:
    """Layers of one engine, timed once.

    Attributes:
        engine: its name, and `digest` the SHA-256 of its file.
        occasion: when and where they were timed, in words.
        slowest: by name, in milliseconds, the slowest first.
        total_ms, timed: sum and number of all that were timed.
    """

    engine: str
    digest: str
    occasion: str
    slowest: tuple[tuple[str, float], ...]
    total_ms: float
    timed: int

    @property
    def shares(self) -> list[float]:
        """For each of the slowest layers its time as a share of the slowest one's."""
        longest = max((ms for _, ms in self.slowest), default=0.0) or 1.0
        return [ms / longest for _, ms in self.slowest]


def layer_times(engine: str, digest: str, occasion: str, layer_ms: Mapping[str, float] | None) -> LayerTimes | None:
    """Those times; None where no layer was timed."""
    if not layer_ms:
        return None
    slowest = sorted(layer_ms.items(), key=lambda item: -item[1])[:SLOWEST_LAYERS]
    return LayerTimes(engine, digest, occasion, tuple(slowest), sum(layer_ms.values()), len(layer_ms))
