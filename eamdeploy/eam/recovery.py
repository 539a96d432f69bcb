"""How a frozen model recovers: the section `[recover]` of a configuration, the options of `recover`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import ConfigDict, Field

from eamdeploy.errors import ConfigError
from eamdeploy.vocabulary import RECOVERY_METHODS, TRAINING_DEVICES, RecoveryMethod, TrainingDevice

_FEWEST_IMAGES = 2  # one to learn from, one to check on


@dataclass(frozen=True)
class RecoverOptions:
    """How to recover; each field's description is also the help of its option."""

    method: Annotated[
        RecoveryMethod,
        Field(
            description="solve: linear layers behind frozen maps in closed form, layer by layer, without training. "
            "distill: weights and frozen maps are trained."
        ),
    ] = "solve"
    held_back: Annotated[
        float, Field(description="Share of the images that only checks what was learnt from the others, in (0, 1).")
    ] = 0.2
    seed: Annotated[int, Field(description="Draws the images that are held back; for distill, order and crops.")] = 0
    epochs: Annotated[int, Field(description="distill: how often every image is seen.")] = 10
    batch: Annotated[int, Field(description="distill: images of one step, of all processes together.")] = 32
    learning_rate: Annotated[float, Field(description="distill: Adam's largest step of a weight.")] = 2e-5
    maps_rate: Annotated[
        float, Field(description="distill: Adam's largest step of the logarithm of a frozen entry.")
    ] = 5e-3
    device: Annotated[
        TrainingDevice, Field(description="distill: where to train; auto takes a GPU where there is one.")
    ] = "auto"

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


DEFAULT_RECOVERY = RecoverOptions()


def check_recovery(options: RecoverOptions) -> None:
    """`options` can be used.

    Raises:
        ConfigError: they can't.
    """
    if options.method not in RECOVERY_METHODS:
        raise ConfigError("unknown method of recovery", expected=", ".join(RECOVERY_METHODS), got=options.method)
    if options.device not in TRAINING_DEVICES:
        raise ConfigError("cannot train there", expected=", ".join(TRAINING_DEVICES), got=options.device)
    if not 0 < options.held_back < 1:
        raise ConfigError("the share of images held back", expected="between 0 and 1", got=options.held_back)
    for name, value, least in (("seed", options.seed, 0), ("epochs", options.epochs, 1), ("batch", options.batch, 1)):
        if value < least:
            raise ConfigError(f"{name} of recovery", expected=f"{least} or more", got=value)
    for name, rate in (("learning rate", options.learning_rate), ("rate of the maps", options.maps_rate)):
        if not 0 < rate < math.inf:
            raise ConfigError(f"the {name} of recovery", expected="a number above 0", got=rate)


def held_back_images(count: int, options: RecoverOptions) -> frozenset[int]:
    """The numbers of those of `count` images that are held back, drawn by the seed; at least one, and never all.

    Raises:
        ConfigError: there are fewer than two images.
    """
    if count < _FEWEST_IMAGES:
        raise ConfigError(
            "too few images to recover with",
            expected=f"at least {_FEWEST_IMAGES}: some to learn from, some to check on",
            got=count,
        )
    held = min(max(round(options.held_back * count), 1), count - 1)
    return frozenset(np.random.default_rng(options.seed).permutation(count)[:held].tolist())
