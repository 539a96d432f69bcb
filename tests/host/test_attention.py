from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from tiny_models import FAMILY, KWARGS, SWIN_FAMILY, SWIN_KWARGS, SWIN_NAME, SWIN_PATHS, images, make_member, make_model
from torch.nn import functional

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.host.attention import Constants, attention_sites, freeze_attention, steps, tapped_maps
from eamdeploy.host.sites import AttentionSite, window_maps
from eamdeploy.vocabulary import WindowMaps

IMAGES = images()
EVERYONE = [*FAMILY, *SWIN_FAMILY]


def images_for(model: Any, n: int = 6) -> torch.Tensor:
    return images(n, tuple(model.patch_embed.img_size))


def set_fused(model: Any, fused: bool) -> Any:
    for site in attention_sites(model):
        model.get_submodule(site.path).fused_attn = fused
    return model


def collect_maps(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits of `images_for(model)` and the tapped maps."""
    maps: dict[str, torch.Tensor] = {}
    with torch.inference_mode(), tapped_maps(model, attention_sites(model), lambda path, m: maps.update({path: m})):
        return model(images_for(model)), maps


@contextmanager
def recorded_softmaxes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Tensor]]:
    """Inside the block, what every `Tensor.softmax` returned; `nn.Softmax` calls it too."""
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
    read = {"average pooling": None, "distilled": (0, 1)}.get(kind, (0,))
    assert attention_sites(model) == [
        AttentionSite("blocks.0.attn", 3, tokens),
        AttentionSite("blocks.1.attn", 3, tokens, read_tokens=read),
    ]
    assert attention_sites(model)[0].entries_per_head == tokens**2


@pytest.mark.parametrize(
    ("name", "changes", "read"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, None),  # every patch, but not the class token
        ("vit_tiny_patch16_224", {"global_pool": "avg", "img_size": 8, "reg_tokens": 2}, (3,)),  # the only patch
        ("vit_tiny_patch16_224", {"global_pool": "map", "img_size": 8, "reg_tokens": 2}, (3,)),
        ("vit_tiny_patch16_224", {"global_pool": "max", "img_size": 8, "pool_include_prefix": True}, None),
        ("vit_tiny_patch16_224", {"img_size": 8}, (0,)),  # of two tokens
        ("deit_tiny_distilled_patch16_224", {"img_size": 8}, None),  # two of three
        (SWIN_NAME, dict(SWIN_KWARGS), None),
    ],
)
def test_read_tokens_are_those_of_the_last_block_where_they_are_few(
    name: str, changes: dict[str, Any], read: tuple[int, ...] | None
) -> None:
    *others, last = attention_sites(
        timm.create_model(name, **{**(changes if "depths" in changes else KWARGS), **changes})
    )
    assert last.read_tokens == read and all(site.read_tokens is None for site in others)


def make(name: str, **changes: object) -> Any:
    return timm.create_model(name, **{**KWARGS, **changes})


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, "dynamic_img_size"),
        ("vit_tiny_patch16_224", {"num_classes": 0}, r"no classifier \(num_classes=0\)"),
        ("vit_tiny_patch16_224", {"in_chans": 1}, "does not have 3 channels"),
        ("vit_tiny_patch16_224", {"depth": 0}, "has no attention module"),
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


def test_every_window_of_swin_has_the_class_of_its_shift_mask() -> None:
    first, second = ((path, 2, 16) for path in SWIN_PATHS[:2])
    assert attention_sites(make_model(SWIN_NAME)) == [
        AttentionSite(*first, (0, 0, 0, 0)),
        AttentionSite(*second, (0, 1, 2, 3)),  # inside, right edge, bottom edge, corner
        AttentionSite(SWIN_PATHS[2], 4, 16, (0,)),
        AttentionSite(SWIN_PATHS[3], 4, 16, (0,)),  # one window is as large as the image: not shifted
    ]


def test_windows_of_one_class_share_their_mask_and_padding_adds_windows() -> None:
    model = make_member("swin, more windows than classes")
    site = attention_sites(model)[1]
    assert (site.tokens, site.classes) == (12, (0, 0, 0, 1, 0, 0, 0, 1, 2, 2, 2, 3))
    masks = model.layers[0].blocks[1].attn_mask
    for one, first in enumerate(site.classes or ()):
        for other, second in enumerate(site.classes or ()):
            assert torch.equal(masks[one], masks[other]) == (first == second)
    assert site.entries_per_head == 12 * 12**2
    padded = attention_sites(make_member("swin, padded"))  # 9 × 7 tokens in windows of 4 × 4
    assert [site.classes for site in padded[:2]] == [(0,) * 6, (0, 1, 0, 1, 2, 3)]


def test_window_maps_number_what_windows_share() -> None:
    site = AttentionSite("x", 1, 4, (0, 0, 1, 0, 0, 1, 2, 2, 3))
    assert window_maps(site, "shared") == (0,) * 9
    assert window_maps(site, "class") == site.classes
    assert window_maps(site, "window") == tuple(range(9))
    assert all(window_maps(AttentionSite("x", 1, 4), mode) is None for mode in ("shared", "class", "window"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"strict_img_size": False}, "strict_img_size=False makes the windows depend on the image"),
        ({"num_classes": 0}, r"no classifier \(num_classes=0\)"),
        ({"in_chans": 1}, "does not have 3 channels"),
        ({"global_pool": ""}, r"does not pool its tokens"),
    ],
)
def test_swin_that_cannot_be_supported_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedGraph, match=f"not supported: .*{reason}"):
        attention_sites(timm.create_model(SWIN_NAME, **{**SWIN_KWARGS, **changes}))


def test_foreign_attention_in_swin_is_refused() -> None:
    model = make_model(SWIN_NAME)
    model.layers[1].blocks[0].attn = torch.nn.Identity()
    with pytest.raises(UnsupportedGraph, match=r"layers\.1\.blocks\.0\.attn is a Identity"):
        attention_sites(model)
    model.layers[0].blocks[1] = torch.nn.Identity()
    with pytest.raises(UnsupportedGraph, match=r"layers\.0\.blocks\.1 is a Identity"):
        attention_sites(model)


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
def test_version_2_of_swin_is_refused_and_says_why(name: str) -> None:
    model = timm.create_model(name, depths=(1,), embed_dim=24, num_heads=(1,))
    with pytest.raises(
        UnsupportedGraph, match=r"class SwinTransformerV2.* cosine similarity.*; expected timm's Vision"
    ):
        attention_sites(model)


@pytest.mark.parametrize("kind", EVERYONE)
def test_steps_lead_from_the_embedding_to_the_norm(kind: str) -> None:
    model = make_member(kind)
    inputs: list[torch.Tensor] = []
    first = steps(model)[0][1]
    handle = first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.inference_mode():
        logits = model(images_for(model))
        handle.remove()
        (x,) = inputs
        for _, step in steps(model):
            x = step(x)
        assert torch.equal(model.forward_head(model.norm(x)), logits)
    assert {f"{path}.attn" for path, _ in steps(model)} >= {site.path for site in attention_sites(model)}


# --- tapped maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", EVERYONE)
def test_tapping_changes_no_bit_of_the_result(kind: str, fused: bool) -> None:
    model = set_fused(make_member(kind), fused)
    with torch.inference_mode():
        untapped = model(images_for(model))
    tapped, maps = collect_maps(model)
    assert torch.equal(tapped, untapped)
    assert list(maps) == [site.path for site in attention_sites(model)]
    with torch.inference_mode():
        maps.clear()
        model(images_for(model))
    assert not maps, "the taps outlive their block"


@pytest.mark.parametrize("kind", EVERYONE)
def test_tapped_maps_are_the_softmaxes_inside_timm(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = set_fused(make_member(kind), False)
    with recorded_softmaxes(monkeypatch) as inside, torch.inference_mode():
        model(images_for(model))
    _, maps = collect_maps(set_fused(model, True))
    for site, got, wanted in zip(attention_sites(model), maps.values(), inside, strict=True):
        assert got.shape == (6 * site.n_windows, site.heads, site.tokens, site.tokens)
        # the fused kernel of the first layer moves the input of the second one by a few ulp
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        by_image = got.view(6, -1, *got.shape[1:])
        assert float(by_image.std(dim=0).max()) > 0.1, "the maps hardly vary, so this test would not notice a mix-up"


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
    freeze_attention(model, {"blocks.1.attn": Constants(torch.tensor(heads, dtype=torch.int64), maps)})
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
    freeze_attention(model, {"blocks.1.attn": Constants(torch.tensor([0]), random_maps(1, 17, 17))})
    assert type(model.blocks[0].attn) is type(untouched.blocks[0].attn)
    with torch.inference_mode():
        assert not torch.allclose(model(IMAGES), untouched(IMAGES), atol=1e-2)


@pytest.mark.parametrize("kind", EVERYONE)
def test_freezing_to_an_images_own_maps_gives_that_images_logits(kind: str) -> None:
    model = make_member(kind)
    logits, maps = collect_maps(model)
    own = {}
    for site in attention_sites(model):
        first = maps[site.path][: site.n_windows].transpose(0, 1)  # [H, W, N, N]
        windows = window_maps(site, "window")
        own[site.path] = Constants(torch.arange(site.heads), first[:, 0] if windows is None else first, None, windows)
    freeze_attention(model, own)
    with torch.inference_mode():
        frozen = model(images_for(model))
    torch.testing.assert_close(frozen[0], logits[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(frozen[1], logits[1], atol=1e-2), "another image has other maps"


# --- freezing rows, entries and windows, against loops in float64 --------------------------------------------------


def window_attention_by_hand(
    block: Any, windows: NDArray[np.float64], frozen: dict[tuple[int, int, int], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """What `block.attn` returns for its input `windows` [B·W, N, D].

    Args:
        frozen: the constant of entry (head, query, key) in every window of an image, float64 [W].
    """
    attention = block.attn
    weights = {name: value.double().numpy() for name, value in attention.state_dict().items()}
    high, wide = attention.window_size
    places = [(y, x) for y in range(high) for x in range(wide)]
    heads, width = attention.num_heads, attention.qkv.weight.shape[0] // attention.num_heads // 3
    n_windows = 1 if block.attn_mask is None else len(block.attn_mask)
    n_windows = max(n_windows, *(len(values) for values in frozen.values())) if frozen else n_windows
    out = np.zeros((*windows.shape[:2], heads * width))
    for head in range(heads):
        rows = [slice((part * heads + head) * width, (part * heads + head + 1) * width) for part in range(3)]
        q, k, v = (windows @ weights["qkv.weight"][r].T + weights.get("qkv.bias", np.zeros(10**4))[r] for r in rows)
        for number in range(len(windows)):
            scores = q[number] @ k[number].T / np.sqrt(width)
            for i, (y1, x1) in enumerate(places):
                for j, (y2, x2) in enumerate(places):
                    row = (y1 - y2 + high - 1) * (2 * wide - 1) + x1 - x2 + wide - 1
                    scores[i, j] += weights["relative_position_bias_table"][row, head]
                    if block.attn_mask is not None:
                        scores[i, j] += float(block.attn_mask[number % n_windows, i, j])
            powers = np.exp(scores - scores.max(-1, keepdims=True))
            maps = powers / powers.sum(-1, keepdims=True)
            for (of_head, i, j), values in frozen.items():
                if of_head == head:
                    maps[i, j] = values[number % n_windows]
            out[number, :, head * width : (head + 1) * width] = maps @ v[number]
    return out @ weights["proj.weight"].T + weights["proj.bias"]


@pytest.mark.parametrize("granularity", ["head", "row", "entry"])
@pytest.mark.parametrize("mode", ["shared", "class", "window"])
@pytest.mark.parametrize(
    ("kind", "stage", "number"),
    [
        ("swin, more windows than classes", 0, 1),
        ("swin, padded", 0, 0),
        ("swin, oblong windows", 1, 1),
        ("swin", 1, 0),
    ],
)
def test_frozen_pieces_of_swin_use_their_windows_constants(
    kind: str, stage: int, number: int, mode: WindowMaps, granularity: str
) -> None:
    model = make_member(kind)
    path = f"layers.{stage}.blocks.{number}.attn"
    (site,) = (each for each in attention_sites(model) if each.path == path)
    used = window_maps(site, mode)
    assert used is not None
    N, heads = site.tokens, [1] if stage == 0 else [0, 3]
    constants = random_maps(len(heads), max(used) + 1, N, N)
    rng = np.random.default_rng(2)
    mask = {"head": None, "row": rng.random((len(heads), N)) < 0.5, "entry": rng.random((len(heads), N, N)) < 0.4}[
        granularity
    ]
    spread = np.broadcast_to(True if mask is None else mask[..., None] if mask.ndim == 2 else mask, (len(heads), N, N))
    frozen = {(heads[f], i, j): constants[f, list(used), i, j].double().numpy() for f, i, j in np.argwhere(spread)}
    block = model.layers[stage].blocks[number]
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    tensor = None if mask is None else torch.from_numpy(mask)
    freeze_attention(model, {path: Constants(torch.tensor(heads), constants, tensor, used)})
    frozen_attention = block.attn
    frozen_attention.register_forward_hook(lambda *args: outputs.append(args[-1]))
    frozen_attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.inference_mode():
        model(images_for(model, 2))
    block.attn = frozen_attention.attention
    wanted = window_attention_by_hand(block, inputs[0].double().numpy(), frozen)
    np.testing.assert_allclose(outputs[0].numpy(), wanted, atol=3e-5)


@pytest.mark.parametrize("axes", [1, 2], ids=["rows", "entries"])
def test_masked_pieces_of_vit_are_constants_and_the_rest_its_own(axes: int) -> None:
    model = make_model()
    own: list[torch.Tensor] = []
    with torch.inference_mode(), tapped_maps(model, attention_sites(model)[:1], lambda _, m: own.append(m)):
        model(IMAGES)
    mask = torch.rand((2, *[17] * axes), generator=torch.Generator().manual_seed(0)) < 0.5
    constants = random_maps(2, 17, 17)
    wanted = own[0].clone()
    for f, head in enumerate((0, 2)):
        for image in range(len(IMAGES)):
            wanted[image, head][mask[f]] = constants[f][mask[f]]
    by_image, masked = make_model(), make_model()
    freeze_attention(masked, {"blocks.0.attn": Constants(torch.tensor([0, 2]), constants, mask)})
    with torch.inference_mode():
        got = masked(IMAGES)
        for image in range(len(IMAGES)):
            freeze_attention(by_image, {"blocks.0.attn": Constants(torch.arange(3), wanted[image])})
            torch.testing.assert_close(
                got[image : image + 1], by_image(IMAGES[image : image + 1]), atol=1e-5, rtol=1e-5
            )
            by_image.blocks[0].attn = by_image.blocks[0].attn.attention
