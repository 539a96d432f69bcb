"""The plans of passes, each a view of the one list `passes.rewrites.REWRITES`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from eamdeploy.errors import ConfigError
from eamdeploy.passes.base import PlannedPass
from eamdeploy.passes.facts import NOTHING_KNOWN, UNKNOWN, Facts, Parts, facts_of, facts_of_maps
from eamdeploy.passes.fold_preprocess import FoldPreprocess
from eamdeploy.passes.freeze_heads import AttentionModule
from eamdeploy.passes.quantize_products import Range
from eamdeploy.passes.rewrites import REWRITES, Given, Target

SWITCHABLE: Mapping[str, str | None] = {row.name: row.needs for row in REWRITES if not row.kept}
"""The passes that run unless they are left out, in order, and what each needs."""


def with_dependents(names: Iterable[str]) -> frozenset[str]:
    """`names` and the passes that need them, directly or through another.

    Raises:
        ConfigError: a name is not that of a pass that can be left out.
    """
    wanted = frozenset(names)
    kept = {row.name: row.kept for row in REWRITES if row.kept}
    for name in sorted(wanted - SWITCHABLE.keys()):
        raise ConfigError(
            f"the pass {name} can't be left out" if name in kept else f"there is no pass {name}",
            expected=f"some of {', '.join(SWITCHABLE)}",
            hint=kept.get(name),
        )
    for name, needed in SWITCHABLE.items():  # what a pass needs stands in front of the pass
        if needed in wanted:
            wanted |= {name}
    return wanted


def plan_passes(
    modules: Sequence[AttentionModule],
    parts: Parts = UNKNOWN,
    fold: FoldPreprocess | None = None,
    without: frozenset[str] = frozenset(),
) -> list[PlannedPass[Any]]:
    """The passes of every export, for a model with these attention modules and parts.

    Args:
        modules: without frozen maps, the plan is that of the unfrozen twin.
        fold: for a model whose input becomes pixels; None where the input stays normalized.
        without: passes that are left out, see `with_dependents`.
    """
    given = Given(modules=tuple(modules), fold=fold)
    return _plan((Target.EVERY_EXPORT,), given, facts_of(modules, parts), without)


def plan_trt(
    modules: Sequence[AttentionModule] | None = None,
    *,
    integer_maps: bool,
    layer_normalization: bool,
) -> list[PlannedPass[Any]]:
    """The passes behind those of `plan_passes`, for a TensorRT.

    Args:
        modules: the attention modules whose frozen maps the graph holds; None where only a file is
            known.
        integer_maps: that TensorRT builds integer constants as frozen maps.
        layer_normalization: that TensorRT knows the operator LayerNormalization.
    """
    targets = [Target.TRT_INTEGER_MAPS if integer_maps else Target.TRT_FLOAT_MAPS]
    targets += [] if layer_normalization else [Target.TRT_SPELLED_NORMS]
    return _plan(targets, Given(), NOTHING_KNOWN if modules is None else facts_of_maps(modules))


def plan_trt_int8(ranges: Mapping[str, Range]) -> list[PlannedPass[Any]]:
    """The passes behind those of `plan_trt`, for a TensorRT that computes in INT8.

    Args:
        ranges: smallest and largest value of computed tensors, by name, from calibration.
    """
    return _plan((Target.TRT_INT8,), Given(ranges=ranges))


def plan_ort(
    *,
    fused_attention: bool,
    ranges: Mapping[str, Range] | None,
) -> list[PlannedPass[Any]]:
    """The passes behind those of `plan_passes`, for a form that ONNX Runtime alone takes.

    Args:
        fused_attention: live attention becomes ONNX Runtime's own operator.
        ranges: smallest and largest value of computed tensors, by name, from calibration, for
            static INT8; None for a form without static INT8.
    """
    targets = [Target.ORT_FUSED] if fused_attention else []
    targets += [] if ranges is None else [Target.ORT_INT8]
    return _plan(targets, Given(ranges=ranges, unsigned=True))


def _plan(
    targets: Collection[Target],
    given: Given,
    facts: Facts = NOTHING_KNOWN,
    without: frozenset[str] = frozenset(),
) -> list[PlannedPass[Any]]:
    rows = [row for row in REWRITES if row.name not in without]
    chosen = [row for row in rows if not set(row.targets).isdisjoint(targets)]
    planned = (row.plan(given, facts, without) for row in chosen)
    return [each for each in planned if each is not None]
