"""A small checkpoint with two attention modules, one of them partly frozen."""

from __future__ import annotations

import numpy as np
import pytest

from eamdeploy.artifacts.card import Freezing, Preprocessing
from eamdeploy.eam.checkpoint import AttentionShape, Calibration, Checkpoint, CheckpointHeader, FrozenMaps
from eamdeploy.eam.quantizers import quantize_rows

TOKENS = 5


@pytest.fixture
def checkpoint() -> Checkpoint:
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.ones(TOKENS), size=(2, TOKENS)).astype(np.float32)
    codes, scales = quantize_rows(maps, 3, "squared")  # 50 codes of 3 bits: 19 bytes with 2 padding bits
    header = CheckpointHeader(
        timm_model="deit_tiny_patch16_224",
        timm_kwargs={"embed_dim": 8, "img_size": [8, 8]},
        weights="seed 0",
        num_classes=2,
        class_names=["cat", "dög"],
        preprocessing=Preprocessing(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        attention={path: AttentionShape(heads=3, tokens=TOKENS) for path in ("blocks.0.attn", "blocks.1.attn")},
        freezing=Freezing(
            bits=3,
            quantizer="squared",
            score="variance",
            scores={"blocks.0.attn": [3.0, 4.0, 5.0], "blocks.1.attn": [1.0, 6.0, 2.0]},
            sparsity_asked=0.4,
            sparsity=2 / 6,
            heads={"blocks.1.attn": [0, 2]},
        ),
        calibration=Calibration(n_images=4, digest="sha256:00", source="photos"),
        versions={"numpy": np.__version__},
    )
    weights = {
        "blocks.0.attn.qkv.weight": rng.normal(size=(6, 2)).astype(np.float32),
        "blocks.0.attn.qkv.bias": rng.normal(size=6).astype(np.float16),
        "head.weight": np.asfortranarray(rng.normal(size=(2, 3)).astype(np.float32)),
        "relative_position_index": np.arange(4, dtype=np.int64).reshape(2, 2).T,
        "scale": np.array(2.0),
        "mask": np.array([True, False]),
    }
    frozen = {"blocks.1.attn": FrozenMaps(np.array([0, 2]), codes, scales)}
    return Checkpoint(weights, frozen, header)
