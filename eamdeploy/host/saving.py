"""An EAM checkpoint of a timm model is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eamdeploy.artifacts.card import Freezing, Preprocessing
from eamdeploy.devices.provenance import package_versions
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.records import Calibration, Checkpoint, CheckpointHeader, FrozenFactors, FrozenMaps
from eamdeploy.errors import ConfigError
from eamdeploy.host.model import (
    ModelSpec,
    to_numpy,
)
from eamdeploy.host.sites import AttentionSite, attention_shapes


def check_class_names(class_names: list[str] | None, num_classes: int) -> None:
    if class_names is not None and len(class_names) != num_classes:
        raise ConfigError("the class names don't fit the model", expected=f"{num_classes} names", got=len(class_names))


def save_checkpoint(
    spec: ModelSpec,
    model: Any,
    sites: list[AttentionSite],
    how: Preprocessing,
    class_names: list[str] | None,
    freezing: Freezing,
    frozen: dict[str, FrozenMaps],
    calibration: Calibration | None,
    output: Path,
    factors: dict[str, tuple[FrozenFactors, ...]] | None = None,
) -> CheckpointHeader:
    header = CheckpointHeader(
        timm_model=spec.name,
        timm_kwargs=spec.plain_kwargs,
        weights=spec.source,
        num_classes=model.num_classes,
        class_names=class_names,
        preprocessing=how,
        attention=attention_shapes(sites, freezing.window_maps),
        freezing=freezing,
        calibration=calibration,
        versions=package_versions(),
    )
    return checkpoints.save(Checkpoint(to_numpy(model), frozen, header, factors or {}), output)
