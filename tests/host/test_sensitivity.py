from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import FAMILY, images, make_member, make_model
from torch.nn import functional

from eamdeploy.accuracy import kl_divergence
from eamdeploy.host.attention import attention_sites, freeze_attention
from eamdeploy.host.sensitivity import sensitivity

BATCHES = [images(4, seed=1), images(3, seed=2)]


def maps_of(model: Any, seed: int = 4) -> dict[str, NDArray[np.float32]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        site.path: functional.softmax(
            torch.randn(site.heads, site.tokens, site.tokens, generator=generator) * 2, dim=-1
        ).numpy()
        for site in attention_sites(model)
    }


def silent(*_: object) -> None:
    pass


def brute_force(kind: str, dtype: torch.dtype, path: str, head: int, frozen: NDArray[np.floating]) -> float:
    """Freeze one head of a fresh model and run all of it."""
    live, changed = make_member(kind).to(dtype), make_member(kind).to(dtype)
    freeze_attention(changed, {path: (torch.tensor([head]), torch.from_numpy(frozen[head : head + 1]))})
    batch = torch.cat(BATCHES).to(dtype)
    with torch.inference_mode():
        return float(kl_divergence(live(batch).numpy(), changed(batch).numpy()).mean())


@pytest.mark.parametrize("kind", FAMILY)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 5e-4)], ids=["float64", "float32"]
)
def test_sensitivity_is_what_freezing_each_head_costs(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model = make_member(kind).to(dtype)
    maps: Any = {path: torch.from_numpy(value).to(dtype).numpy() for path, value in maps_of(model).items()}
    batches = [batch.to(dtype) for batch in BATCHES]
    scores = sensitivity(model, attention_sites(model), maps, batches, 7, silent)
    assert list(scores) == ["blocks.0.attn", "blocks.1.attn"]
    for path, values in scores.items():
        assert values.shape == (3,) and values.dtype == np.float64
        wanted = [brute_force(kind, dtype, path, head, maps[path]) for head in range(3)]
        np.testing.assert_allclose(values, wanted, rtol=tolerance)
        assert min(wanted) > 1e-3, "too small to tell right from wrong"


def test_a_frozen_map_that_equals_the_live_one_costs_nothing() -> None:
    model = make_model()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[48:96] = 0  # no keys: every map of this layer is uniform
        model.blocks[1].attn.qkv.bias[48:96] = 0
    maps = maps_of(model)
    maps["blocks.1.attn"] = np.full((3, 17, 17), 1 / 17, np.float32)
    scores = sensitivity(model, attention_sites(model), maps, BATCHES, 7, silent)
    assert max(scores["blocks.1.attn"]) < 1e-9 < min(scores["blocks.0.attn"])


def test_batches_do_not_matter() -> None:
    model = make_model()
    maps, sites = maps_of(model), attention_sites(model)
    whole = sensitivity(model, sites, maps, [torch.cat(BATCHES)], 7, silent)
    parts = sensitivity(model, sites, maps, [image[None] for image in torch.cat(BATCHES)], 7, silent)
    for path in whole:
        np.testing.assert_allclose(parts[path], whole[path], rtol=1e-4)


def test_progress_ends_at_its_total_and_never_goes_back() -> None:
    model = make_model(changes={"depth": 3})
    calls: list[tuple[int, int, float]] = []
    sensitivity(model, attention_sites(model), maps_of(model), BATCHES, 7, lambda *call: calls.append(call))
    done, totals, left = zip(*calls, strict=True)
    # blocks that run for one image: all 3 once, and for each of the 3 heads of a layer that one and those after it
    assert set(totals) == {7 * (3 + 3 * (3 + 2 + 1))}
    assert done[-1] == totals[0] and list(done) == sorted(set(done))
    assert len(calls) == 2 * 9
    assert all(seconds >= 0 for seconds in left) and left[-1] == 0


def test_the_model_is_left_as_it_was() -> None:
    model = make_model()
    with torch.inference_mode():
        before = model(BATCHES[0])
        sensitivity(model, attention_sites(model), maps_of(model), BATCHES, 7, silent)
        assert torch.equal(model(BATCHES[0]), before)
    assert not any(block._forward_pre_hooks for block in model.blocks)
