from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tiny_models import images, make_model

from eamdeploy.artifact import Preprocessing
from eamdeploy.eam.statistics import MapStatistics
from eamdeploy.host.attention import attention_sites, tapped_maps
from eamdeploy.host.calibrate import as_tensors, collect_statistics, predict
from eamdeploy.images import ImageBatch, normalize

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
        assert got[path].n_samples == 8 and got[path].bins == 5
        np.testing.assert_array_equal(got[path].histogram(), wanted.histogram())
        np.testing.assert_array_equal(got[path].mean(), wanted.mean())
        np.testing.assert_array_equal(got[path].row_entropy(), wanted.row_entropy())


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
