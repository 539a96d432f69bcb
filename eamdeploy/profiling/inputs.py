"""Input for measurements where only the time and memory of an inference matter."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.engines.runner import Runner
from eamdeploy.errors import ConfigError

_SEED = 0


def random_images(runner: Runner, batch: int) -> NDArray[Any]:
    """[batch, 3, H, W] as the engine takes them, pixels or in the range of normalized ones; the same values each time.

    Raises:
        ConfigError: the engine does not take batches of this size.
    """
    fixed = runner.io.batch
    if batch < 1 or fixed not in (None, batch):
        raise ConfigError(
            f"engine {runner.name} can't run batches of this size",
            expected="at least 1" if fixed is None else fixed,
            got=batch,
            hint=None if fixed is None else f"Measure with --batch {fixed}, or export with --batch dynamic.",
        )
    shape = (batch, *runner.io.input_shape[1:])
    rng = np.random.default_rng(_SEED)
    if runner.io.takes_pixels:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.uniform(-2, 2, shape).astype(np.float32)
