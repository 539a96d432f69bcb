"""Where a model's attention modules are, and how many maps each has."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eamdeploy.eam.kinds import HeadSize
from eamdeploy.eam.records import AttentionShape
from eamdeploy.errors import UnsupportedGraph
from eamdeploy.vocabulary import WindowMaps

_Float = TypeVar("_Float", bound=np.floating[Any])


@dataclass(frozen=True)
class AttentionSite:
    """One attention module of a model.

    Attributes:
        path: its module path, e.g. `blocks.3.attn`.
        heads: H.
        tokens: N of a window, or of the image (with prefix tokens) where the model has no windows.
        classes: for every window of an image, row by row as timm partitions it, the class of its shift mask, numbered
            by first occurrence; None for a model without windows.
        read_tokens: the tokens whose rows of the maps the classifier depends on, at most half of them; None for all.
            A window's padding is never read.
    """

    path: str
    heads: int
    tokens: int
    classes: tuple[int, ...] | None = None
    read_tokens: tuple[int, ...] | None = None

    @property
    def n_windows(self) -> int:
        """W, the windows of one image; 1 without windows."""
        return 1 if self.classes is None else len(self.classes)

    @property
    def entries_per_head(self) -> int:
        """Values in one head's maps of one image: W·N²."""
        return self.n_windows * self.tokens**2


class Half(NamedTuple):
    """Half a transformer block: x ↦ x + γ·(W·f(x) + b), moved from the order of W's inputs back to that of x.

    Attributes:
        linear: the layer W, b at its end; None where the module is no such half.
        run: the whole half.
        scale: γ `[D]`; None for 1.
        arrange: a tensor in the order of x in the order of `linear`'s inputs, with 0 where they have padding.
    """

    linear: nn.Linear | None
    run: Callable[[torch.Tensor], torch.Tensor]
    scale: torch.Tensor | None
    arrange: Callable[[torch.Tensor], torch.Tensor]


def window_maps(site: AttentionSite, mode: WindowMaps) -> tuple[int, ...] | None:
    """For every window of an image, which of the module's M distinct maps it uses; None without windows.

    `shared`: M = 1. `class`: one for the windows that share a shift mask. `window`: M = W.
    """
    if site.classes is None:
        return None
    if mode == "shared":
        return (0,) * len(site.classes)
    return site.classes if mode == "class" else tuple(range(len(site.classes)))


def by_window(site: AttentionSite, maps: NDArray[_Float], mode: WindowMaps) -> NDArray[_Float]:
    """What every window of an image uses of `maps` `[H, N, N]`, or `[H, M, N, N]` with windows: `[H, W, N, N]`."""
    used = window_maps(site, mode)
    return maps[:, None] if used is None else maps[:, list(used)]


def attention_shapes(sites: Sequence[AttentionSite], mode: WindowMaps | None) -> dict[str, AttentionShape]:
    """What a checkpoint says of the attention modules `sites`, by module path."""
    windows = {site.path: window_maps(site, mode or "shared") for site in sites}
    return {
        site.path: AttentionShape(
            heads=site.heads, tokens=site.tokens, windows=None if (used := windows[site.path]) is None else list(used)
        )
        for site in sites
    }


def head_size(model: Any, site: AttentionSite) -> HeadSize:
    """What the multiply-adds of a head of `site` follow from."""
    columns, channels = model.get_submodule(site.path).qkv.weight.shape  # 3·H·d, D
    rows = site.tokens if site.read_tokens is None else len(site.read_tokens)
    return HeadSize(site.tokens, rows, channels, columns // (3 * site.heads), site.n_windows)


def refuse_unless(supported: bool, reason: str, hint: str | None = None) -> None:
    """Nothing, where the model is supported.

    Raises:
        UnsupportedGraph: it is not, for `reason`.
    """
    if not supported:
        raise UnsupportedGraph(f"this model is not supported: {reason}", hint=hint)


def refuse_other_modules(model: Any, known: Collection[str]) -> None:
    """Nothing, where every module of `model` is of a known class, so that what is frozen can be exported.

    Args:
        known: the classes that models in the tests were frozen, exported and compared with, by `class_of`.

    Raises:
        UnsupportedGraph: one is of another class.
    """
    for path, module in model.named_modules():
        kind = class_of(module)
        refuse_unless(kind in known, f"{path or 'it'} is a {kind}, which none of the supported models has")


def class_of(module: object) -> str:
    """The package and the name of a module's class, wherever the package keeps it: `timm.Mlp`, `torch.Linear`."""
    kind = type(module)
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
