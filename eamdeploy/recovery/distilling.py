"""A frozen model is trained to give what its unfrozen self gives: weights and frozen maps learn, labels do not matter.

    teacher   view ─▶ block ─▶ … ─▶ logits          all attention live; learns nothing
                        │ ‖·‖²         │ KL
    student   view ─▶ block ─▶ … ─▶ logits          frozen maps as they are deployed (`recovery.learning`)

The student begins with the layers that `recovery.solving` solved. What is checked and kept is its moving average. After
every epoch the average is written as a checkpoint's tensors, and the model of these tensors is compared with the
teacher on the images held back.
Sources: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Beyer et al., Knowledge distillation: A good
teacher is patient and consistent, 2022 (teacher and student see the same view).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eamdeploy.artifacts.card import FreezingCost, Training
from eamdeploy.eam.checkpoint import Checkpoint
from eamdeploy.eam.recovery import RecoverOptions
from eamdeploy.errors import ConfigError
from eamdeploy.host.reference import load_reference
from eamdeploy.observer import Observer
from eamdeploy.recovery.difference import answers, cost_of
from eamdeploy.recovery.processes import Processes
from eamdeploy.recovery.student import Student
from eamdeploy.recovery.training_images import TrainingImages
from eamdeploy.recovery.training_state import TrainingState


@dataclass(frozen=True, eq=False)
class Distilled:
    """The best of the models that were checked, the one that training began with among them.

    Attributes:
        checkpoint: with its weights, maps and factors, and the header of the frozen model.
        training: what was done.
        after: what freezing costs then, on the images held back.
    """

    checkpoint: Checkpoint
    training: Training
    after: FreezingCost


def distill(
    frozen: Checkpoint,
    state: TrainingState,
    images: TrainingImages,
    held_back: Iterable[torch.Tensor],
    options: RecoverOptions,
    processes: Processes,
    state_file: Path,
    where: str,
    observer: Observer,
) -> Distilled:
    """The frozen model, trained.

    Args:
        frozen: with the weights of the teacher.
        state: where training begins or goes on.
        images: to learn from.
        held_back: batches, normalized, float32 `[B, 3, H, W]`, read again after every epoch; only the first process
            reads them.
        state_file: keeps the state after each epoch.
        where: what errors call the checkpoint.

    Raises:
        ConfigError: images can't be shared among the processes, or the disk is full.
        CheckpointError: the model's answers are not finite.
    """
    size = _batch_size(options, len(images.files), processes)
    per_epoch = len(images.files) // size
    teacher = load_reference(frozen, frozen=False, where=where).model.to(processes.device).requires_grad_(False)
    start = replace(frozen, weights={**frozen.weights, **{key: each.numpy() for key, each in state.start.items()}})
    student = Student(start, options, options.epochs * per_epoch, per_epoch, processes, where)
    checker = _Checker(teacher, held_back, processes, where)
    if state.student is not None:
        student.restore(state.student)
        observer.note(f"training goes on after epoch {state.done} of {options.epochs}, from {state_file.name}")

    stopped = None
    for epoch in range(state.done, options.epochs):
        losses: list[float] = []
        for views in images.batches(epoch, size, processes.rank, processes.count):
            losses.append(student.learn(teacher, views, size))
            observer.progress("images learnt from", student.steps * size, options.epochs * per_epoch * size)
            if not math.isfinite(losses[-1]):
                stopped = f"the loss of step {student.steps} was {losses[-1]}"
                break
        if stopped is not None:
            kept = f"of epoch {state.best_epoch}" if state.best_epoch else "of before"
            observer.note(f"training diverged and was stopped: {stopped}; the model {kept} is kept")
            break
        cost = checker.cost(student.checkpoint())
        state = state.after_epoch(float(np.mean(losses)), cost, student.average(), student.state())
        observer.note(f"epoch {epoch + 1} of {options.epochs}: KL {cost.kl:.4f}, agreement {cost.agreement:.1f} %")
        if processes.is_first:
            state.save(state_file)

    training = Training(
        epochs_asked=options.epochs,
        batch=size,
        learning_rate=options.learning_rate,
        maps_rate=options.maps_rate,
        steps=student.steps,
        epochs=list(state.epochs),
        kept_epoch=state.best_epoch,
        stopped=stopped,
    )
    best = start if state.best is None else student.checkpoint(state.best)
    return Distilled(best, training, state.best_cost)


def _batch_size(options: RecoverOptions, images: int, processes: Processes) -> int:
    """Images of a step: as asked, or fewer where there are fewer, a multiple of the processes."""
    if options.batch % processes.count:
        raise ConfigError(
            "a batch can't be shared among the processes",
            expected=f"a multiple of {processes.count}",
            got=options.batch,
            hint="Choose another --batch, or another number of processes.",
        )
    size = min(options.batch, images) // processes.count * processes.count
    if size == 0:
        raise ConfigError(
            "too few images to train with", expected=f"at least {processes.count}, one for each process", got=images
        )
    return size


class _Checker:
    """Compares models with the teacher on the images held back, in the first process."""

    def __init__(self, teacher: Any, held_back: Iterable[torch.Tensor], processes: Processes, where: str) -> None:
        self._held_back, self._processes, self._where = held_back, processes, where
        self._expected = processes.from_first(lambda: self._answers(teacher))

    def cost(self, checkpoint: Checkpoint) -> FreezingCost:
        """Of the frozen model of `checkpoint`."""

        def work() -> FreezingCost:
            model = load_reference(checkpoint, frozen=True, where=self._where).model
            return cost_of(self._expected, self._answers(model.to(self._processes.device)))

        return self._processes.from_first(work)

    def _answers(self, model: Any) -> NDArray[np.float32]:
        return answers(model, self._held_back, self._processes.device, self._where)
