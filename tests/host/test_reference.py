from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import SWIN_KWARGS, SWIN_NAME, images, make_model, save_weights

from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.records import AttentionShape, Checkpoint, CheckpointHeader
from eamdeploy.errors import CheckpointError
from eamdeploy.host.attention import Constants, freeze_attention
from eamdeploy.host.calibrate import predict
from eamdeploy.host.model import ModelSpec
from eamdeploy.host.reference import load_reference
from eamdeploy.images.source import ImageSource
from eamdeploy.stages.freeze import freeze

IMAGES = images().numpy()


@pytest.fixture
def checkpoint(eam_checkpoint: Path) -> Checkpoint:
    return checkpoints.load(eam_checkpoint)


def with_header(checkpoint: Checkpoint, **changes: object) -> Checkpoint:
    header = CheckpointHeader.model_validate({**checkpoint.header.model_dump(), **changes})
    return dataclasses.replace(checkpoint, header=header)


def test_live_reference_is_the_model_bit_for_bit(checkpoint: Checkpoint) -> None:
    loaded = load_reference(checkpoint, frozen=False, where="x")
    np.testing.assert_array_equal(predict(loaded.model, IMAGES), predict(make_model(), IMAGES))
    assert [site.path for site in loaded.sites] == list(checkpoint.header.attention)


def test_frozen_reference_has_the_checkpoints_maps_in_place(checkpoint: Checkpoint) -> None:
    model = make_model()
    for path, item in checkpoint.frozen.items():
        maps = item.codes.astype(np.float32) ** 2 * item.scales[..., None]
        freeze_attention(model, {path: Constants(torch.from_numpy(item.heads), torch.from_numpy(maps))})
    got = predict(load_reference(checkpoint, frozen=True, where="x").model, IMAGES)
    np.testing.assert_array_equal(got, predict(model, IMAGES))
    assert np.abs(got - predict(make_model(), IMAGES)).max() > 1e-2


def test_nothing_but_the_checkpoint_decides(checkpoint: Checkpoint) -> None:
    torch.manual_seed(99)
    first = predict(load_reference(checkpoint, frozen=True, where="x").model, IMAGES)
    torch.manual_seed(7)
    np.testing.assert_array_equal(predict(load_reference(checkpoint, frozen=True, where="x").model, IMAGES), first)


def test_weights_of_another_architecture_are_refused(checkpoint: Checkpoint) -> None:
    kwargs = {**checkpoint.header.timm_kwargs, "depth": 3}
    with pytest.raises(CheckpointError, match=r"x\.eam does not fit the model.*12 missing, first blocks\.2"):
        load_reference(with_header(checkpoint, timm_kwargs=kwargs), frozen=True, where="x.eam")


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("blocks.0.attn", AttentionShape(heads=6, tokens=17), r"blocks\.0\.attn; expected \(6, 17\); got \(3, 17\)"),
        ("blocks.1.attn", AttentionShape(heads=3, tokens=18), r"blocks\.1\.attn; expected \(3, 18\); got \(3, 17\)"),
        (
            "blocks.9.attn",
            AttentionShape(heads=3, tokens=17),
            r"blocks\.9\.attn; expected \(3, 17\); got no such module",
        ),
    ],
)
def test_header_that_contradicts_the_model_is_refused(
    checkpoint: Checkpoint, path: str, shape: AttentionShape, message: str
) -> None:
    attention = {**checkpoint.header.attention, path: shape}
    with pytest.raises(CheckpointError, match=rf"x\.eam does not fit timm's vit_tiny.*heads and tokens of {message}"):
        load_reference(with_header(checkpoint, attention=attention), frozen=True, where="x.eam")


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def swin_checkpoint(pictures: Path, tmp_path: Path) -> Checkpoint:
    spec = ModelSpec(SWIN_NAME, str(save_weights(make_model(SWIN_NAME), tmp_path / "w.safetensors")), SWIN_KWARGS)
    options = FreezeOptions(sparsity=0.6, score="random", granularity="entry", window_maps="class")
    freeze(spec, ImageSource(pictures, limit=2), tmp_path / "x.eam.safetensors", options)
    return checkpoints.load(tmp_path / "x.eam.safetensors")


def test_frozen_entries_of_every_window_class_are_in_place(swin_checkpoint: Checkpoint) -> None:
    model = make_model(SWIN_NAME)
    for path, item in swin_checkpoint.frozen.items():
        maps = item.codes.astype(np.float32) ** 2 * item.scales[..., None]
        assert item.mask is not None
        windows = swin_checkpoint.header.attention[path].windows
        mask = torch.from_numpy(item.mask)
        constants = Constants(torch.from_numpy(item.heads), torch.from_numpy(maps), mask, tuple(windows or ()))
        freeze_attention(model, {path: constants})
    got = predict(load_reference(swin_checkpoint, frozen=True, where="x").model, IMAGES)
    np.testing.assert_array_equal(got, predict(model, IMAGES))
    assert np.abs(got - predict(make_model(SWIN_NAME), IMAGES)).max() > 1e-2


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([0, 1, 2, 2], r"expected 4 windows with maps 0, 1, 2, 2; got 4 windows with maps 0, 1, 2, 3"),
        ([0, 2, 1, 3], r"expected 4 windows with maps 0, 2, 1, 3; got 4 windows"),
        ([0, 1, 2, 3, 0], r"expected 5 windows with maps 0, 1, 2, 3, 0; got 4 windows"),
        (None, r"expected no windows; got 4 windows"),
    ],
    ids=str,
)
def test_windows_that_are_not_the_models_are_refused(
    swin_checkpoint: Checkpoint, windows: list[int] | None, message: str
) -> None:
    path = "layers.0.blocks.1.attn"
    changed = swin_checkpoint.header.attention[path].model_copy(update={"windows": windows})
    attention = {**swin_checkpoint.header.attention, path: changed}
    with pytest.raises(CheckpointError, match=rf"x\.eam .* windows of {path} \(window_maps: class\); {message}.*--win"):
        load_reference(with_header(swin_checkpoint, attention=attention), frozen=True, where="x.eam")


def test_windows_of_another_image_size_are_refused(swin_checkpoint: Checkpoint) -> None:
    kwargs = {**swin_checkpoint.header.timm_kwargs, "img_size": 48}
    with pytest.raises(CheckpointError, match=r"windows of layers\.0\.blocks\.0\.attn .*expected 4 win.*got 9 win"):
        load_reference(with_header(swin_checkpoint, timm_kwargs=kwargs), frozen=True, where="x.eam")


def test_windows_of_a_model_without_windows_are_refused(checkpoint: Checkpoint) -> None:
    attention = {**checkpoint.header.attention, "blocks.1.attn": AttentionShape(heads=3, tokens=17, windows=[0])}
    with pytest.raises(CheckpointError, match=r"windows of blocks\.1\.attn .*expected 1 windows.*got no windows"):
        load_reference(with_header(checkpoint, attention=attention), frozen=True, where="x.eam")
