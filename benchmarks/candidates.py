"""What takes part in the comparison: a plan for each row, made into an engine once, or skipped with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from floor import Arithmetic
from numpy.typing import NDArray
from study import Study

from eamdeploy.devices.provenance import usable_cores
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import MissingDependency
from eamdeploy.parity.accuracy import Predict
from eamdeploy.profiling.timing import Call

Family = Literal["peer", "ours"]
Runtime = Literal["onnxruntime", "openvino", "torch"]
Open: TypeAlias = Callable[[int, int], AbstractContextManager[Predict]]
"""Loads an engine for a number of threads and batches of exactly that many images."""


@dataclass(frozen=True)
class Engine:
    """What was made.

    Attributes:
        folder: the engine's own.
        files: what one would ship.
        graph: ONNX model with the products that it computes.
        note: what a reader of the row should know.
    """

    folder: Path
    files: tuple[Path, ...]
    graph: Path
    open: Open
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """A row of the comparison.

    Attributes:
        name: unique.
        runtime, arithmetic: of its products; the peers that have both in common with an engine of ours are its like.
        make: the engine, made or found in the study's folder.
        unfrozen: name of the same engine with nothing frozen; None for peers, and for that engine itself.
        is_stock: whether it may be the baseline.
    """

    name: str
    family: Family
    runtime: Runtime
    arithmetic: Arithmetic
    make: Callable[[Study], Engine]
    unfrozen: str | None = None
    is_stock: bool = False


@dataclass(frozen=True)
class Candidate:
    """An engine that runs.

    Attributes:
        logits: what it says of the study's images, given one by one, float32 [N, classes].
    """

    plan: Plan
    engine: Engine
    logits: NDArray[np.float32]

    @property
    def model_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.engine.files)

    @contextmanager
    def load(self, threads: int, images: NDArray[np.float32]) -> Iterator[Call]:
        """Inside the block, the engine is loaded, and the call runs it on the images."""
        with self.engine.open(threads, len(images)) as predict:
            yield partial(predict, images)


@dataclass(frozen=True)
class Skipped:
    """A row without figures, and why it has none."""

    plan: Plan
    reason: str


def make(plan: Plan, study: Study) -> Candidate | Skipped:
    """The plan's engine with what it says of the images.

    Raises:
        Exception: an engine of ours can't be made or run; a peer that can't is skipped, and what needs a package that
            is not here.
    """
    try:
        engine = plan.make(study)
        with engine.open(usable_cores(), 1) as predict:
            return Candidate(plan, engine, study.logits(predict, engine.folder, 1))
    except MissingDependency as err:
        return Skipped(plan, str(err))
    except Exception as err:  # every peer has its own kinds
        if plan.family == "ours":
            raise
        return Skipped(plan, str(err).partition("\n")[0] or type(err).__name__)


@contextmanager
def open_onnx(engine: Path, threads: int, _batch: int) -> Iterator[Predict]:
    """ONNX Runtime with the settings in the manifest beside the file, or with its own defaults where there is none."""
    with open_runner(engine, threads) as runner:
        yield runner.infer
