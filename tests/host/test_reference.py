from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import images, make_model

from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.checkpoint import AttentionShape, Checkpoint, CheckpointHeader
from eamdeploy.errors import CheckpointError
from eamdeploy.host.attention import freeze_attention
from eamdeploy.host.calibrate import predict
from eamdeploy.host.reference import load_reference

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
        freeze_attention(model, {path: (torch.from_numpy(item.heads), torch.from_numpy(maps))})
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
