"""What training knows after an epoch, in a file, so that it can go on after an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch

from eamdeploy.artifacts.card import FreezingCost, TrainedEpoch
from eamdeploy.artifacts.files import atomic_output, is_file

Tensors: TypeAlias = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Training after some epochs.

    Attributes:
        before: the cost of the frozen model that training began with.
        epochs: what each did.
        best: the tensors of the best averaged student; None while none is better than the frozen model.
        best_epoch, best_cost: that student's; 0 and `before` where there is none.
        student: whatever the student needs to go on; None before the first epoch.
    """

    before: FreezingCost
    best_cost: FreezingCost
    epochs: tuple[TrainedEpoch, ...] = ()
    best: Tensors | None = None
    best_epoch: int = 0
    student: Mapping[str, Any] | None = None

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
        if (cost.agreement, -cost.kl) <= (self.best_cost.agreement, -self.best_cost.kl):
            return then
        best = {name: tensor.detach().cpu().clone() for name, tensor in average.items()}
        return replace(then, best=best, best_epoch=len(epochs), best_cost=cost)

    def save(self, path: Path) -> None:
        """`path` holds the state, or what it held before.

        Raises:
            ConfigError: it can't be written.
        """
        plain = {
            "before": self.before.model_dump(),
            "best_cost": self.best_cost.model_dump(),
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
                epochs=tuple(map(TrainedEpoch.model_validate, plain["epochs"])),
                best=plain["best"],
                best_epoch=plain["best_epoch"],
                student=plain["student"],
            )
        except Exception:  # noqa: BLE001 - a damaged file, whatever torch finds wrong with it
            return None
