from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from notebook import Notebook

from eamdeploy import recover
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.recovery import RecoverOptions
from eamdeploy.images.source import ImageSource

OPTIONS = RecoverOptions(method="distill", epochs=3, batch=8, learning_rate=3e-4)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory, eam_checkpoint: Path, pictures: Path) -> Path:
    output = tmp_path_factory.mktemp("distilled") / "y.eam.safetensors"
    recover(eam_checkpoint, ImageSource(pictures), output, OPTIONS)
    return output


def test_it_runs(distilled: Path, eam_checkpoint: Path) -> None:
    before, after = checkpoints.load(eam_checkpoint), checkpoints.load(distilled)
    print(after.header.recovery)
    assert list(distilled.parent.iterdir()) == [distilled]
    assert 0
