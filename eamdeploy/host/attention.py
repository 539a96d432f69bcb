"""The attention modules of a timm VisionTransformer: which are there, what their maps are, and how to freeze them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from eamdeploy.errors import UnsupportedGraph

_POOLS = ("token", "avg", "avgmax", "max")


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a model.

    Attributes:
        path: its module path, e.g. `blocks.3.attn`.
        heads: H.
        tokens: N, with prefix tokens.
    """

    path: str
    heads: int
    tokens: int

    @property
    def entries_per_head(self) -> int:
        """Values in one head's map: N²."""
        return self.tokens**2


def attention_sites(model: Any) -> list[AttentionSite]:
    """Every attention module of `model`, in forward order.

    Raises:
        UnsupportedGraph: the model is not of timm's VisionTransformer family, or uses a variant of it whose attention
            is not `softmax(q·kᵀ)·v`; the reason is given.
    """
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise UnsupportedGraph(
            f"models of class {type(model).__name__} are not supported",
            expected="timm's VisionTransformer: ViT, DeiT, DeiT distilled, DeiT-III",
        )
    _refuse_unless(model.num_classes > 0, "it has no classifier (num_classes=0)")
    _refuse_unless(model.patch_embed.proj.in_channels == 3, "its input does not have 3 channels")
    _refuse_unless(not model.dynamic_img_size, "dynamic_img_size makes the token count depend on the image")
    _refuse_unless(model.global_pool in _POOLS, f"pooling {model.global_pool!r} has an attention of its own or none")
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        where = f"blocks.{index}"
        _refuse_unless(type(block) is Block, f"{where} is a {type(block).__name__}, not a pre-norm Block")
        attention = block.attn
        _refuse_unless(type(attention) is Attention, f"{where}.attn is a {type(attention).__name__}")
        _refuse_unless(getattr(attention, "gate", None) is None, f"{where}.attn gates its output")
        norm = getattr(attention, "norm", nn.Identity())
        _refuse_unless(isinstance(norm, nn.Identity), f"{where}.attn normalizes its output (scale_norm)")
    return [AttentionSite(f"blocks.{i}.attn", block.attn.num_heads, tokens) for i, block in enumerate(model.blocks)]


def project(attention: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (already scaled), keys and values of `x` `[B, N, D]`, each `[B, H, N, d]`; as timm computes them."""
    batch, tokens, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return attention.q_norm(query) * attention.scale, attention.k_norm(key), value


def attention_map(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """softmax(q·kᵀ), float32 `[B, H, N, N]`, of scaled queries and keys `[B, H, N, d]`."""
    return (query @ key.transpose(-2, -1)).softmax(dim=-1)


def merge_heads(context: torch.Tensor) -> torch.Tensor:
    """`[B, H, N, d]` as `[B, N, H·d]`."""
    return context.transpose(1, 2).flatten(2)


@contextmanager
def tapped_maps(
    model: nn.Module, sites: list[AttentionSite], on_map: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Inside the block, every forward hands each module's map `[B, H, N, N]` to `on_map(path, map)`.

    The map is computed beside the module from the module's own input, so that the model's result stays what it was,
    bit for bit, whichever attention kernel it uses.
    """

    def hook(path: str, attention: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        query, key, _ = project(attention, inputs[0])
        on_map(path, attention_map(query, key))

    handles = [model.get_submodule(s.path).register_forward_pre_hook(partial(hook, s.path)) for s in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class FrozenAttention(nn.Module):
    """timm's attention with the maps of some heads replaced by constants: the meaning of a frozen head.

    Args:
        attention: the module to stand in for.
        heads: which heads are frozen.
        maps: float32 `[F, N, N]`, rows summing to 1.
    """

    def __init__(self, attention: nn.Module, heads: torch.Tensor, maps: torch.Tensor) -> None:
        super().__init__()
        self.attention: Any = attention
        self.heads: torch.Tensor
        self.maps: torch.Tensor
        self.register_buffer("heads", heads, persistent=False)
        self.register_buffer("maps", maps, persistent=False)

    def forward(self, x: torch.Tensor, attn_mask: None = None, is_causal: bool = False) -> torch.Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        assert attn_mask is None and not is_causal, "image models pass no mask"
        query, key, value = project(self.attention, x)
        maps = attention_map(query, key)
        maps[:, self.heads] = self.maps
        merged: torch.Tensor = self.attention.proj(merge_heads(maps @ value))
        return merged


def freeze_attention(model: nn.Module, frozen: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """`model` uses the given (heads `[F]`, maps `[F, N, N]`) in the named attention modules from now on."""
    for path, (heads, maps) in frozen.items():
        parent = model.get_submodule(path.rpartition(".")[0])
        parent.attn = FrozenAttention(model.get_submodule(path), heads, maps)


def _refuse_unless(supported: bool, reason: str) -> None:
    if not supported:
        raise UnsupportedGraph(f"this model is not supported: {reason}")
