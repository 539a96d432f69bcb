"""The passes, in the order in which they run, and how many places each must change.

| pass                | depends on          | places                                  |
|---------------------|---------------------|-----------------------------------------|
| canonical_attention | -                   | every attention module                  |
| freeze_heads        | canonical_attention | every attention module with frozen maps |
| fusable_gelu        | -                   | wherever the exporter spelled it so     |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eamdeploy.passes.base import PlannedPass
from eamdeploy.passes.canonical_attention import CanonicalAttention
from eamdeploy.passes.freeze_heads import AttentionModule, FreezeHeads
from eamdeploy.passes.fusable_gelu import FusableGelu


def plan_passes(modules: Sequence[AttentionModule]) -> list[PlannedPass[Any]]:
    """The passes for a model with these attention modules; without frozen maps, for its unfrozen twin."""
    frozen = sum(module.frozen is not None for module in modules)
    plan: list[PlannedPass[Any]] = [PlannedPass(CanonicalAttention(), expected=len(modules))]
    if frozen:
        plan.append(PlannedPass(FreezeHeads(modules), expected=frozen))
    plan.append(PlannedPass(FusableGelu(), expected=None))
    return plan
