"""The stages of `eamdeploy run` that need torch: freeze, recover and export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from eamdeploy.artifacts.files import digest_file, is_file
from eamdeploy.errors import host_packages
from eamdeploy.images.folder import folder_digest
from eamdeploy.images.source import read_class_names
from eamdeploy.observer import Observer
from eamdeploy.parity.reference_set import REFERENCE_IMAGES, reference_path
from eamdeploy.pipeline.config import RunConfig
from eamdeploy.pipeline.stage import Stage, checkpoint_of, models, teacher_of, versions_of


def freeze_stage(config: RunConfig, observer: Observer) -> Stage:
    output, model = teacher_of(config), config.model
    heatmap = config.output / "heatmap.png"
    images = config.calibrate.source

    def action() -> None:
        with host_packages("freezing"):
            from eamdeploy.host.model import ModelSpec
            from eamdeploy.reporting.draw.heat_file import write_heat_map
            from eamdeploy.reporting.records.heat_map import of_checkpoint
            from eamdeploy.stages.freeze import freeze, read_shares
        header = freeze(
            ModelSpec(model.name, model.weights, model.kwargs),
            images,
            output,
            config.freeze,
            overrides=config.preprocessing,
            class_names=read_class_names(model.class_names),
            observer=observer,
        )
        write_heat_map(of_checkpoint(header, read_shares(output)), heatmap)

    weights = Path(model.weights)
    inputs = {  # names and contents, no paths, so that a run may be moved or started from another folder
        "config": config.model_dump(mode="json", include={"preprocessing", "freeze"}),
        "model": [model.name, model.kwargs, weights.name, read_class_names(model.class_names)],
        "weights": digest_file(weights) if is_file(weights) else model.weights,
        "images": [images.root.name, images.skip_bad, folder_digest(images.open())],
        "versions": versions_of("eamdeploy", "torch", "timm"),
    }
    return Stage(inputs, [output, heatmap], action)


def recover_stage(config: RunConfig, observer: Observer) -> Stage | None:
    """None where the configuration does not ask for it."""
    options = config.recover
    if options is None:
        return None
    teacher, output, images = teacher_of(config), checkpoint_of(config), config.calibrate.source

    def action() -> None:
        with host_packages("recovering"):
            from eamdeploy.stages.recover import recover
        recover(teacher, images, output, options, observer=observer)

    inputs = {
        "config": config.model_dump(mode="json", include={"recover"}),
        "checkpoint": digest_file(teacher),
        "images": [images.root.name, images.skip_bad, folder_digest(images.open())],
        "versions": versions_of("eamdeploy", "torch", "timm"),
    }
    return Stage(inputs, [output], action)


def export_stage(config: RunConfig, observer: Observer) -> Stage:
    checkpoint, teacher = checkpoint_of(config), teacher_of(config)
    recovered = teacher != checkpoint
    files = models(config)
    model, baseline, *stock = files
    images = replace(config.calibrate.source, limit=REFERENCE_IMAGES)

    def action() -> None:
        with host_packages("exporting"):
            from eamdeploy.stages.export import export
        export(
            checkpoint,
            model,
            baseline=baseline,
            stock=stock[0] if stock else None,
            teacher=teacher if recovered else None,
            batch=config.export.batch,
            opset=config.export.opset,
            exporter=config.export.exporter,
            fold_preprocess=config.export.fold_preprocess,
            without=config.export.without,
            images=images,
            observer=observer,
        )

    unset = {"stock"} if not config.export.stock else None  # a run of before, which did not know it, stays done
    inputs = {
        "config": config.export.model_dump(mode="json", exclude=unset),
        "checkpoint": digest_file(checkpoint),
        **({"teacher": digest_file(teacher)} if recovered else {}),
        "images": folder_digest(images.open()),
        "versions": versions_of("eamdeploy", "torch", "onnx", "onnxscript"),
    }
    outputs = [*files, *map(reference_path, files)]
    return Stage(inputs, outputs, action)
