"""Maps and factors that learn: they start as the checkpoint's, and give what would be stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from made_checkpoints import frozen_maps
from tiny_models import SWIN_NAME, images, make_model

from eamdeploy.eam.quantizers import dequantize, quantize_rows
from eamdeploy.eam.records import AttentionShape, FrozenFactors, FrozenMaps, spread_mask
from eamdeploy.host.attention import FrozenAttention, attention_sites, put_attention
from eamdeploy.host.reference import constants_of_module
from eamdeploy.host.sites import attention_shapes
from eamdeploy.recovery.learning import LearningAttention, LearningRows
from eamdeploy.vocabulary import BITS, GRANULARITIES, QUANTIZERS, Bits, Granularity, Quantizer

SHAPE = AttentionShape(heads=3, tokens=17, windows=None)
WINDOWED = AttentionShape(heads=2, tokens=16, windows=[0, 1, 1, 2])


def made_maps(granularity: Granularity, bits: Bits, quantizer: Quantizer, shape: AttentionShape = SHAPE) -> FrozenMaps:
    return frozen_maps(np.random.default_rng(0), shape, [0, 1], granularity, bits, quantizer)


def learning_rows(maps: FrozenMaps, bits: Bits, quantizer: Quantizer) -> LearningRows:
    return LearningRows(maps.codes, maps.scales, spread_mask(maps.mask, maps.codes.shape), bits, quantizer)


def made_factors(heads: list[int], rank: int, shape: AttentionShape, bits: Bits, quantizer: Quantizer) -> FrozenFactors:
    rng = np.random.default_rng(rank)
    mix = rng.dirichlet(np.ones(rank), size=(len(heads), *shape.rows))
    pool = rng.dirichlet(np.ones(shape.tokens), size=(len(heads), *shape.rows[:-1], rank))
    return FrozenFactors(
        np.array(heads, np.int64), *quantize_rows(mix, bits, quantizer), *quantize_rows(pool, bits, quantizer)
    )


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [SHAPE, WINDOWED], ids=["vit", "windows"])
def test_rows_start_as_they_were(
    granularity: Granularity, bits: Bits, quantizer: Quantizer, shape: AttentionShape
) -> None:
    maps = made_maps(granularity, bits, quantizer, shape)
    rows = learning_rows(maps, bits, quantizer)
    expected = dequantize(maps.codes, maps.scales, quantizer)
    for found in (rows.forward().detach().numpy(), dequantize(*rows.stored(), quantizer)):
        same = np.isclose(found, expected, rtol=0, atol=2e-6).mean()
        assert same == 1 if quantizer == "squared" else same > 0.99, "a row may find another peak"


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_rows_give_what_is_stored_and_keep_their_sums(
    granularity: Granularity, bits: Bits, quantizer: Quantizer
) -> None:
    maps = made_maps(granularity, bits, quantizer)
    rows = learning_rows(maps, bits, quantizer)
    with torch.no_grad():
        rows.logits.add_(torch.randn(rows.logits.shape, generator=torch.Generator().manual_seed(1)), alpha=2.0)
    codes, scales = rows.stored()
    stored = dequantize(codes, scales, quantizer)
    given = rows.forward().detach().numpy()
    near = np.isclose(given, stored, rtol=0, atol=1e-5).mean()
    assert near > 0.999, "float32 may take the other code of a tie"
    before = dequantize(maps.codes, maps.scales, quantizer)
    assert np.abs(stored - before).max() > 0.01, "the rows have moved"
    np.testing.assert_allclose(stored.sum(-1), before.sum(-1), atol=1e-5)
    assert not stored[~spread_mask(maps.mask, stored.shape)].any()


def test_the_gradient_is_that_of_the_rows_before_they_are_quantized() -> None:
    maps = made_maps("head", 2, "squared")
    rows = learning_rows(maps, 2, "squared")
    wanted = torch.randn(rows.logits.shape, generator=torch.Generator().manual_seed(2))
    (through,) = torch.autograd.grad((rows.forward() * wanted).sum(), rows.logits)
    (expected,) = torch.autograd.grad((rows.logits.softmax(-1) * wanted).sum(), rows.logits)
    torch.testing.assert_close(through, expected)
    assert expected.abs().max() > 0


CASES: list[tuple[str, Granularity, bool]] = [
    *((name, granularity, False) for name in ("vit_tiny_patch16_224", SWIN_NAME) for granularity in GRANULARITIES),
    ("vit_tiny_patch16_224", "head", True),
    (SWIN_NAME, "head", True),
]


@pytest.mark.parametrize(("name", "granularity", "ranks"), CASES)
def test_attention_starts_as_the_frozen_one(name: str, granularity: Granularity, ranks: bool) -> None:
    model: Any = make_model(name)
    site = next(site for site in attention_sites(model) if site.classes is None or len(set(site.classes)) > 1)
    shape = attention_shapes([site], None if site.classes is None else "class")[site.path]
    maps = frozen_maps(np.random.default_rng(3), shape, [0], granularity)
    factors = (made_factors([1], 3, shape, 3, "squared"),) if ranks else ()
    attention, pictures = model.get_submodule(site.path), images(3)
    found = []
    for module in (
        FrozenAttention(attention, constants_of_module(maps, factors, "squared", shape)),
        LearningAttention(attention, maps, factors, shape, 3, "squared"),
    ):
        put_attention(model, site.path, module)
        found.append(model(pictures))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    found[1].sum().backward()
    learning = model.get_submodule(site.path)
    learnt = {key for key, each in learning.named_parameters() if each.grad is not None and each.grad.abs().max() > 0}
    logits = {"rows.logits", "groups.0.mix.logits", "groups.0.pool.logits"} if ranks else {"rows.logits"}
    assert logits <= learnt and any(key.startswith("attention.qkv") for key in learnt)
    own_maps, own_factors = learning.stored()
    assert np.array_equal(own_maps.codes, maps.codes) and len(own_factors) == len(factors)
    for group, start in zip(own_factors, factors, strict=True):
        assert np.array_equal(group.mix_codes, start.mix_codes) and np.array_equal(group.pool_codes, start.pool_codes)
