"""What is frozen becomes integer constants; queries, keys, scores and softmax of frozen heads are gone.

Before:  o = concat_h softmax(s·q_h·k_hᵀ + b_h)·v_h ; y = o·Wo
After:   o = concat(live heads as before, heads with frozen rows or entries, F_h·v_h of frozen heads)
         y = o·Wo with its rows in that order of heads
         heads of low rank F_h = U_h·P_h are not in o:  y + Σ_h U_h·((P_h·x)·Wv_h·Wo_h)
         where all heads are of low rank, the sum is y, and there is no Wo of N tokens
Shapes:  q [B·W,L,R,d]  k [B·W,L,N,d]  F [M,F,R,N] = scales·integers  v of frozen heads [B·W,F,N,d]  Wo [H·d,D];
         U [M,R,Σr]  P [M,Σr,N] of all heads of low rank;
         R = N, or fewer where only some tokens have queries: the other rows of frozen maps are left out
Needs:   the attention's value projection is the checkpoint's, head for head, with as many tokens and windows
Exact:   against the reference forward of the checkpoint, up to float32 reassociation (tolerance f32-reassoc)
Source:  docs/design.md, Freeze heads; docs/design.md, Heads of low rank;
         rows and entries in `graph.emit_partial`, low rank in `graph.emit_factors`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from eamdeploy.errors import UnsupportedGraph
from eamdeploy.graph.attention import Attention, find_attention
from eamdeploy.graph.emit import emit_attention
from eamdeploy.graph.emit_factors import emit_factors
from eamdeploy.graph.frozen import (
    IntegerFactors,
    IntegerMaps,
    head_groups,
    mix_rows,
    padded,
    pool_rows,
)
from eamdeploy.graph.nodes import redirect
from eamdeploy.graph.skip import Skip
from eamdeploy.graph.writer import GraphWriter


@dataclass(frozen=True, eq=False)
class AttentionModule:
    """An attention module of the checkpoint, in the model's order.

    Attributes:
        path: its timm module path.
        value_weight: float32 `[H·d, D]`, the rows of the checkpoint that compute values: how the module is recognised.
        frozen: its frozen maps, or None.
        read_tokens: the tokens whose rows anything reads, at most half of them; None for all.
        factors: its heads of low rank, one group for each rank.
    """

    path: str
    value_weight: NDArray[np.float32]
    frozen: IntegerMaps | None
    read_tokens: tuple[int, ...] | None = None
    factors: tuple[IntegerFactors, ...] = ()

    @property
    def has_frozen(self) -> bool:
        """Whether any head has something frozen."""
        return self.frozen is not None or bool(self.factors)

    @property
    def low_rank(self) -> tuple[int, ...]:
        """The heads of low rank, in the order in which they are computed."""
        return tuple(head for group in self.factors for head in group.heads)


@dataclass(frozen=True, eq=False)
class _Match:
    module: AttentionModule
    attention: Attention


class FreezeHeads:
    """Folds the frozen maps of `modules` into the graph.

    Args:
        modules: every attention module of the model, in its order, frozen or not.
    """

    name = "freeze_heads"

    def __init__(self, modules: Sequence[AttentionModule]) -> None:
        self._modules = tuple(modules)

    def match(self, graph: gs.Graph) -> list[_Match | Skip]:
        """One match for every module with frozen heads; a `Skip` for one that the graph does not have.

        Modules with the same value weights are told apart by their order.

        Raises:
            UnsupportedGraph: a module's frozen maps do not fit the attention with its value weights.
        """
        items = find_attention(graph)
        unclaimed = [item for item in items if isinstance(item, Attention)]
        result: list[_Match | Skip] = [item for item in items if isinstance(item, Skip)]
        for module in self._modules:
            attention = next((item for item in unclaimed if _is_module(item, module)), None)
            if attention is not None:
                unclaimed.remove(attention)
            if not module.has_frozen:
                continue
            if attention is None:
                result.append(Skip(f"no attention of the graph has the value weights of {module.path}", module.path))
                continue
            if module.frozen is not None:
                _check_maps(module.path, module.frozen, attention)
            if module.factors:
                _check_factors(module, attention)
            result.append(_Match(module, attention))
        return result

    def rewrite(self, graph: gs.Graph, match: _Match) -> None:
        """The output projection reads live heads, then partly and wholly frozen ones; its rows follow that order."""
        module, attention = match.module, match.attention
        frozen = None if module.frozen is None else module.frozen.of_rows(attention.query_tokens)
        writer = GraphWriter(graph, module.path)
        projection, low_rank = attention.projection, module.low_rank
        result = projection.outputs[0]
        readers, weight = list(result.outputs), projection.inputs[1].values
        rows_of_heads = weight.reshape(attention.heads, attention.head_dim, -1)  # [H, d, D]
        rest = head_groups(attention.heads, frozen, low_rank).order
        if rest:
            projection.inputs[0] = emit_attention(writer, attention, frozen, low_rank)
            rows = rows_of_heads[rest].reshape(-1, weight.shape[1])
            projection.inputs[1] = writer.constant("proj_weight", rows)
        if low_rank:
            groups = [group.of_rows(attention.query_tokens) for group in module.factors]
            added = emit_factors(writer, attention, groups, rows_of_heads)
            if rest:
                added = writer.node("with_low_rank", "Add", [result, added], result.shape)
            redirect(result, added, readers)


def _is_module(attention: Attention, module: AttentionModule) -> bool:
    weight = attention.value.weight
    return np.array_equal(weight.reshape(weight.shape[0], -1).T, module.value_weight)


def _check_maps(path: str, frozen: IntegerMaps, attention: Attention) -> None:
    if not frozen.heads or list(frozen.heads) != sorted({*frozen.heads} & {*range(attention.heads)}):
        raise UnsupportedGraph(
            f"the frozen heads of {path} do not fit the graph",
            expected=f"some of 0…{attention.heads - 1}, ascending",
            got=list(frozen.heads),
        )
    tokens = attention.tokens
    rows = [len(frozen.heads), max(frozen.windows) + 1, tokens]
    mask = None if frozen.mask is None else [len(frozen.heads), tokens, tokens][: frozen.mask.ndim]
    expected = _form(attention.windows, [*rows, tokens], rows, mask)
    arrays = (frozen.integers, frozen.scales, frozen.mask)
    got = _form(len(frozen.windows), *(None if array is None else list(array.shape) for array in arrays))
    if got != expected:
        raise UnsupportedGraph(f"the frozen maps of {path} do not fit the graph", expected=expected, got=got)


def _check_factors(module: AttentionModule, attention: Attention) -> None:
    """The factors are of some of the attention's heads that have no map, and of its size."""
    heads = list(module.low_rank)
    maps = set() if module.frozen is None else {*module.frozen.heads}
    free = sorted({*range(attention.heads)} - maps)
    if len({*heads}) < len(heads) or not {*heads} <= {*free}:
        raise UnsupportedGraph(
            f"the heads of low rank of {module.path} do not fit the graph",
            expected=f"some of {free}, each once",
            got=heads,
        )
    for group in module.factors:
        count, n_maps, rank = len(group.heads), max(group.windows) + 1, group.rank
        mix, pool = [count, n_maps, attention.tokens], [count, n_maps, rank]
        expected = [attention.windows, [*mix, rank], mix, [*pool, attention.tokens], pool]
        arrays = (group.mix, group.mix_scales, group.pool, group.pool_scales)
        got = [len(group.windows), *(list(array.shape) for array in arrays)]
        if got != expected:
            raise UnsupportedGraph(
                f"the factors of rank {rank} of {module.path} do not fit the graph",
                expected=f"windows, mix, its scales, pool, its scales of {expected}",
                got=got,
            )


def _form(windows: int, integers: list[int] | None, scales: list[int] | None, mask: list[int] | None) -> str:
    return f"{windows} windows, integers {integers} and scales {scales}" + (f", mask {mask}" if mask else "")


def check_accounted(model: onnx.ModelProto, modules: Sequence[AttentionModule]) -> None:
    """Nothing happens if every frozen map's integers stand in `model`, value for value, behind a DequantizeLinear.

    Of a map of which only some rows are read, that is these rows.

    Raises:
        UnsupportedGraph: a module's maps are not there; its path and heads are named.
    """
    constants = {item.name: item for item in model.graph.initializer}
    dequantized = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    stored = [onnx.numpy_helper.to_array(constants[name]) for name in dequantized if name in constants]
    for module in modules:
        for heads, wanted in stored_maps(module):
            if not any(item.dtype == wanted.dtype and np.array_equal(item, wanted) for item in stored):
                raise UnsupportedGraph(
                    f"frozen heads of {module.path} are not in the exported graph",
                    expected=f"the integer maps of heads {list(heads)}",
                    got=f"{len(stored)} other dequantized constants",
                )


def stored_maps(
    module: AttentionModule,
) -> Iterator[tuple[tuple[int, ...], NDArray[np.unsignedinteger]]]:
    """Heads, and the integers `[rows, N]` that one constant must hold for them, in this order.

    Of maps of which only some rows are read, the integers are those of these rows.
    """
    if module.factors:
        factors = [group.of_rows(module.read_tokens) for group in module.factors]
        for rows in (pool_rows(factors), *map(mix_rows, factors)):
            yield rows.heads, rows.integers
    frozen = None if module.frozen is None else module.frozen.of_rows(module.read_tokens)
    if frozen is None:
        return
    groups = head_groups(max(frozen.heads) + 1, frozen)
    for heads in filter(None, (groups.partial, groups.whole)):
        chosen = frozen.take(heads)
        integers = chosen.integers
        if heads == groups.partial and chosen.by_row:
            assert chosen.mask is not None, "some rows are frozen"
            integers = np.take_along_axis(integers, padded(chosen.mask)[:, None, :, None], axis=2)
        yield heads, integers.swapaxes(0, 1).reshape(-1, integers.shape[-1])
