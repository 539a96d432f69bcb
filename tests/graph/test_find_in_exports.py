from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from attention_graphs import Floats
from timm_graphs import DEPTH, EXPORTS, HEAD_DIM, D, Export, H, timm_model, tokens_of

from eamdeploy.graph.attention import Attention, find_attention
from eamdeploy.graph.operand import Norm


def by_head(rows: Floats) -> Floats:
    """Rows [H·d,D] of a torch linear layer as [D,H,d]."""
    return rows.T.reshape(D, H, HEAD_DIM)


@pytest.mark.parametrize("export", EXPORTS, ids=str)
def test_every_attention_of_an_export_is_found_with_the_models_weights(export: Export) -> None:
    model = timm_model(export.variant)
    found = find_attention(export.graph())
    assert len(found) == DEPTH
    for block, item in zip(model.blocks, found, strict=True):
        assert isinstance(item, Attention), item
        timm_attention = block.attn
        weight = timm_attention.qkv.weight.detach().numpy()
        bias = None if timm_attention.qkv.bias is None else timm_attention.qkv.bias.detach().numpy()
        for index, got in enumerate((item.query, item.key, item.value)):
            rows = slice(index * D, (index + 1) * D)
            np.testing.assert_array_equal(got.weight, by_head(weight[rows]))
            if bias is None:
                assert got.bias is None
            else:
                np.testing.assert_array_equal(got.bias, bias[rows].reshape(H, HEAD_DIM))
        np.testing.assert_array_equal(item.projection.inputs[1].values, timm_attention.proj.weight.detach().numpy().T)
        assert item.scale == pytest.approx(timm_attention.scale, rel=1e-6)
        assert (item.heads, item.tokens, item.head_dim) == (H, tokens_of(export.variant), HEAD_DIM)
        for norm, module in ((item.query_norm, timm_attention.q_norm), (item.key_norm, timm_attention.k_norm)):
            assert_norm(norm, module.weight.detach().numpy() if hasattr(module, "weight") else None)


def assert_norm(norm: Norm | None, gain: Floats | None) -> None:
    assert (norm is None) == (gain is None)
    if norm is not None and gain is not None:
        constants = [t.values for node in norm.nodes for t in node.inputs if isinstance(t, gs.Constant)]
        assert any(np.array_equal(constant, gain) for constant in constants)
