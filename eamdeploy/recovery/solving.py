"""A frozen model comes close to its unfrozen self again: linear layers are solved anew, one after the other.

    teacher   x ─▶ half a block: x + γ·L(f(x)) ─▶ …        all attention live
                                      │ e
    student   x ─▶ half a block: x + γ·L(f(x)) ─▶ …        frozen; everything in front is recovered already

Half a block ends in a linear layer L, whose output is added to what goes on. What the student lacks there is e, the
error of all that is frozen so far, and ridge regression of e on the inputs of L says how L changes (`eam.ridge`).
Images pass from half to half through files, so that memory holds one batch, whatever their number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eamdeploy.artifacts.card import FreezingCost, RecoveredLayer
from eamdeploy.eam.ridge import Correction, Products, best_correction
from eamdeploy.host.attention import halves, steps
from eamdeploy.host.sites import AttentionSite, Half
from eamdeploy.recovery.difference import cost_of, not_finite
from eamdeploy.recovery.shares import SharedBatch
from eamdeploy.recovery.spool import Spool

Weights: TypeAlias = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Solved:
    """What recovery found.

    Attributes:
        weights: the new weights, by their names in timm's state dict; those of changed layers only.
        layers: every layer that was tried, in the order of the work.
        before, after: what freezing costs on the images held back.
    """

    weights: Weights
    layers: dict[str, RecoveredLayer]
    before: FreezingCost
    after: FreezingCost


@dataclass(frozen=True)
class _Place:
    """Half a block, or what stands between two blocks, in both models.

    Attributes:
        name: the path of the linear layer at its end.
        alike: it is in front of everything frozen, so that both models do the same there.
        layer: that layer of the student, where it is to be solved anew.
        read: the tokens that anything behind it depends on; None for all.
    """

    name: str
    student: Half
    teacher: Half
    alike: bool
    layer: nn.Linear | None
    read: list[int] | None


@dataclass(frozen=True)
class _Stream:
    """Images in front of a place, in both models."""

    student: Spool
    teacher: Spool

    def close(self) -> None:
        self.student.close()
        self.teacher.close()


@torch.inference_mode()
def solve(
    teacher: Any,
    student: Any,
    sites: Sequence[AttentionSite],
    frozen: Collection[str],
    weights: Weights,
    batches: Iterable[SharedBatch],
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Solved:
    """`student` has new weights in linear layers behind its frozen maps, where they bring it closer to `teacher`.

    Args:
        teacher, student: the model with all attention live, and with frozen maps; the student's weights change.
        sites: the attention modules.
        frozen: the paths of those with frozen maps, at least one.
        weights: the state dict of both; new weights are of the same types.
        batches: normalized images, float32 `[B, 3, H, W]`, and which of them are held back; at least one is, and one
            is not.
        folder: where activations are kept meanwhile.
        on_progress: called with the places done and all places, after each.

    Raises:
        CheckpointError: values are not finite for these images; the layer is named.
        ConfigError: the disk is full.
    """
    places = _places(teacher, student, sites, frozen)
    fit, held = _embed(teacher, batches, folder)
    expected = _logits(teacher, [(place.name, place.teacher) for place in places], held.teacher)
    ours = [(place.name, place.student) for place in places]
    best = before = cost_of(expected, _logits(student, ours, held.student))
    layers: dict[str, RecoveredLayer] = {}
    changed: dict[str, NDArray[Any]] = {}
    for number, place in enumerate(places):
        if place.layer is None:
            then = [_pass(stream, place, folder) for stream in (fit, held)]
        else:
            learnt, checked = (Products(place.layer.in_features, place.layer.out_features) for _ in range(2))
            then = [_pass(fit, place, folder, learnt), _pass(held, place, folder, checked)]
            found = best_correction(learnt, checked, has_bias=place.layer.bias is not None)
            new = {} if found is None else _corrected(place, found, weights)
            cost = best
            if new:
                _set(place, new)
                cost = cost_of(expected, _logits(student, ours[number:], held.student))
            if cost.kl < best.kl:
                best = cost
                changed |= new
                then = [_pass_again(*each, place, folder) for each in zip((fit, held), then, strict=True)]
            else:
                _set(place, weights)
                new = {}
            strength = None if found is None else found.strength
            layers[place.name] = RecoveredLayer(strength=strength, changed=bool(new), kl=best.kl)
        fit.close()
        held.close()
        fit, held = then
        on_progress(number + 1, len(places))
    fit.close()
    held.close()
    return Solved(changed, layers, before, best)


# --- where --------------------------------------------------------------------------------------


def _places(teacher: Any, student: Any, sites: Sequence[AttentionSite], frozen: Collection[str]) -> list[_Place]:
    both = list(zip(halves(student), halves(teacher), strict=True))
    first = next(number for number, ((name, _), _) in enumerate(both) if name.removesuffix(".proj") in frozen)
    read = {site.path.removesuffix("attn"): site.read_tokens for site in sites if site.classes is None}
    return [
        _Place(
            name,
            half,
            live,
            number < first,
            None if number < first else half.linear,
            next((list(tokens) for block, tokens in read.items() if tokens and name.startswith(block)), None),
        )
        for number, ((name, half), (_, live)) in enumerate(both)
    ]


def _embed(model: Any, batches: Iterable[SharedBatch], folder: Path) -> tuple[_Stream, _Stream]:
    """The images in front of the first place: those to learn from, and those held back. Nothing is frozen there."""
    fit, held = _Stream(Spool(folder), Spool(folder)), _Stream(Spool(folder), Spool(folder))
    for images, is_held in batches:
        tokens, chosen = _first_input(model, images), torch.tensor(is_held)
        for stream, part in ((fit, tokens[~chosen]), (held, tokens[chosen])):
            if len(part):
                stream.student.append(part)
                stream.teacher.append(part)
    return fit, held


class _Reached(Exception):
    """The model has come to its first step, with this input."""

    def __init__(self, tokens: torch.Tensor) -> None:
        super().__init__()
        self.tokens = tokens


def _first_input(model: Any, images: torch.Tensor) -> torch.Tensor:
    def stop(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise _Reached(inputs[0])

    handle = steps(model)[0][1].register_forward_pre_hook(stop)
    try:
        model(images)
    except _Reached as reached:
        return reached.tokens
    finally:
        handle.remove()
    raise AssertionError("a model has steps")


# --- how images pass ----------------------------------------------------------------------------


def _pass(stream: _Stream, place: _Place, folder: Path, into: Products | None = None) -> _Stream:
    """The images behind `place`; what its layer was given, and what it lacks, is in the sums `into`."""
    then = _Stream(Spool(folder), Spool(folder))
    for ours, theirs in zip(stream.student, stream.teacher, strict=True):
        wanted = place.teacher.run(theirs)
        then.teacher.append(wanted)
        if place.layer is None or into is None:
            then.student.append(wanted if place.alike else place.student.run(ours))
            continue
        with _inputs_of(place.layer) as seen:
            reached = place.student.run(ours)
        then.student.append(reached)
        matters = torch.zeros_like(reached[..., :1])
        matters[:, slice(None) if place.read is None else place.read] = 1
        samples = (seen[0], place.student.arrange(wanted - reached), place.student.arrange(matters))
        inputs, errors, weights = (each.flatten(0, -2).numpy() for each in samples)
        into.add(inputs, errors, weights[:, 0])
    if into is not None and not into.is_finite:
        raise not_finite("the model", place.name)
    return then


def _pass_again(stream: _Stream, then: _Stream, place: _Place, folder: Path) -> _Stream:
    """As `then`, which is behind `place`, for its new layer."""
    anew = Spool(folder)
    for ours in stream.student:
        anew.append(place.student.run(ours))
    then.student.close()
    return _Stream(anew, then.teacher)


@contextmanager
def _inputs_of(layer: nn.Linear) -> Iterator[list[torch.Tensor]]:
    """Inside the block, whatever `layer` is given joins the list."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _logits(model: Any, rest: Sequence[tuple[str, Half]], inputs: Spool) -> NDArray[np.float32]:
    """What `model` answers, float32 `[B, classes]`, from the inputs of the first of its named halves in `rest` on.

    Raises:
        CheckpointError: values are not finite.
    """
    found = []
    for x in inputs:
        for name, half in rest:
            x = half.run(x)
            if not torch.isfinite(x).all():
                raise not_finite("the model", name)
        found.append(model.forward_head(model.norm(x)).numpy())
        if not np.isfinite(found[-1]).all():
            raise not_finite("the model", "the classifier")
    return np.concatenate(found)


# --- what changes -------------------------------------------------------------------------------


def _corrected(place: _Place, found: Correction, weights: Weights) -> dict[str, NDArray[Any]]:
    """The layer's new weight and bias, of the types that they had; γ of the half is divided out."""
    change = {f"{place.name}.weight": found.weight}
    if found.bias is not None:
        change[f"{place.name}.bias"] = found.bias
    if place.student.scale is not None:
        scale = place.student.scale.double().numpy()
        inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)
        change = {key: (value.T * inverse).T for key, value in change.items()}
    return {key: (weights[key] + value).astype(weights[key].dtype) for key, value in change.items()}


def _set(place: _Place, weights: Weights) -> None:
    """The layer has its weights of `weights`."""
    assert place.layer is not None
    for key, parameter in place.layer.named_parameters():
        parameter.copy_(torch.from_numpy(weights[f"{place.name}.{key}"]))
