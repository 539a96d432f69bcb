"""What training knows after an epoch, in a file, so that it can go on after an interruption."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from eamdeploy.artifacts.card import FreezingCost, RecoveredLayer, TrainedEpoch
from eamdeploy.artifacts.files import atomic_output, is_file
from eamdeploy.recovery.solving import Solved

Tensors: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Training after some epochs.

    Attributes:
        before: the cost of the frozen model.
        best_cost: that of the best model so far.
        layers: what was solved before training, by the path of the layer.
        start: the weights that were solved, by their names in timm's state dict: what training begins with.
        epochs: what each did.
        best: the tensors of the best averaged student; None while none is better than the start.
        best_epoch: that student's, from 1; 0 where there is none.
        student: whatever the student needs to go on; None before the first epoch.
    """

    before: FreezingCost
    best_cost: FreezingCost
    layers: Mapping[str, RecoveredLayer]
    start: Tensors
    epochs: tuple[TrainedEpoch, ...] = ()
    best: Tensors | None = None
    best_epoch: int = 0
    student: Mapping[str, Any] | None = None

    @classmethod
    def begun(cls, solved: Solved) -> TrainingState:
        """Training that has yet to begin, with these layers."""
        start = {key: torch.from_numpy(weight) for key, weight in solved.weights.items()}
        return cls(solved.before, solved.after, solved.layers, start)

    @property
    def done(self) -> int:
        """Epochs."""
        return len(self.epochs)

    def after_epoch(
        self, loss: float, cost: FreezingCost, average: Tensors, student: Mapping[str, Any]
    ) -> TrainingState:
        """The state one epoch later.

        Args:
            loss: the epoch's mean.
            cost: of the averaged student, whose tensors are `average`.
            student: what it needs to go on.
        """
        epochs = (*self.epochs, TrainedEpoch(loss=loss, kl=cost.kl, agreement=cost.agreement))
        then = replace(self, epochs=epochs, student=student)
        if not self._is_best(cost):
            return then
        best = {name: tensor.detach().cpu().clone() for name, tensor in average.items()}
        return replace(then, best=best, best_epoch=len(epochs), best_cost=cost)

    def _is_best(self, cost: FreezingCost) -> bool:
        """Whether a model of that cost is better than all so far: by agreement, and where the images held back are too
        few to tell, which is within one standard error, by the KL divergence.
        """
        highest = max([self.best_cost.agreement, *(epoch.agreement for epoch in self.epochs)])
        error = _standard_error(highest, cost.n_images)
        if cost.agreement > self.best_cost.agreement + error:
            return True
        return cost.agreement >= highest - error and cost.kl < self.best_cost.kl

    def save(self, path: Path) -> None:
        """`path` holds the state, or what it held before.

        Raises:
            ConfigError: it can't be written.
        """
        plain = {
            "before": self.before.model_dump(),
            "best_cost": self.best_cost.model_dump(),
            "layers": {path: layer.model_dump() for path, layer in self.layers.items()},
            "start": dict(self.start),
            "epochs": [epoch.model_dump() for epoch in self.epochs],
            "best": self.best,
            "best_epoch": self.best_epoch,
            "student": self.student,
        }
        with atomic_output(path) as file:
            torch.save(plain, file)

    @classmethod
    def load(cls, path: Path) -> TrainingState | None:
        """The state in the file; None where there is none, or none that can be read. Tensors alone are unpickled."""
        if not is_file(path):
            return None
        try:
            plain = torch.load(path, map_location="cpu", weights_only=True)
            return cls(
                before=FreezingCost.model_validate(plain["before"]),
                best_cost=FreezingCost.model_validate(plain["best_cost"]),
                layers={path: RecoveredLayer.model_validate(layer) for path, layer in plain["layers"].items()},
                start=plain["start"],
                epochs=tuple(map(TrainedEpoch.model_validate, plain["epochs"])),
                best=plain["best"],
                best_epoch=plain["best_epoch"],
                student=plain["student"],
            )
        except Exception:  # noqa: BLE001 - a damaged file, whatever torch finds wrong with it
            return None


def _standard_error(percent: float, count: int) -> float:
    """Of a share of `count` images, in percent; with one more image of each kind, so that it is never 0."""
    share = (percent / 100 * count + 1) / (count + 2)
    return 100 * math.sqrt(share * (1 - share) / count)
