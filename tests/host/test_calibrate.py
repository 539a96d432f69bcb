from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import SWIN_NAME, images, make_member, make_model

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.eam.statistics import MapStatistics
from eamdeploy.host.attention import attention_sites, tapped_maps
from eamdeploy.host.calibrate import as_tensors, collect_statistics, predict
from eamdeploy.host.sites import window_maps
from eamdeploy.images.preprocess import ImageBatch, normalize
from eamdeploy.vocabulary import WindowMaps

BATCHES = [images(4, seed=1), images(3, seed=2), images(1, seed=3)]


def test_statistics_are_those_of_every_map_of_every_image() -> None:
    model = make_model()
    sites = attention_sites(model)
    seen: dict[str, list[torch.Tensor]] = {site.path: [] for site in sites}
    with torch.inference_mode(), tapped_maps(model, sites, lambda path, maps: seen[path].append(maps)):
        for batch in BATCHES:
            model(batch)
    done: list[int] = []
    got = collect_statistics(model, sites, iter(BATCHES), bins=5, spacing="squared", on_images=done.append)
    assert list(got) == ["blocks.0.attn", "blocks.1.attn"]
    assert done == [4, 7, 8]
    for path, maps in seen.items():
        wanted = MapStatistics((3, 17, 17), bins=5, spacing="squared")
        wanted.update(torch.cat(maps).numpy())
        (only,) = got[path]
        assert only.n_samples == 8 and only.bins == 5
        np.testing.assert_array_equal(only.histogram(), wanted.histogram())
        np.testing.assert_array_equal(only.mean(), wanted.mean())
        np.testing.assert_array_equal(only.row_entropy(), wanted.row_entropy())


@pytest.mark.parametrize("mode", ["shared", "class", "window"])
@pytest.mark.parametrize("kind", ["swin", "swin, more windows than classes", "swin, padded"])
def test_every_window_counts_to_the_map_that_stands_for_it(kind: str, mode: WindowMaps) -> None:
    model = make_member(kind)
    sites = attention_sites(model)
    batches = [images(n, tuple(model.patch_embed.img_size), seed=n) for n in (3, 2)]
    seen: dict[str, list[torch.Tensor]] = {site.path: [] for site in sites}
    with torch.inference_mode(), tapped_maps(model, sites, lambda path, maps: seen[path].append(maps)):
        for batch in batches:
            model(batch)
    got = collect_statistics(model, sites, batches, bins=4, spacing="uniform", windows=mode, on_images=lambda _: None)
    for site in sites:
        used = window_maps(site, mode)
        assert used is not None and len(got[site.path]) == max(used) + 1
        for number, statistics in enumerate(got[site.path]):
            wanted = [
                maps[image * site.n_windows + window].double()
                for maps in seen[site.path]
                for image in range(len(maps) // site.n_windows)
                for window in range(site.n_windows)
                if used[window] == number
            ]
            assert statistics.n_samples == len(wanted) == 5 * used.count(number)
            np.testing.assert_allclose(statistics.mean(), torch.stack(wanted).mean(dim=0).numpy(), atol=1e-7)


def test_masked_entries_of_a_class_are_exactly_never_attended_to() -> None:
    model = make_model(SWIN_NAME)
    (site,) = (site for site in attention_sites(model) if site.path == "layers.0.blocks.1.attn")
    got = collect_statistics(
        model, [site], [images(4)], bins=4, spacing="uniform", windows="class", on_images=lambda _: None
    )
    masks = model.layers[0].blocks[1].attn_mask.numpy() != 0
    for number, statistics in enumerate(got[site.path]):
        hidden = masks[(site.classes or ()).index(number)]
        assert (statistics.mean()[:, hidden] == 0).all() and (statistics.mean()[:, ~hidden] > 0).all()


def test_batches_become_the_models_input() -> None:
    how = Preprocessing(size=(8, 8), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    (tensor,) = as_tensors([ImageBatch(pixels, None, (Path("a"), Path("b")))], how)
    assert tensor.dtype == torch.float32 and tensor.shape == (2, 3, 8, 8)
    np.testing.assert_array_equal(tensor.numpy(), normalize(pixels, how))


def test_predict_is_the_models_forward() -> None:
    model = make_model()
    logits = predict(model, BATCHES[0].numpy())
    assert logits.dtype == np.float32
    with torch.inference_mode():
        np.testing.assert_array_equal(logits, model(BATCHES[0]).numpy())
