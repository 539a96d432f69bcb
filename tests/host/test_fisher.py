from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from head_costs import sensitivity
from numpy.typing import NDArray
from tiny_models import SWIN_NAME, images, make_member, make_model

from eamdeploy.host.attention import Constants, attention_sites, freeze_attention, tapped_maps
from eamdeploy.host.calibrate import collect_statistics
from eamdeploy.host.fisher import fisher_sensitivity
from eamdeploy.host.means import mean_maps
from eamdeploy.host.sites import by_window, window_maps
from eamdeploy.parity.accuracy import kl_divergence
from eamdeploy.vocabulary import Granularity, WindowMaps

KINDS: list[tuple[str, WindowMaps]] = [("vit", "shared"), ("swin", "shared"), ("swin, padded", "class")]


def batches_for(model: Any, n: int = 6, seed: int = 1) -> list[torch.Tensor]:
    return list(images(n, tuple(model.patch_embed.img_size), seed).split(4))


def means_of(model: Any, mode: WindowMaps) -> dict[str, NDArray[np.float64]]:
    sites = attention_sites(model)
    statistics = collect_statistics(
        model, sites, batches_for(model, 16, 9), bins=2, spacing="uniform", windows=mode, on_images=lambda _: None
    )
    return {site.path: mean_maps(site, statistics[site.path]) for site in sites}


def estimate(
    model: Any, maps: Any, granularity: Granularity, mode: WindowMaps, batches: list[torch.Tensor], seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    return fisher_sensitivity(
        model, attention_sites(model), maps, batches, granularity, lambda _: None, windows=mode, seed=seed
    )


def with_small_logits(model: Any, factor: float) -> Any:
    """`model` with a classifier so weak that every change of the maps is a small one to the logits."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("head"):
                parameter.mul_(factor)
    return model


def repeated(image: torch.Tensor, n: int) -> list[torch.Tensor]:
    """Many copies of one image, so that the labels drawn for it average out."""
    return list(image.expand(n, -1, -1, -1).split(100))


def exact(model: Any, path: str, constants: Constants, batch: torch.Tensor) -> float:
    """The KL of the model with `constants` against itself."""
    with torch.inference_mode():
        live = model(batch)
        before = model.get_submodule(path)
        freeze_attention(model, {path: constants})
        changed = model(batch)
        setattr(model.get_submodule(path.rpartition(".")[0]), "attn", before)  # noqa: B010
    return float(kl_divergence(live.numpy(), changed.numpy()).mean())


@pytest.mark.parametrize("granularity", ["head", "row", "entry"])
@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_estimate_is_the_kl_of_small_changes(kind: str, mode: WindowMaps, granularity: Granularity) -> None:
    model = with_small_logits(make_member(kind), 0.2).double()
    (image,) = images(1, tuple(model.patch_embed.img_size), seed=3).double()
    own: dict[str, torch.Tensor] = {}
    sites = attention_sites(model)
    with torch.inference_mode(), tapped_maps(model, sites, lambda path, maps: own.update({path: maps})):
        model(image[None])
    # a small step from the image's own maps towards others
    other, near = means_of(make_member(kind), mode), {}
    for site in sites:
        live = own[site.path].transpose(0, 1).numpy()  # [H, W, N, N]
        near[site.path] = 0.97 * live + 0.03 * by_window(site, other[site.path], mode)
        if site.classes is None:
            near[site.path] = near[site.path][:, 0]
    estimated = estimate(model, near, granularity, "window", repeated(image, 1500))
    rng, pairs = np.random.default_rng(0), []
    for site in sites:
        scores = estimated[site.path]
        assert scores.shape == (site.heads, site.tokens, site.tokens)[: scores.ndim]
        assert scores.ndim == {"head": 1, "row": 2, "entry": 3}[granularity]
        for flat in rng.choice(scores.size, min(scores.size, 12), replace=False):
            head, *rest = (int(i) for i in np.unravel_index(flat, scores.shape))
            mask = np.zeros((1, *scores.shape[1:]), np.bool_)
            place = (0, *rest)
            mask[place] = True
            constants = Constants(
                torch.tensor([head]),
                torch.from_numpy(near[site.path][[head]]),
                None if granularity == "head" else torch.from_numpy(mask),
                window_maps(site, "window"),
            )
            measured = (head, *rest)
            pairs.append((scores[measured], exact(model, site.path, constants, image[None])))
    got, wanted = np.array(pairs).T
    large = wanted > 1e-3 * wanted.max()
    assert large.sum() >= 5
    # 1500 drawn labels: the mean of a chi-square with one degree of freedom is within 15 % of it, about 4 sigma
    np.testing.assert_allclose(got[large], wanted[large], rtol=0.2)
    assert (got[~large] < 2e-3 * wanted.max()).all()


@pytest.mark.parametrize(("kind", "mode"), KINDS)
def test_heads_are_ranked_as_the_exact_score_ranks_them(kind: str, mode: WindowMaps) -> None:
    model = make_member(kind)
    maps, batches = means_of(model, mode), batches_for(model, 96, 5)
    estimated = estimate(model, maps, "head", mode, batches)
    single = {path: values.astype(np.float32) for path, values in maps.items()}
    measured = sensitivity(model, attention_sites(model), single, batches, 96, lambda *_: None, windows=mode)
    ranks = [np.argsort(np.argsort(np.concatenate(list(each.values())))) for each in (estimated, measured)]
    correlation = np.atleast_2d(np.corrcoef(np.array(ranks)))
    assert correlation[0, 1] > 0.8


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", SWIN_NAME])
@pytest.mark.parametrize("granularity", ["row", "entry"])
def test_estimate_depends_on_images_and_seed_alone(name: str, granularity: Granularity) -> None:
    model = make_model(name)
    maps, batches = means_of(model, "shared"), batches_for(model)
    first = estimate(model, maps, granularity, "shared", batches)
    torch.manual_seed(5)
    again = estimate(model, maps, granularity, "shared", batches)
    one_by_one = estimate(model, maps, granularity, "shared", list(torch.cat(batches).split(1)))
    other = estimate(model, maps, granularity, "shared", batches, seed=1)
    for path, values in first.items():
        np.testing.assert_array_equal(again[path], values)
        np.testing.assert_allclose(one_by_one[path], values, rtol=1e-3, atol=1e-9)
        assert not np.allclose(other[path], values, rtol=1e-3)


def test_rows_that_nothing_reads_cost_nothing() -> None:
    model = make_model()
    scores = estimate(model, means_of(model, "shared"), "row", "shared", batches_for(model))
    assert (scores["blocks.1.attn"][:, 1:] == 0).all(), "only the class token of the last block is classified"
    assert (scores["blocks.1.attn"][:, 0] > 0).all() and (scores["blocks.0.attn"] > 0).all()


def test_a_map_that_is_frozen_to_itself_costs_nothing() -> None:
    model = make_model()
    with torch.no_grad():
        model.blocks[1].attn.qkv.weight[48:96] = 0  # no keys: every map of this layer is uniform
        model.blocks[1].attn.qkv.bias[48:96] = 0
    maps = {path: np.full((3, 17, 17), 1 / 17) for path in ("blocks.0.attn", "blocks.1.attn")}
    scores = estimate(model, maps, "head", "shared", batches_for(model))
    assert max(scores["blocks.1.attn"]) < 1e-12 < min(scores["blocks.0.attn"])


def test_progress_counts_images_and_the_model_is_left_as_it_was() -> None:
    model = make_model(SWIN_NAME)
    model.head.fc.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    modules = [str(module) for module in model.modules()]
    done: list[int] = []
    maps, batches = means_of(model, "shared"), batches_for(model)
    before = model(batches[0])
    fisher_sensitivity(model, attention_sites(model), maps, batches, "row", done.append)
    assert done == [4, 6]
    assert torch.equal(model(batches[0]), before)
    assert [str(module) for module in model.modules()] == modules
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
