"""The sensitivity of heads as a test wants it: of plain batches, by module path."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.host.sensitivity import by_module, head_effects
from eamdeploy.vocabulary import WindowMaps


def sensitivity(
    model: Any, sites: Any, maps: Any, batches: Any, n_images: int, on_progress: Any, *, windows: WindowMaps = "shared"
) -> dict[str, NDArray[np.float64]]:
    """What each head costs alone, every image counted once."""
    weighted = ((batch, [1.0] * len(batch)) for batch in batches)
    return by_module(sites, head_effects(model, sites, maps, weighted, n_images, on_progress, windows=windows).alone)
