"""Engines as calls that take turns: what `timing` and `power` are given to measure engines with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from eamdeploy.engines.registry import open_runners
from eamdeploy.engines.runner import Runner
from eamdeploy.profiling.inputs import random_images
from eamdeploy.profiling.timing import Call, Open


def taking_turns(opening: Sequence[Callable[[], Runner]], batch: int | None = None) -> Open:
    """What loads the engines, and yields one call for each: an inference of the same random images.

    Args:
        opening: what opens each engine.
        batch: images of one inference; None for an engine's fixed batch, or one image where its batch is free.

    Raises:
        ConfigError: on loading, when an engine does not take batches of this size.
    """

    def images_of(runner: Runner) -> int:
        return (runner.io.batch or 1) if batch is None else batch

    @contextmanager
    def load(order: Sequence[int]) -> Iterator[list[Call]]:
        with open_runners(opening, order) as runners:
            yield [partial(runner.infer, random_images(runner, images_of(runner))) for runner in runners]

    return load
