"""Which of several checked models is kept, and what a file keeps of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eamdeploy.artifacts.card import FreezingCost, RecoveredLayer
from eamdeploy.recovery.training_state import TrainingState


def cost(agreement: float, kl: float, n_images: int = 100) -> FreezingCost:
    return FreezingCost(n_images=n_images, kl=kl, agreement=agreement)


def after(start: FreezingCost, *costs: FreezingCost) -> TrainingState:
    state = TrainingState(start, start, {}, {})
    for number, each in enumerate(costs):
        state = state.after_epoch(1.0, each, {"w": torch.tensor(float(number))}, {"steps": number})
    return state


@pytest.mark.parametrize(
    ("costs", "kept"),
    [
        ([cost(90, 0.2)], 1),
        ([cost(70, 0.01)], 0),  # much less agreement, whatever the divergence
        ([cost(79, 0.19)], 1),  # within the standard error of 4 points: the divergence decides
        ([cost(79, 0.21)], 0),
        ([cost(90, 0.2), cost(87.5, 0.1), cost(84, 0.05)], 2),  # 84 is out of what the highest allows
        ([cost(81, 0.19), cost(82, 0.18), cost(82, 0.18)], 2),
    ],
)
def test_agreement_decides_as_far_as_the_images_can_tell(costs: list[FreezingCost], kept: int) -> None:
    state = after(cost(80, 0.2), *costs)
    assert state.best_epoch == kept and state.done == len(costs)
    assert state.best_cost == [cost(80, 0.2), *costs][kept]
    assert (state.best is None) == (kept == 0)
    if state.best is not None:
        assert state.best["w"] == kept - 1


def test_more_images_tell_more() -> None:
    worse = cost(79, 0.19, 10_000)
    assert after(cost(80, 0.2, 10_000), worse).best_epoch == 0
    assert after(cost(100, 0.2, 5), cost(100, 0.1, 5)).best_epoch == 1, "the highest agreement has an error too"


def test_a_file_keeps_everything(tmp_path: Path) -> None:
    layers = {"blocks.0.attn.proj": RecoveredLayer(strength=0.1, changed=True, kl=0.2)}
    state = TrainingState(cost(80, 0.2), cost(80, 0.2), layers, {"w": torch.ones(2)})
    state = state.after_epoch(1.5, cost(90, 0.1), {"w": torch.zeros(2)}, {"steps": 7, "model": {"w": torch.ones(1)}})
    state.save(tmp_path / "state")
    found = TrainingState.load(tmp_path / "state")
    assert found is not None
    assert (found.before, found.best_cost, found.layers) == (state.before, state.best_cost, layers)
    assert (found.epochs, found.best_epoch) == (state.epochs, 1)
    assert found.best is not None and torch.equal(found.best["w"], torch.zeros(2))
    assert torch.equal(found.start["w"], torch.ones(2))
    assert found.student is not None and found.student["steps"] == 7


@pytest.mark.parametrize("damage", [b"", b"no state", None])
def test_no_state_can_be_read_from_anything_else(tmp_path: Path, damage: bytes | None) -> None:
    if damage is not None:
        (tmp_path / "state").write_bytes(damage)
    assert TrainingState.load(tmp_path / "state") is None
