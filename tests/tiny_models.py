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
"""Every kind of ViT that is supported: timm name and changes to `KWARGS`."""

SWIN_NAME = "swin_tiny_patch4_window7_224"
SWIN_KWARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "num_classes": 10,
}
"""Four windows of 16 tokens, shifted in the second block, then a stage of one window."""
SWIN_PATHS = [f"layers.{stage}.blocks.{block}.attn" for stage in range(2) for block in range(2)]

SWIN_FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (SWIN_NAME, {}),
    "swin, more windows than classes": (SWIN_NAME, {"img_size": 48, "window_size": (4, 3)}),
    "swin, padded": (SWIN_NAME, {"img_size": (36, 28)}),
    "swin, oblong windows": (SWIN_NAME, {"window_size": ((2, 4), (4, 2)), "head_dim": 5, "qkv_bias": False}),
    "swin, always partitioned": (SWIN_NAME, {"always_partition": True, "global_pool": "max"}),
    "swin, a window larger than the image": (SWIN_NAME, {"always_partition": True, "window_size": 6}),
    "swin s3": ("swin_s3_tiny_224", {"window_size": (4, 2)}),
}
"""Every kind of Swin that is supported: timm name and changes to `SWIN_KWARGS`."""


def make_model(name: str = NAME, changes: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """A model in evaluation mode; its weights are strong enough that the maps depend on the image."""
    torch.manual_seed(seed)
    base = SWIN_KWARGS if name.startswith("swin") else KWARGS
    model = timm.create_model(name, **{**base, **(changes or {})})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def make_member(kind: str) -> Any:
    """The model of that kind in `FAMILY` or `SWIN_FAMILY`."""
    return make_model(*{**FAMILY, **SWIN_FAMILY}[kind])


def save_weights(model: nn.Module, path: Path) -> Path:
    """The model's state dict as safetensors at `path`."""
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


def images(n: int = 6, size: int | tuple[int, int] = 32, seed: int = 1) -> torch.Tensor:
    """Normalized images, float32 [n, 3, height, width], smooth enough to look different to the model."""
    coarse = torch.randn(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=size, mode="bicubic") * 1.5


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
