"""Tiny timm models whose attention maps differ from image to image, and pictures to show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn

NAME = "vit_tiny_patch16_224"
KWARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 10,
}
TOKENS = 17

FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (NAME, {}),
    "average pooling": (NAME, {"global_pool": "avg", "class_token": False}),
    "no qkv bias": (NAME, {"qkv_bias": False}),
    "q/k norm": (NAME, {"qk_norm": True}),
    "registers": (NAME, {"reg_tokens": 4}),
    "pre-norm": (NAME, {"pre_norm": True}),
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit-3": ("deit3_small_patch16_224", {}),
}
"""Every kind of model that is supported: timm name and changes to `KWARGS`."""


def make_model(name: str = NAME, changes: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """A model in evaluation mode; its weights are strong enough that the maps depend on the image."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**KWARGS, **(changes or {})})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def make_member(kind: str) -> Any:
    """The model of that kind in `FAMILY`."""
    return make_model(*FAMILY[kind])


def save_weights(model: nn.Module, path: Path) -> Path:
    """The model's state dict as safetensors at `path`."""
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


def images(n: int = 6, size: int = 32, seed: int = 1) -> torch.Tensor:
    """Normalized images, float32 [n, 3, size, size], smooth enough to look different to the model."""
    coarse = torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(size, size), mode="bicubic") * 1.5


def draw_pictures(folder: Path, n: int, seed: int = 0) -> list[Path]:
    """`n` smooth pictures of 44 × 40 pixels in a new `folder`."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    files = []
    for index in range(n):
        coarse: NDArray[np.uint8] = rng.integers(0, 256, (5, 6, 3), np.uint8)
        files.append(folder / f"{index:03}.png")
        Image.fromarray(coarse).resize((44, 40), Image.Resampling.BICUBIC).save(files[-1])
    return files
