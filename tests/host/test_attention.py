from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from tiny_models import FAMILY, KWARGS, images, make_member, make_model
from torch.nn import functional

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.host.attention import AttentionSite, attention_sites, freeze_attention, tapped_maps

IMAGES = images()


def set_fused(model: Any, fused: bool) -> Any:
    for block in model.blocks:
        block.attn.fused_attn = fused
    return model


def collect_maps(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits of `IMAGES` and the tapped maps."""
    maps: dict[str, torch.Tensor] = {}
    with torch.inference_mode(), tapped_maps(model, attention_sites(model), lambda path, m: maps.update({path: m})):
        return model(IMAGES), maps


@contextmanager
def recorded_softmaxes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Inside the block, what every `Tensor.softmax` returned."""
    results: list[torch.Tensor] = []
    softmax = torch.Tensor.softmax

    def record(self: torch.Tensor, dim: int) -> torch.Tensor:
        results.append(softmax(self, dim=dim))
        return results[-1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", record)
        yield results


# --- which models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILY)
def test_every_attention_module_of_the_family_is_a_site(kind: str) -> None:
    model = make_member(kind)
    tokens = 16 + {"average pooling": 0, "registers": 5, "distilled": 2}.get(kind, 1)
    assert attention_sites(model) == [AttentionSite(f"blocks.{layer}.attn", 3, tokens) for layer in range(2)]
    assert attention_sites(model)[0].entries_per_head == tokens**2


def make(name: str, **changes: object) -> Any:
    return timm.create_model(name, **{**KWARGS, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, "dynamic_img_size"),
        ("vit_tiny_patch16_224", {"num_classes": 0}, r"no classifier \(num_classes=0\)"),
        ("vit_tiny_patch16_224", {"in_chans": 1}, "does not have 3 channels"),
        ("vit_tiny_patch16_224", {"global_pool": "map"}, "pooling 'map'"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "pooling ''"),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, r"blocks\.0\.attn normalizes its output"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, r"blocks\.0\.attn is a DiffAttention"),
        ("vit_small_patch16_18x2_224", {}, r"blocks\.0 is a ParallelThingsBlock"),
        ("vit_relpos_small_patch16_224", {"patch_size": 16}, "class VisionTransformerRelPos"),
    ],
)
def test_other_models_are_refused_with_the_reason(name: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedGraph, match=rf"not supported: .*{reason}|{reason} are not supported"):
        attention_sites(make(name, **changes))


def test_post_norm_blocks_are_refused() -> None:
    from timm.models.vision_transformer import ResPostBlock

    model = make("vit_tiny_patch16_224", block_fn=ResPostBlock)
    with pytest.raises(UnsupportedGraph, match=r"blocks\.0 is a ResPostBlock, not a pre-norm Block"):
        attention_sites(model)


def test_gated_attention_is_refused() -> None:
    model = make_model()
    model.blocks[1].attn.gate = torch.nn.Linear(48, 48)
    with pytest.raises(UnsupportedGraph, match=r"blocks\.1\.attn gates its output"):
        attention_sites(model)


def test_swin_is_refused_by_its_class() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1,), embed_dim=24, num_heads=(1,))
    with pytest.raises(UnsupportedGraph, match=r"class SwinTransformer are not supported; expected timm's Vision"):
        attention_sites(model)


# --- tapped maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", FAMILY)
def test_tapping_changes_no_bit_of_the_result(kind: str, fused: bool) -> None:
    model = set_fused(make_member(kind), fused)
    with torch.inference_mode():
        untapped = model(IMAGES)
    tapped, maps = collect_maps(model)
    assert torch.equal(tapped, untapped)
    assert list(maps) == ["blocks.0.attn", "blocks.1.attn"]
    with torch.inference_mode():
        maps.clear()
        model(IMAGES)
    assert not maps, "the taps outlive their block"


@pytest.mark.parametrize("kind", FAMILY)
def test_tapped_maps_are_the_softmaxes_inside_timm(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = set_fused(make_member(kind), False)
    with recorded_softmaxes(monkeypatch) as inside, torch.inference_mode():
        model(IMAGES)
    _, maps = collect_maps(set_fused(model, True))
    assert len(inside) == len(maps) == 2
    for got, wanted in zip(maps.values(), inside, strict=True):
        tokens = attention_sites(model)[0].tokens
        assert got.shape == (len(IMAGES), 3, tokens, tokens)
        # the fused kernel of the first layer moves the input of the second one by a few ulp
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        assert float(got.std(dim=0).max()) > 0.1, "the maps hardly vary, so this test would not notice a mix-up"


def test_taps_are_gone_after_an_error() -> None:
    model = make_model()
    with pytest.raises(RuntimeError, match="on purpose"), tapped_maps(model, attention_sites(model), lambda *_: None):
        raise RuntimeError("on purpose")
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)


# --- freezing --------------------------------------------------------------------------------------------------------


def attention_by_hand(
    block: Any, x: NDArray[np.float64], frozen: dict[int, NDArray[np.float64]]
) -> NDArray[np.float64]:
    """What `block.attn` returns for its normalized input `x` [B, N, D], head by head, in float64."""
    attention = block.attn
    weights = {name: value.double().numpy() for name, value in attention.state_dict().items()}
    D, width = x.shape[-1], attention.head_dim
    out = np.zeros_like(x)
    for head in range(attention.num_heads):
        rows = [slice(part * D + head * width, part * D + (head + 1) * width) for part in range(3)]
        q, k, v = (x @ weights["qkv.weight"][row].T + weights["qkv.bias"][row] for row in rows)
        scores = np.einsum("bid,bjd->bij", q, k) / np.sqrt(width)
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        maps = frozen.get(head, powers / powers.sum(-1, keepdims=True))
        out += (maps @ v) @ weights["proj.weight"][:, head * width : (head + 1) * width].T
    return out + weights["proj.bias"]


def random_maps(*shape: int) -> torch.Tensor:
    return functional.softmax(torch.randn(*shape, generator=torch.Generator().manual_seed(5)) * 2, dim=-1)


@pytest.mark.parametrize("heads", [[], [0], [1], [0, 2], [0, 1, 2]], ids=str)
def test_frozen_heads_use_their_constants_and_live_ones_their_own(heads: list[int]) -> None:
    model = make_model()
    maps = random_maps(len(heads), 17, 17)
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    block = model.blocks[1]
    block.norm1.register_forward_hook(lambda *args: inputs.append(args[-1]))
    freeze_attention(model, {"blocks.1.attn": (torch.tensor(heads, dtype=torch.int64), maps)})
    frozen_block = block.attn
    frozen_block.register_forward_hook(lambda *args: outputs.append(args[-1]))
    with torch.inference_mode():
        model(IMAGES)
    block.attn = frozen_block.attention
    constants = {head: maps[index].double().numpy() for index, head in enumerate(heads)}
    wanted = attention_by_hand(block, inputs[0].double().numpy(), constants)
    np.testing.assert_allclose(outputs[0].numpy(), wanted, atol=2e-5)


def test_only_the_named_modules_are_frozen() -> None:
    model, untouched = make_model(), make_model()
    freeze_attention(model, {"blocks.1.attn": (torch.tensor([0]), random_maps(1, 17, 17))})
    assert type(model.blocks[0].attn) is type(untouched.blocks[0].attn)
    with torch.inference_mode():
        assert not torch.allclose(model(IMAGES), untouched(IMAGES), atol=1e-2)


@pytest.mark.parametrize("kind", FAMILY)
def test_freezing_to_an_images_own_maps_gives_that_images_logits(kind: str) -> None:
    model = make_member(kind)
    logits, maps = collect_maps(model)
    own = {path: (torch.arange(3), map_[0]) for path, map_ in maps.items()}
    freeze_attention(model, own)
    with torch.inference_mode():
        frozen = model(IMAGES)
    torch.testing.assert_close(frozen[0], logits[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(frozen[1], logits[1], atol=1e-2), "another image has other maps"
