"""The one list of rewrites: what each needs, at how many places it must fire, and who gets it.

The plans for torch's exports, for TensorRT and for ONNX Runtime (`passes.order`), what `--without`
may leave out, and the list in the documentation are views of `REWRITES`.

The order of the rows is the order in which passes run. Beyond what the rows say of needs,
static_shapes shows longer chains to gather_tokens, and zero_mask must find a mask before
canonical_attention puts the mask and the position bias into one constant. fold_value_bias is
planned for no model in which a row of a map has frozen and live entries: such a row need not sum
to 1. freeze_heads and the passes behind canonical_attention write attention in canonical form, so
they would do the work of canonical_attention if it were left out alone.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from eamdeploy.passes.add_position import AddPosition
from eamdeploy.passes.base import Pass, PlannedPass
from eamdeploy.passes.canonical_attention import CanonicalAttention
from eamdeploy.passes.class_token_only import ClassTokenOnly
from eamdeploy.passes.decompose_layer_norm import DecomposeLayerNorm
from eamdeploy.passes.drop_key_bias import DropKeyBias
from eamdeploy.passes.facts import Facts
from eamdeploy.passes.float_maps import FloatMaps
from eamdeploy.passes.fold_layer_scale import FoldLayerScale
from eamdeploy.passes.fold_preprocess import FoldPreprocess
from eamdeploy.passes.fold_value_bias import FoldValueBias
from eamdeploy.passes.freeze_heads import AttentionModule, FreezeHeads
from eamdeploy.passes.fusable_gelu import FusableGelu
from eamdeploy.passes.fused_attention import FusedAttention
from eamdeploy.passes.gather_tokens import GatherTokens
from eamdeploy.passes.int8_maps import Int8Maps
from eamdeploy.passes.integer_map_products import IntegerMapProducts
from eamdeploy.passes.merge_gathers import MergeGathers
from eamdeploy.passes.merge_reshapes import MergeReshapes
from eamdeploy.passes.quantize_products import QuantizeProducts, Range
from eamdeploy.passes.requantize_maps import RequantizeMaps
from eamdeploy.passes.scale_into_query import ScaleIntoQuery
from eamdeploy.passes.static_shapes import StaticShapes
from eamdeploy.passes.window_order import WindowOrder
from eamdeploy.passes.zero_mask import ZeroMask


class Target(Enum):
    """Who gets a rewrite; the value is what the documentation calls it."""

    EVERY_EXPORT = "every export"
    TRT_INTEGER_MAPS = "TensorRT with integer maps"
    TRT_FLOAT_MAPS = "TensorRT without integer maps"
    TRT_SPELLED_NORMS = "TensorRT without LayerNormalization"
    TRT_INT8 = "TensorRT in INT8"
    ORT_FUSED = "ONNX Runtime, fused attention"
    ORT_INT8 = "ONNX Runtime, static INT8"


@dataclass(frozen=True, eq=False)
class Given:
    """What passes are made from.

    Attributes:
        modules: every attention module of the model, frozen or not.
        fold: for a model whose input becomes pixels; None where the input stays normalized.
        ranges: smallest and largest value of computed tensors, by name, from calibration.
        unsigned: the runtime takes UINT8 activations, and may saturate sums of pairs of products.
    """

    modules: tuple[AttentionModule, ...] = ()
    fold: FoldPreprocess | None = None
    ranges: Mapping[str, Range] | None = None
    unsigned: bool = False

    @property
    def known_ranges(self) -> Mapping[str, Range]:
        """`ranges`, of a target that is calibrated."""
        assert self.ranges is not None, "a target in INT8 is calibrated"
        return self.ranges


@dataclass(frozen=True)
class Places:
    """How many places a pass must change.

    Attributes:
        text: which places; or why their number is not known.
        count: their number, None where `Facts` do not tell it; `count` itself is None where no
            facts could.
        relies_on: passes without which the number is not known.
    """

    text: str
    count: Callable[[Facts], int | None] | None = None
    relies_on: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One rewrite.

    Attributes:
        kind: the class of the pass.
        places: how many places the pass must change.
        targets: who gets the pass.
        needs: the pass without which this one would find nothing, or do that pass's work.
        make: the pass for a model, None where the model does not want it; `kind()` by default.
        kept: why `--without` can't leave the pass out; None where `--without` can.
    """

    kind: type[Any]
    places: Places
    targets: tuple[Target, ...] = (Target.EVERY_EXPORT,)
    needs: str | None = None
    make: Callable[[Given], Pass[Any] | None] | None = None
    kept: str | None = None

    @property
    def name(self) -> str:
        """The name of the pass."""
        return str(self.kind.name)

    @property
    def effect(self) -> str:
        """What the pass does in one line: the first line of its module."""
        documentation = sys.modules[self.kind.__module__].__doc__ or ""
        return documentation.partition("\n")[0]

    def plan(
        self,
        given: Given,
        facts: Facts,
        without: frozenset[str] = frozenset(),
    ) -> PlannedPass[Any] | None:
        """The pass and how many places it must change; None for a model that does not want it."""
        made = self.kind() if self.make is None else self.make(given)
        if made is None:
            return None
        unknown = self.places.count is None or without.intersection(self.places.relies_on)
        expected = None if unknown or self.places.count is None else self.places.count(facts)
        return PlannedPass(made, expected)


def _fold_value_bias(given: Given) -> FoldValueBias | None:
    """None where a row mixes frozen and live entries: such a row need not sum to 1."""
    mixed = any(module.frozen and module.frozen.mixes_rows for module in given.modules)
    return None if mixed else FoldValueBias()


def _freeze_heads(given: Given) -> FreezeHeads | None:
    """None for the unfrozen twin."""
    frozen = any(module.has_frozen for module in given.modules)
    return FreezeHeads(given.modules) if frozen else None


def _quantize_products(given: Given) -> QuantizeProducts:
    """Unsigned integers and sums of pairs are one question: both are ONNX Runtime's alone."""
    on_ort = given.unsigned
    return QuantizeProducts(given.known_ranges, unsigned=on_ort, for_pairs=on_ort)


_ATTENTION_MODULES = Places("every attention module", lambda facts: facts.attentions)
_SHAPES_KNOWN = (StaticShapes.name,)
"""Computed shapes cut chains of moves in two: a Swin with 9 moves of tokens showed 12."""
_COLUMNS = 100
"""Of a line in the documentation."""
_OF_TARGET = "The target does not take the graph without it."
_OF_FORM = "The form that is asked for consists of it."

REWRITES: tuple[Row, ...] = (
    Row(
        FoldPreprocess,
        Places("the convolution that reads the image", lambda _: 1),
        make=lambda given: given.fold,
        kept="It only runs with --fold-preprocess.",
    ),
    Row(
        StaticShapes,
        Places("unknown: TorchScript computes shapes, dynamo writes most of them as constants"),
    ),
    Row(
        GatherTokens,
        Places(
            "two for each window block, one for each patch merging",
            lambda facts: facts.parts.token_moves,
            relies_on=_SHAPES_KNOWN,
        ),
    ),
    Row(
        WindowOrder,
        Places(
            "every block whose windows divide the image and reorder its tokens",
            lambda facts: facts.parts.reordering_blocks,
            relies_on=_SHAPES_KNOWN,
        ),
        needs=GatherTokens.name,
    ),
    Row(
        MergeGathers,
        Places(
            "of those, every block with another, patch merging or pooling behind it",
            lambda facts: facts.parts.reorderings_met,
            relies_on=_SHAPES_KNOWN,
        ),
        needs=WindowOrder.name,
    ),
    Row(MergeReshapes, Places("unknown: what exporters and other passes leave behind")),
    Row(
        AddPosition,
        Places(
            "one, where tokens of weights stand beside the patches",
            lambda facts: facts.parts.embeddings,
        ),
    ),
    Row(FoldLayerScale, Places("every LayerScale", lambda facts: facts.parts.layer_scales)),
    Row(ZeroMask, Places("every block with shifted windows", lambda facts: facts.parts.masks)),
    Row(CanonicalAttention, _ATTENTION_MODULES),
    Row(
        ScaleIntoQuery,
        Places(
            "every attention module with a scale and no norm of queries",
            lambda facts: facts.parts.scaled_queries,
        ),
        needs=CanonicalAttention.name,
    ),
    Row(
        DropKeyBias,
        Places(
            "every attention module with biased keys and no norm behind the bias",
            lambda facts: facts.parts.biased_keys,
        ),
        needs=CanonicalAttention.name,
    ),
    Row(
        FoldValueBias,
        Places(
            "every attention module with biased values and output, unless entries are frozen",
            lambda facts: facts.parts.biased_values,
        ),
        needs=CanonicalAttention.name,
        make=_fold_value_bias,
    ),
    Row(
        ClassTokenOnly,
        Places(
            "every attention module of which at most half of the tokens are read",
            lambda facts: facts.shortened,
        ),
        needs=CanonicalAttention.name,
    ),
    Row(
        FreezeHeads,
        Places("every attention module with frozen maps", lambda facts: facts.frozen),
        make=_freeze_heads,
        kept="The unfrozen twin is what --baseline writes.",
    ),
    Row(
        FusableGelu,
        Places("unknown: dynamo halves every GELU early, TorchScript none; from opset 20 on, Gelu"),
    ),
    Row(
        RequantizeMaps,
        Places("every constant of frozen maps over 127", lambda facts: facts.wide_maps),
        targets=(Target.TRT_INTEGER_MAPS,),
        kept=_OF_TARGET,
    ),
    Row(
        Int8Maps,
        Places("every constant of frozen maps", lambda facts: facts.maps),
        targets=(Target.TRT_INTEGER_MAPS,),
        kept=_OF_TARGET,
    ),
    Row(
        IntegerMapProducts,
        Places("unknown: every product of frozen maps, if the range of its values was measured"),
        targets=(Target.ORT_INT8,),
        make=lambda given: IntegerMapProducts(given.known_ranges),
        kept=_OF_FORM,
    ),
    Row(
        FloatMaps,
        Places("every constant of frozen maps; in INT8, what is left", lambda facts: facts.maps),
        targets=(Target.TRT_FLOAT_MAPS, Target.ORT_INT8),
        kept=_OF_TARGET,
    ),
    Row(
        DecomposeLayerNorm,
        Places("unknown: the operator set decides whether the exporter spelled norms out"),
        targets=(Target.TRT_SPELLED_NORMS,),
        kept=_OF_TARGET,
    ),
    Row(
        FusedAttention,
        Places("unknown, at least one: the batch and the windows' biases decide"),
        targets=(Target.ORT_FUSED,),
        kept=_OF_FORM,
    ),
    Row(
        QuantizeProducts,
        Places("unknown, on ONNX Runtime at least one: every product whose ranges were measured"),
        targets=(Target.TRT_INT8, Target.ORT_INT8),
        make=_quantize_products,
        kept=_OF_FORM,
    ),
)


def listing() -> str:
    """All rewrites as a list in Markdown, as the documentation has them."""
    return "\n".join(map(_item, REWRITES)) + "\n"


def _item(row: Row) -> str:
    """A rewrite: what it does, who gets it, what it needs, how many places it must change."""
    facts = [
        f"For: {'; '.join(target.value for target in row.targets)}.",
        *([f"Needs: `{row.needs}`."] if row.needs else []),
        f"Places: {row.places.text}.",
    ]
    lines = (f"- **`{row.name}`**: {row.effect}", f"  {' '.join(facts)}")
    return "\n".join(textwrap.fill(each, _COLUMNS, subsequent_indent="  ") for each in lines)
