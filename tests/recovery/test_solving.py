from __future__ import annotations

import copy
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import FAMILY, SWIN_FAMILY, images, make_member, make_model

from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.host.attention import Constants, attention_sites, freeze_attention, halves, steps
from eamdeploy.host.model import to_numpy
from eamdeploy.recovery.solving import Solved, solve
from eamdeploy.recovery.spool import Spool

KINDS = [*FAMILY, *SWIN_FAMILY]
SOME = ["vit", "no qkv bias", "deit-3", "swin", "swin, padded", "swin, oblong windows"]


def batches(model: Any, n: int, size: int, held: Sequence[int]) -> Iterator[tuple[torch.Tensor, list[bool]]]:
    """`n` images in batches of `size`, those with the numbers `held` held back."""
    every = images(n, model.patch_embed.img_size)
    for start in range(0, n, size):
        numbers = range(start, min(start + size, n))
        yield every[start : start + size], [number in held for number in numbers]


def recovered(teacher: Any, student: Any, frozen: set[str], folder: Path, *, n: int = 24, size: int = 8) -> Solved:
    weights = to_numpy(copy.deepcopy(teacher))
    held = range(0, n, 4)
    return solve(teacher, student, attention_sites(teacher), frozen, weights, batches(teacher, n, size, held), folder)


def with_even_maps(model: Any, heads: Sequence[int] = (0, 1)) -> tuple[Any, set[str]]:
    """A copy in which the given heads of every module look evenly at all tokens."""
    student = copy.deepcopy(model)
    constants = {}
    for site in attention_sites(model):
        maps = torch.full((len(heads), site.tokens, site.tokens), 1 / site.tokens)
        windows = None if site.classes is None else (0,) * site.n_windows
        constants[site.path] = Constants(torch.tensor(heads), maps if windows is None else maps[:, None], None, windows)
    freeze_attention(student, constants)
    return student, set(constants)


@pytest.mark.parametrize("kind", KINDS)
def test_halves_are_the_blocks(kind: str) -> None:
    model = make_member(kind)
    seen: list[torch.Tensor] = []
    handle = steps(model)[0][1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        expected = model(images(2, model.patch_embed.img_size))
        x = seen[0]
        for _, half in halves(model):
            x = half.run(x)
        torch.testing.assert_close(model.forward_head(model.norm(x)), expected, rtol=0, atol=0)
    handle.remove()
    named = dict(model.named_modules())
    for path, half in halves(model):
        assert half.linear is None or half.linear is named[path]


@pytest.mark.parametrize("kind", SOME)
def test_the_arranged_change_of_a_layer_is_the_change_behind_it(kind: str) -> None:
    """What a layer adds to its outputs arrives behind the half where `arrange` looks for it."""
    model = make_member(kind)
    with torch.inference_mode():
        x = torch.randn(2, *first_input_shape(model))
        for _, half in halves(model)[:2]:
            assert half.linear is not None
            before = half.run(x)
            given: list[torch.Tensor] = []
            handle = half.linear.register_forward_pre_hook(lambda _, inputs, given=given: given.append(inputs[0]))
            change = torch.randn_like(half.linear.weight) * 0.01
            half.linear.weight += change
            after = half.run(x)
            half.linear.weight -= change
            handle.remove()
            scale = 1 if half.scale is None else half.scale
            inside = half.arrange(torch.ones_like(after))
            torch.testing.assert_close(
                half.arrange(after - before), scale * (given[0] @ change.T) * inside, rtol=1e-3, atol=1e-5
            )


def first_input_shape(model: Any) -> torch.Size:
    seen: list[torch.Tensor] = []
    handle = steps(model)[0][1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images(1, model.patch_embed.img_size))
    handle.remove()
    return seen[0].shape[1:]


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("layer", ["attn.proj", "mlp.fc2"])
def test_a_layer_whose_solution_is_known_is_found(kind: str, layer: str, tmp_path: Path) -> None:
    """The student is the teacher with another matrix in one layer."""
    teacher = make_member(kind)
    student = copy.deepcopy(teacher)
    block = steps(teacher)[0][0]
    with torch.no_grad():
        spoiled = student.get_submodule(f"{block}.{layer}")
        spoiled.weight += 0.05 * torch.randn_like(spoiled.weight)
        if spoiled.bias is not None:
            spoiled.bias += 0.1
    weights = to_numpy(copy.deepcopy(student))
    sites = attention_sites(teacher)
    found = solve(
        teacher, student, sites, {f"{block}.attn"}, weights, batches(teacher, 48, 8, range(0, 48, 4)), tmp_path
    )
    assert found.layers[f"{block}.{layer}"].changed
    assert found.before.kl > 1e-4 and found.after.kl < found.before.kl / 100
    name = f"{block}.{layer}.weight"
    wanted = teacher.state_dict()[name].numpy()
    error = np.abs(found.weights[name] - wanted).mean()
    assert error < 0.1 * np.abs(weights[name] - wanted).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_recovery_is_never_worse_on_the_images_held_back(kind: str, tmp_path: Path) -> None:
    teacher = make_member(kind)
    student, frozen = with_even_maps(teacher)
    before = copy.deepcopy(teacher.state_dict())
    found = recovered(teacher, student, frozen, tmp_path)
    costs = [found.before.kl, *(layer.kl for layer in found.layers.values())]
    assert all(later <= earlier for earlier, later in pairwise(costs))
    assert found.after.kl == costs[-1] < found.before.kl, "two heads of each module are frozen"
    changed = {name for name, layer in found.layers.items() if layer.changed}
    assert {name.rpartition(".")[0] for name in found.weights} == changed
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items()), "the teacher stays"
    assert list(tmp_path.iterdir()) == []


def test_what_was_measured_is_what_the_new_weights_do(tmp_path: Path) -> None:
    teacher = make_member("vit")
    student, frozen = with_even_maps(teacher)
    found = recovered(teacher, student, frozen, tmp_path)
    other = make_member("vit")
    other.load_state_dict({**other.state_dict(), **{k: torch.from_numpy(v) for k, v in found.weights.items()}})
    other, _ = with_even_maps(other)
    held = images(24, 32)[::4]
    with torch.inference_mode():
        expected, got, ours = (model(held).double().log_softmax(1) for model in (teacher, other, student))
    kl = (expected.exp() * (expected - got)).sum(1).mean()
    assert kl.item() == pytest.approx(found.after.kl, rel=1e-3)
    torch.testing.assert_close(got, ours)


def test_the_size_of_batches_does_not_matter(tmp_path: Path) -> None:
    teacher = make_member("vit")
    results = []
    for size in (3, 24):
        student, frozen = with_even_maps(teacher)
        results.append(recovered(teacher, student, frozen, tmp_path, size=size))
    small, large = results
    assert small.weights.keys() == large.weights.keys()
    for key, value in small.weights.items():
        np.testing.assert_allclose(value, large.weights[key], rtol=1e-3, atol=1e-4)


def test_only_what_is_behind_frozen_maps_is_tried(tmp_path: Path) -> None:
    teacher = make_model(changes={"depth": 3})
    student = copy.deepcopy(teacher)
    freeze_attention(student, {"blocks.1.attn": Constants(torch.tensor([0]), torch.full((1, 17, 17), 1 / 17))})
    found = recovered(teacher, student, {"blocks.1.attn"}, tmp_path)
    assert [name.partition(".attn")[0].partition(".mlp")[0] for name in found.layers] == [
        *("blocks.1", "blocks.1"),
        *("blocks.2", "blocks.2"),
    ]


def test_values_that_are_no_numbers_name_the_layer(tmp_path: Path) -> None:
    teacher = make_member("vit")
    student, frozen = with_even_maps(teacher)
    with torch.no_grad():
        student.blocks[1].mlp.fc1.bias.fill_(3e38)
        student.blocks[1].mlp.fc2.weight.fill_(3e38)
    with pytest.raises(CheckpointError, match="not finite"):
        recovered(teacher, student, frozen, tmp_path)


def test_a_spool_gives_back_what_it_got(tmp_path: Path) -> None:
    tensors = [torch.randn(shape) for shape in ((2, 3, 4), (1, 3, 4), (2, 2, 5, 4))]
    with Spool(tmp_path) as kept:
        for tensor in tensors:
            kept.append(tensor.transpose(1, 2))
        for _ in range(2):
            for tensor, got in zip(tensors, kept, strict=True):
                assert torch.equal(got, tensor.transpose(1, 2))
        assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_a_spool_holds_one_tensor_in_memory(tmp_path: Path) -> None:
    one = torch.zeros(64, 1024)
    with Spool(tmp_path) as kept:
        for _ in range(32):
            kept.append(one)
        tracemalloc.start()
        for _ in kept:
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 * one.nbytes


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("r+b", buffering=0) as full:
        monkeypatch.setattr("eamdeploy.recovery.spool.tempfile.TemporaryFile", lambda **_: full)
        with Spool(tmp_path) as kept, pytest.raises(ConfigError, match="No space left"):
            kept.append(torch.zeros(4))
    with pytest.raises(ConfigError, match="cannot keep activations"):
        monkeypatch.undo()
        Spool(tmp_path / "nowhere")
