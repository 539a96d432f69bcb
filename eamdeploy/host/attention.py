"""The attention modules of a timm model: which are there, what their maps are, and how to freeze them.

What differs between the families is in `vit` and `swin`; everything here treats a ViT as one window per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.host import swin, vit
from eamdeploy.host.sites import AttentionSite, Half, refuse_unless
from eamdeploy.passes.facts import Parts

_FAMILIES: tuple[ModuleType, ...] = (vit, swin)
_BY_MODEL = {model: family for family in _FAMILIES for model in family.MODELS}
_BY_ATTENTION = {family.ATTENTION: family for family in _FAMILIES}

_V2_ATTENTION = (
    "its attention is no softmax(s·q·kᵀ + b): cosine similarity scaled per head by a learned temperature, "
    "and a bias that a network computes from continuous positions"
)
_REASONS_BY_MODEL = {
    "SwinTransformerV2": _V2_ATTENTION,
    "SwinTransformerV2Cr": _V2_ATTENTION,
    "NaFlexVit": "the number of its tokens depends on the image",
    "Cait": "its attention mixes the maps of its heads (talking heads)",
    "Xcit": "its attention is between channels, not between tokens",
    "VOLO": "its first blocks compute maps from each token alone, not from queries and keys",
    "CrossVit": "some of its attention is between tokens of two branches",
}
_REASONS_BY_MODULE = {
    "Rotary": "its queries and keys are rotated by the positions of their tokens (RoPE)",
    "RelPosBias": "its attention adds a bias of relative positions to the scores, which is known of Swin alone",
    "RelPosMlp": "its attention adds a bias that a network computes from relative positions",
}
"""By the beginning of the name of a module's class."""
_REASONS_BY_PARAMETER = {
    "relative_position_bias_table": _REASONS_BY_MODULE["RelPosBias"],
    "rel_pos_h": "its attention adds a bias that depends on the queries",
}


class Factors(NamedTuple):
    """The heads of one attention module that are frozen with one rank r, see `eam.factors`.

    Attributes:
        heads: int64 `[G]`.
        mix: float `[G, N, r]`, or `[G, M, N, r]` in a model with windows.
        pool: float `[G, r, N]`, or `[G, M, r, N]`.
    """

    heads: torch.Tensor
    mix: torch.Tensor
    pool: torch.Tensor


class Constants(NamedTuple):
    """What is frozen in one attention module.

    Attributes:
        heads: int64 `[F]`, heads with something frozen.
        maps: float `[F, N, N]`, or `[F, M, N, N]` in a model with windows.
        mask: bool `[F, N]` (rows) or `[F, N, N]` (entries), true where frozen; None: everything of these heads.
        windows: for every window of an image which of the M maps it uses; None without windows.
        factors: heads of low rank, which are others than `heads`.
    """

    heads: torch.Tensor
    maps: torch.Tensor
    mask: torch.Tensor | None = None
    windows: tuple[int, ...] | None = None
    factors: tuple[Factors, ...] = ()

    def on(self, device: torch.device) -> Constants:
        """The same on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        factors = tuple(Factors(*(each.to(device) for each in group)) for group in self.factors)
        return Constants(self.heads.to(device), self.maps.to(device), mask, self.windows, factors)


def attention_sites(model: Any) -> list[AttentionSite]:
    """Every attention module of `model`, in forward order.

    Raises:
        UnsupportedGraph: the model is of no supported family, or uses a variant of it whose attention means something
            else; the reason is given.
    """
    family = _BY_MODEL.get(type(model))
    if family is None:
        name, reason = type(model).__name__, _reason(model)
        raise UnsupportedGraph(
            f"models of class {name} are not supported{f': {reason}' if reason else ''}",
            expected="timm's VisionTransformer (ViT, DeiT, DeiT distilled, DeiT-III) or SwinTransformer (version 1)",
        )
    found: list[AttentionSite] = family.sites(model)
    refuse_unless(bool(found), "it has no attention module")
    refuse_unless(_input_channels(model) == 3, "its input does not have 3 channels")
    refuse_unless(
        model.num_classes > 0,
        "it has no classifier (num_classes=0)",
        "Give it one with --model-kwargs num_classes=N, and weights that have one.",
    )
    return found


def _reason(model: nn.Module) -> str | None:
    """Why attention of `model`, of no family that is supported, can't be frozen; None where the class says enough."""
    name = type(model).__name__
    if name in _REASONS_BY_MODEL:
        return _REASONS_BY_MODEL[name]
    classes = {type(module).__name__ for module in model.modules()}
    parameters = {path.rpartition(".")[2] for path, _ in model.named_parameters()}
    by_module = (why for start, why in _REASONS_BY_MODULE.items() if any(c.startswith(start) for c in classes))
    by_parameter = (why for parameter, why in _REASONS_BY_PARAMETER.items() if parameter in parameters)
    return next(chain(by_module, by_parameter), None)


def _input_channels(model: Any) -> int:
    """How many channels the first convolution of `model` reads."""
    channels: int = next(m.in_channels for m in model.patch_embed.modules() if isinstance(m, nn.Conv2d))
    return channels


def steps(model: Any) -> list[tuple[str, nn.Module]]:
    """Path and module of everything between embedding and final norm: each maps one tensor to the next one's input.

    The module `x.attn` is in the step `x`, wherever `model` has an attention site of that path.
    """
    found: list[tuple[str, nn.Module]] = _BY_MODEL[type(model)].steps(model)
    return found


def halves(model: Any) -> list[tuple[str, Half]]:
    """Everything between embedding and final norm, every block as its two halves: path and what is there.

    The path of a half is that of the linear layer at its end, as the model has it without frozen attention.
    """
    family = _BY_MODEL[type(model)]
    found: list[tuple[str, Half]] = []
    for path, module in steps(model):
        block: Any = module  # its attributes are timm's
        if not hasattr(block, "attn"):
            found.append((path, Half(None, block, None, lambda x: x)))
            continue
        attention = block.attn.attention if isinstance(block.attn, FrozenAttention) else block.attn
        with_attention, with_mlp = family.halves(block, attention.proj)
        last = next(name for name, each in block.mlp.named_modules() if each is with_mlp.linear)
        found += [(f"{path}.attn.proj", with_attention), (f"{path}.mlp.{last}", with_mlp)]
    return found


def parts(model: Any) -> Parts:
    """How often `model` has what passes change."""
    found: Parts = _BY_MODEL[type(model)].parts(model)
    return found


def attend(
    attention: nn.Module, x: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps `[B·W, H, N, N]` and values `[B·W, H, N, d]` that timm's `attention` makes of its input `[B·W, N, D]`.

    Window w of image b is at b·W + w. The result is the same whichever attention kernel the module uses.
    """
    maps, value = _BY_ATTENTION[type(attention)].attend(attention, x, mask)
    return maps, value


def merge_heads(context: torch.Tensor) -> torch.Tensor:
    """`[B, H, N, d]` as `[B, N, H·d]`."""
    return context.transpose(1, 2).flatten(2)


@contextmanager
def tapped_inputs(
    model: nn.Module, sites: list[AttentionSite], on_input: Callable[[str, torch.Tensor, torch.Tensor | None], None]
) -> Iterator[None]:
    """Inside the block, every forward hands each module's input and mask to `on_input(path, x, mask)`."""

    def hook(path: str, _: nn.Module, inputs: tuple[torch.Tensor, ...], named: dict[str, Any]) -> None:
        on_input(path, inputs[0], named.get("mask"))

    handles = [
        model.get_submodule(site.path).register_forward_pre_hook(partial(hook, site.path), with_kwargs=True)
        for site in sites
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def tapped_maps(
    model: nn.Module, sites: list[AttentionSite], on_map: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Inside the block, every forward hands each module's maps `[B·W, H, N, N]` to `on_map(path, maps)`.

    They are computed beside the module from the module's own input, so that the model's result stays what it was,
    bit for bit, whichever attention kernel it uses.
    """

    def on_input(path: str, x: torch.Tensor, mask: torch.Tensor | None) -> None:
        on_map(path, attend(model.get_submodule(path), x, mask)[0])

    with tapped_inputs(model, sites, on_input):
        yield


class FrozenAttention(nn.Module):
    """timm's attention with frozen entries of its maps replaced by constants: the meaning of freezing.

        A[w, h] ← mask[h] · F[h, windows[w]] + (1 − mask[h]) · A[w, h](x)

    and in heads of low rank  A[w, h] · V  by  U[h, windows[w]] · (P[h, windows[w]] · V).

    Args:
        attention: the module to stand in for.
        frozen: what is frozen in it.
    """

    def __init__(self, attention: nn.Module, frozen: Constants) -> None:
        super().__init__()
        self.attention: Any = attention
        self._frozen = frozen
        self.has_windows = frozen.windows is not None
        self.windows = [0] if frozen.windows is None else list(frozen.windows)

    def constants(self) -> Constants:
        """What is frozen."""
        return self._frozen

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """`[B·W, N, D]` to `[B·W, N, D]`; `mask` is Swin's, `attn_mask` and `is_causal` are ViT's and unused."""
        assert attn_mask is None and not is_causal, "image models pass no mask"
        frozen = self.constants().on(x.device)
        maps, value = attend(self.attention, x, mask)
        context = maps @ value
        values = self._by_window(value)  # [B, W, H, N, d]
        contexts = self._by_window(context)
        if len(frozen.heads):
            constants = self._of_windows(frozen.maps)  # [W, F, N, N]
            if frozen.mask is not None:
                rows = frozen.mask if frozen.mask.ndim == 3 else frozen.mask[..., None]  # [F, N, 1 or N]
                constants = torch.where(rows, constants, self._by_window(maps)[:, :, frozen.heads])
            contexts[:, :, frozen.heads] = constants @ values[:, :, frozen.heads]
        for heads, mix, pool in frozen.factors:
            contexts[:, :, heads] = self._of_windows(mix) @ (self._of_windows(pool) @ values[:, :, heads])
        merged: torch.Tensor = self.attention.proj(merge_heads(context))
        return merged

    def _by_window(self, x: torch.Tensor) -> torch.Tensor:
        """`[B·W, …]` as `[B, W, …]`."""
        return x.view(-1, len(self.windows), *x.shape[1:])

    def _of_windows(self, constants: torch.Tensor) -> torch.Tensor:
        """`[G, M, …]`, or `[G, …]` of a model without windows, as `[W, G, …]`."""
        by_map = constants if self.has_windows else constants[:, None]
        return by_map[:, self.windows].transpose(0, 1)


def freeze_attention(model: nn.Module, frozen: Mapping[str, Constants]) -> None:
    """`model` uses the given constants in the named attention modules from now on."""
    for path, constants in frozen.items():
        put_attention(model, path, FrozenAttention(model.get_submodule(path), constants))


@contextmanager
def replaced_attention(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside the block, `model` has other attention modules at the given paths."""
    originals = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            put_attention(model, path, module)
        yield
    finally:
        for path, module in originals.items():
            put_attention(model, path, module)


def put_attention(model: nn.Module, path: str, module: nn.Module) -> None:
    """`model` has `module` at the path `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
