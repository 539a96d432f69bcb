from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from head_costs import sensitivity
from numpy.typing import NDArray
from tiny_models import FAMILY, SWIN_FAMILY, SWIN_NAME, images, make_member, make_model
from torch.nn import functional

from eamdeploy.host.attention import Constants, attention_sites, freeze_attention
from eamdeploy.host.sensitivity import head_effects
from eamdeploy.host.sites import window_maps
from eamdeploy.parity.accuracy import kl_divergence
from eamdeploy.vocabulary import WindowMaps

BATCHES = [images(4, seed=1), images(3, seed=2)]


def batches_for(model: Any) -> list[torch.Tensor]:
    return [images(n, tuple(model.patch_embed.img_size), seed) for n, seed in ((4, 1), (3, 2))]


def maps_of(model: Any, mode: WindowMaps = "shared", seed: int = 4) -> dict[str, NDArray[np.float32]]:
    """Random maps, [H, N, N] or [H, M, N, N]."""
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for site in attention_sites(model):
        used = window_maps(site, mode)
        shape = (site.heads, *([] if used is None else [max(used) + 1]), site.tokens, site.tokens)
        maps[site.path] = functional.softmax(torch.randn(shape, generator=generator) * 2, dim=-1).numpy()
    return maps


def silent(*_: object) -> None:
    pass


def brute_force(
    kind: str, dtype: torch.dtype, path: str, head: int, frozen: NDArray[np.floating], mode: WindowMaps
) -> float:
    """Freeze one head of a fresh model and run all of it."""
    live, changed = make_member(kind).to(dtype), make_member(kind).to(dtype)
    (site,) = (site for site in attention_sites(live) if site.path == path)
    maps = torch.from_numpy(frozen[head : head + 1])
    freeze_attention(changed, {path: Constants(torch.tensor([head]), maps, None, window_maps(site, mode))})
    batch = torch.cat(batches_for(live)).to(dtype)
    with torch.inference_mode():
        return float(kl_divergence(live(batch).numpy(), changed(batch).numpy()).mean())


CASES: list[tuple[str, WindowMaps]] = [
    *((kind, "shared") for kind in FAMILY),
    *((kind, "class") for kind in SWIN_FAMILY),
    ("swin, more windows than classes", "shared"),
    ("swin, padded", "window"),
]


@pytest.mark.parametrize(("kind", "mode"), CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 5e-4)], ids=["float64", "float32"]
)
def test_sensitivity_is_what_freezing_each_head_costs(
    kind: str, mode: WindowMaps, dtype: torch.dtype, tolerance: float
) -> None:
    model = make_member(kind).to(dtype)
    sites = attention_sites(model)
    maps: Any = {path: torch.from_numpy(value).to(dtype).numpy() for path, value in maps_of(model, mode).items()}
    batches = [batch.to(dtype) for batch in batches_for(model)]
    scores = sensitivity(model, sites, maps, batches, 7, silent, windows=mode)
    assert list(scores) == [site.path for site in sites]
    for site in sites:
        values = scores[site.path]
        assert values.shape == (site.heads,) and values.dtype == np.float64
        wanted = [brute_force(kind, dtype, site.path, head, maps[site.path], mode) for head in range(site.heads)]
        # one of a Swin's windows weighs little in its pooled tokens, and float32 rounds its logits
        rounding = 1e-6 if kind in SWIN_FAMILY and dtype == torch.float32 else 0
        np.testing.assert_allclose(values, wanted, rtol=tolerance, atol=rounding)
        assert min(wanted) > (1e-3 if kind in FAMILY else 1e-5), "too small to tell right from wrong"


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


def test_progress_of_swin_counts_the_merging_of_patches_too() -> None:
    model = make_model(SWIN_NAME)
    calls: list[tuple[int, int, float]] = []
    sensitivity(model, attention_sites(model), maps_of(model), BATCHES, 7, lambda *call: calls.append(call))
    # block, block, merging, block, block: 2 heads in each of the first two, 4 in the others
    assert calls[-1][:2] == (7 * (5 + 2 * 5 + 2 * 4 + 4 * 2 + 4 * 1),) * 2


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", SWIN_NAME])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = make_model(name)
    before_modules = [str(module) for module in model.modules()]
    with torch.inference_mode():
        before = model(BATCHES[0])
        sensitivity(model, attention_sites(model), maps_of(model), BATCHES, 7, silent)
        assert torch.equal(model(BATCHES[0]), before)
    assert [str(module) for module in model.modules()] == before_modules
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["vit", "distilled", "swin"])
def test_two_heads_at_once_cost_what_their_pair_says(kind: str) -> None:
    """With a weak classifier all changes are small, and heads of one module change its output independently."""
    model = make_member(kind).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head"):
                parameter.mul_(1e-2)
    sites = attention_sites(model)
    maps: Any = {path: torch.from_numpy(value).double().numpy() for path, value in maps_of(model).items()}
    batches = [batch.double() for batch in batches_for(model)]
    effects = head_effects(model, sites, maps, ((batch, [1.0] * len(batch)) for batch in batches), 7, silent)
    last = sites[-1]
    first = sum(site.heads for site in sites[:-1])
    both = {
        last.path: Constants(
            torch.tensor([0, 1]), torch.from_numpy(maps[last.path][:2]), None, window_maps(last, "shared")
        )
    }
    with torch.inference_mode():
        live = model(torch.cat(batches)).numpy()
        freeze_attention(model, both)
        measured = kl_divergence(live, model(torch.cat(batches)).numpy()).mean()
    pair = effects.covariance[first, first + 1] / 7
    assert abs(pair) > 1e-10, "too small to tell right from wrong"
    assert measured == pytest.approx(effects.alone[first] + effects.alone[first + 1] + 2 * pair, rel=0.05)
