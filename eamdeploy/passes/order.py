"""The passes, in the order in which they run, and how many places each must change.

| pass                | depends on          | places                                     |
|---------------------|---------------------|--------------------------------------------|
| static_shapes       | -                   | wherever the exporter computed a shape     |
| fold_preprocess     | -                   | the patch embedding, if asked for          |
| gather_tokens       | -                   | wherever the exporter spelled it so        |
| window_order        | gather_tokens       | every block whose windows divide the image |
| merge_gathers       | window_order        | most of those                              |
| merge_reshapes      | -                   | wherever a pass left some                  |
| add_position        | -                   | one, where tokens stand beside the patches |
| fold_layer_scale    | -                   | every LayerScale                           |
| zero_mask           | -                   | every block with shifted windows           |
| canonical_attention | -                   | every attention module                     |
| scale_into_query    | canonical_attention | every one without a norm of its queries    |
| drop_key_bias       | canonical_attention | every one with biased keys and no norm     |
| fold_value_bias     | canonical_attention | every one with biased values, but not      |
|                     |                     | where entries are frozen                   |
| class_token_only    | canonical_attention | the last module, where the classifier      |
|                     |                     | reads at most half of the tokens           |
| freeze_heads        | -                   | every attention module with frozen maps    |
| fusable_gelu        | -                   | wherever the exporter spelled it so        |

The last two columns of a model without windows are empty for the four about windows.

All that always run may be left out but freeze_heads, and take along those that depend on them: without them these would
find nothing, or do their work, as every pass that changes attention writes it in canonical form. freeze_heads does so
too, with the modules that have frozen maps. The order matters beyond that: static_shapes shows gather_tokens longer
chains, and a mask must be found before canonical_attention makes it one constant with the position bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eamdeploy.errors import ConfigError
from eamdeploy.passes.add_position import AddPosition
from eamdeploy.passes.base import PlannedPass
from eamdeploy.passes.canonical_attention import CanonicalAttention
from eamdeploy.passes.class_token_only import ClassTokenOnly
from eamdeploy.passes.drop_key_bias import DropKeyBias
from eamdeploy.passes.fold_layer_scale import FoldLayerScale
from eamdeploy.passes.fold_preprocess import FoldPreprocess
from eamdeploy.passes.fold_value_bias import FoldValueBias
from eamdeploy.passes.freeze_heads import AttentionModule, FreezeHeads
from eamdeploy.passes.fusable_gelu import FusableGelu
from eamdeploy.passes.gather_tokens import GatherTokens
from eamdeploy.passes.merge_gathers import MergeGathers
from eamdeploy.passes.merge_reshapes import MergeReshapes
from eamdeploy.passes.scale_into_query import ScaleIntoQuery
from eamdeploy.passes.static_shapes import StaticShapes
from eamdeploy.passes.window_order import WindowOrder
from eamdeploy.passes.zero_mask import ZeroMask


@dataclass(frozen=True)
class Parts:
    """How often a model has what some passes change, attention aside; None where that is not known.

    Attributes:
        embeddings: places where tokens of weights are put beside the patches and positions are added.
        layer_scales: learned factors of channels behind attention or MLP.
    """

    embeddings: int | None = None
    layer_scales: int | None = None


UNKNOWN = Parts()

SWITCHABLE: Mapping[str, str | None] = {
    StaticShapes.name: None,
    GatherTokens.name: None,
    WindowOrder.name: GatherTokens.name,
    MergeGathers.name: WindowOrder.name,
    MergeReshapes.name: None,
    AddPosition.name: None,
    FoldLayerScale.name: None,
    ZeroMask.name: None,
    CanonicalAttention.name: None,
    ScaleIntoQuery.name: CanonicalAttention.name,
    DropKeyBias.name: CanonicalAttention.name,
    FoldValueBias.name: CanonicalAttention.name,
    ClassTokenOnly.name: CanonicalAttention.name,
    FusableGelu.name: None,
}
"""The passes that run unless they are left out, in order, and what each depends on."""
_NOT_SWITCHABLE = {
    FreezeHeads.name: "The unfrozen twin is what --baseline writes.",
    FoldPreprocess.name: "It only runs with --fold-preprocess.",
}


def with_dependents(names: Iterable[str]) -> frozenset[str]:
    """`names` and the passes that depend on them, directly or through another.

    Raises:
        ConfigError: a name is not that of a pass that can be left out.
    """
    wanted = frozenset(names)
    for name in sorted(wanted - SWITCHABLE.keys()):
        raise ConfigError(
            f"the pass {name} can't be left out" if name in _NOT_SWITCHABLE else f"there is no pass {name}",
            expected=f"some of {', '.join(SWITCHABLE)}",
            hint=_NOT_SWITCHABLE.get(name),
        )
    for name, needed in SWITCHABLE.items():  # in order, so that what depends on a dependent comes behind it
        if needed in wanted:
            wanted |= {name}
    return wanted


def plan_passes(
    modules: Sequence[AttentionModule],
    parts: Parts = UNKNOWN,
    fold: FoldPreprocess | None = None,
    without: frozenset[str] = frozenset(),
) -> list[PlannedPass[Any]]:
    """The passes for a model with these attention modules and parts; without frozen maps, for its unfrozen twin.

    Args:
        fold: for a model whose input becomes pixels; None where it stays normalized.
        without: passes that are left out, see `with_dependents`.
    """
    frozen = sum(module.frozen is not None for module in modules)
    plan: list[PlannedPass[Any]] = [
        *([] if fold is None else [PlannedPass(fold, expected=1)]),
        *(PlannedPass(p, expected=None) for p in (StaticShapes(), GatherTokens(), WindowOrder(), MergeGathers())),
        PlannedPass(MergeReshapes(), expected=None),
        PlannedPass(AddPosition(), expected=parts.embeddings),
        PlannedPass(FoldLayerScale(), expected=parts.layer_scales),
        PlannedPass(ZeroMask(), expected=None),
        PlannedPass(CanonicalAttention(), expected=len(modules)),
        PlannedPass(ScaleIntoQuery(), expected=None),
        PlannedPass(DropKeyBias(), expected=None),
    ]
    if not any(module.frozen and module.frozen.mixes_rows for module in modules):
        plan.append(PlannedPass(FoldValueBias(), expected=None))
    few = sum(module.read_tokens is not None for module in modules)
    plan.append(PlannedPass(ClassTokenOnly(), expected=few))
    if frozen:
        plan.append(PlannedPass(FreezeHeads(modules), expected=frozen))
    plan.append(PlannedPass(FusableGelu(), expected=None))
    return [planned for planned in plan if planned.rewrite_pass.name not in without]
