"""The model that learns in `recovery.distilling`: one step of training, and what a checkpoint has of it.

One step is one of Adam on

    KL(teacher ‖ student) + 10 · mean over the blocks of ‖student − teacher‖² / ‖teacher‖²

where the norms are those of what a block gives for an image. The rate rises over the first tenth of the steps and falls
to 0 along a cosine. The moving average follows the student with a delay of an epoch's steps, of at most 100.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from eamdeploy.eam.checkpoint import Checkpoint, FrozenFactors, FrozenMaps
from eamdeploy.eam.recovery import RecoverOptions
from eamdeploy.host.attention import put_attention
from eamdeploy.host.reference import load_reference
from eamdeploy.recovery.difference import step_outputs
from eamdeploy.recovery.learning import LearningAttention
from eamdeploy.recovery.processes import Processes

_WEIGHT_OF_BLOCKS: Final = 10  # of what blocks give, against the logits
_WARM_UP: Final = 0.1
_LONGEST_DELAY: Final = 100


class Student:
    """A frozen model whose weights, maps and factors learn.

    Args:
        frozen: what it starts as.
        options: with the rates.
        total: steps of the whole training.
        per_epoch: steps of one epoch.
        where: what errors call the checkpoint.
    """

    def __init__(
        self, frozen: Checkpoint, options: RecoverOptions, total: int, per_epoch: int, processes: Processes, where: str
    ) -> None:
        self._frozen, self._options, self._processes, self._total = frozen, options, processes, total
        self.steps = 0
        model = load_reference(frozen, frozen=False, where=where).model
        freezing = frozen.header.freezing
        for path in freezing.heads:
            attention = LearningAttention(
                model.get_submodule(path),
                frozen.frozen.get(path),
                frozen.factors.get(path, ()),
                frozen.header.attention[path],
                freezing.bits,
                freezing.quantizer,
            )
            put_attention(model, path, attention)
        self._model = model.to(processes.device)
        delay = min(per_epoch, _LONGEST_DELAY)
        follow = get_ema_multi_avg_fn(1 - 1 / (1 + delay))  # type: ignore[no-untyped-call]
        self._average = AveragedModel(model, multi_avg_fn=follow)
        maps = [each for name, each in model.named_parameters() if name.endswith(".logits")]
        weights = [each for name, each in model.named_parameters() if not name.endswith(".logits")]
        self._optimizer = torch.optim.Adam([{"params": weights}, {"params": maps}])

    def learn(self, teacher: nn.Module, views: torch.Tensor, size: int) -> float:
        """One step on this process's share `views` `[B, 3, H, W]` of a batch of `size`; the loss of the whole batch."""
        views = views.to(self._processes.device)
        with torch.no_grad(), step_outputs(teacher) as wanted:
            answers = teacher(views)
        with step_outputs(self._model) as got:
            found = self._model(views)
        inside = [_distance(*each) for each in zip(wanted[:-1], got[:-1], strict=True)]  # the logits speak for the last
        distance = torch.stack(inside).mean(dim=0).sum() if inside else 0
        loss = (_divergence(answers, found) + _WEIGHT_OF_BLOCKS * distance) / size
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        total = loss.detach().clone()
        learning = [each.grad for group in self._optimizer.param_groups for each in group["params"]]
        self._processes.add_up([total, *(each for each in learning if each is not None)])
        if math.isfinite(total):
            for group, rate in zip(
                self._optimizer.param_groups, (self._options.learning_rate, self._options.maps_rate), strict=True
            ):
                group["lr"] = rate * _share(self.steps, self._total)
            self._optimizer.step()
            self._average.update_parameters(self._model)
        self.steps += 1
        return float(total)

    def average(self) -> Mapping[str, torch.Tensor]:
        """The tensors of the moving average."""
        state: Mapping[str, torch.Tensor] = self._average.module.state_dict()
        return state

    def checkpoint(self, average: Mapping[str, torch.Tensor] | None = None) -> Checkpoint:
        """The moving average, or tensors that it had once, with weights of the types that they had."""
        if average is not None:
            self._average.module.load_state_dict(average)
        tensors = self.average()
        maps: dict[str, FrozenMaps] = {}
        factors: dict[str, tuple[FrozenFactors, ...]] = {}
        weights = dict(self._frozen.weights)
        for path in self._frozen.header.freezing.heads:
            own_maps, own_factors = _learning(self._average.module, path).stored()
            _learning(self._model, path).stored()  # from now on it quantizes its rows as they are by now
            maps |= {} if own_maps is None else {path: own_maps}
            factors |= {path: own_factors} if own_factors else {}
        for key, value in weights.items():
            weights[key] = tensors[self._learnt_name(key)].cpu().numpy().astype(value.dtype)
        return replace(self._frozen, weights=weights, frozen=maps, factors=factors)

    def _learnt_name(self, key: str) -> str:
        """What the student calls the tensor `key` of timm's state dict."""
        path = next((path for path in self._frozen.header.freezing.heads if key.startswith(f"{path}.")), None)
        return key if path is None else f"{path}.attention{key.removeprefix(path)}"

    def state(self) -> dict[str, Any]:
        """All that `restore` needs."""
        return {
            "steps": self.steps,
            "model": self._model.state_dict(),
            "average": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The student is what it was when `state` was taken."""
        self.steps = state["steps"]
        self._model.load_state_dict(state["model"])
        self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])


def _learning(model: nn.Module, path: str) -> LearningAttention:
    found = model.get_submodule(path)
    assert isinstance(found, LearningAttention)
    return found


def _share(step: int, total: int) -> float:
    """Which share of the largest rate a step has, in [0, 1]."""
    rising = (step + 1) / max(1.0, _WARM_UP * total)
    return min(1.0, rising) * 0.5 * (1 + math.cos(math.pi * step / total))


def _divergence(wanted: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """Sum over the images of KL(softmax(wanted) ‖ softmax(got)), in nats."""
    expected, found = (each.log_softmax(dim=1) for each in (wanted, got))
    return functional.kl_div(found, expected, log_target=True, reduction="sum")


def _distance(wanted: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """‖got − wanted‖² / ‖wanted‖² of every image, `[B]`."""
    error, norm = (each.flatten(1).square().sum(dim=1) for each in (got - wanted, wanted))
    return error / norm.clamp_min(torch.finfo(norm.dtype).tiny)
