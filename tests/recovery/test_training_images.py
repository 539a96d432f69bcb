from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import draw_pictures

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.recovery.training_images import TrainingImages

HOW = Preprocessing(size=(16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> TrainingImages:
    files = draw_pictures(tmp_path_factory.mktemp("training") / "photos", 11)
    return TrainingImages(files, HOW, exif_transpose=False, seed=3)


def epoch(images: TrainingImages, number: int, size: int = 4, part: int = 0, parts: int = 1) -> list[torch.Tensor]:
    return list(images.batches(number, size, part, parts))


def test_batches_are_full_and_normalized(photos: TrainingImages) -> None:
    batches = epoch(photos, 0)
    assert [list(batch.shape) for batch in batches] == [[4, 3, 16, 16]] * 2, "three images are left for other epochs"
    pixels = torch.cat(batches) * torch.tensor(HOW.std).view(3, 1, 1) + torch.tensor(HOW.mean).view(3, 1, 1)
    whole = pixels * 255
    torch.testing.assert_close(whole, whole.round(), atol=1e-3, rtol=0)
    assert whole.min() > -0.01 and whole.max() < 255.01
    assert len(epoch(photos, 0, size=11)) == 1


def test_order_and_views_follow_from_seed_and_epoch(photos: TrainingImages) -> None:
    first = torch.cat(epoch(photos, 0))
    assert torch.equal(first, torch.cat(epoch(photos, 0)))
    assert not torch.equal(first, torch.cat(epoch(photos, 1)))
    other = TrainingImages(photos.files, HOW, exif_transpose=False, seed=4)
    assert not torch.equal(first, torch.cat(epoch(other, 0)))


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_make_the_whole(photos: TrainingImages, parts: int) -> None:
    whole = epoch(photos, 2)
    shared = [epoch(photos, 2, part=part, parts=parts) for part in range(parts)]
    for number, batch in enumerate(whole):
        together = torch.cat([part[number] for part in shared])
        assert {row.numpy().tobytes() for row in together} == {row.numpy().tobytes() for row in batch}


def test_a_file_that_is_gone_by_now_is_an_error(tmp_path: Path) -> None:
    files = draw_pictures(tmp_path / "photos", 4)
    images = TrainingImages(files, HOW, exif_transpose=False, seed=0)
    files[2].unlink()
    with pytest.raises(Exception, match="No such file"):
        epoch(images, 0)


def test_every_image_has_its_turn(photos: TrainingImages) -> None:
    orders = [np.random.default_rng((3, number)).permutation(11)[:8].tolist() for number in range(6)]
    assert set().union(*orders) == set(range(11))
