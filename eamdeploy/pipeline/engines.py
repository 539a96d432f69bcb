"""The stages of `eamdeploy run` that a board can run too: build, evaluate and profile."""

from __future__ import annotations

from dataclasses import replace

from eamdeploy.artifacts.onnx_files import digest_model
from eamdeploy.convert.ort_form import AS_EXPORTED, OrtForm, chosen_form
from eamdeploy.convert.ranges import CALIBRATION_IMAGES, Calibration
from eamdeploy.devices.provenance import usable_cores
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.engines.manifest import manifest_path
from eamdeploy.images.folder import folder_digest
from eamdeploy.observer import Observer
from eamdeploy.parity.reference_set import reference_path
from eamdeploy.pipeline.config import RunConfig
from eamdeploy.pipeline.stage import Stage, checkpoint_of, engine_inputs, engines, models, runtime_versions, versions_of
from eamdeploy.profiling.timing import Schedule
from eamdeploy.stages.build_ort import build_ort
from eamdeploy.stages.evaluate import evaluate
from eamdeploy.stages.profile import profile


def build_stage(config: RunConfig, observer: Observer) -> Stage:
    """Engines of the frozen model and its twin in one form, so that they differ in nothing but the freezing.

    The stock export, where it is asked for, stays as torch wrote it, on ONNX Runtime's CPU.
    """
    files = models(config)
    (model, twin, *stock), (engine, twin_engine, *stock_engine) = files, engines(config)
    forms = config.build.forms()

    def action() -> None:
        manifest = build_ort(
            model,
            engine,
            threads=config.profile.threads,
            forms=forms,
            calibration=_calibration(config),
            min_agreement=config.build.min_agreement,
            observer=observer,
        )
        form = chosen_form(manifest, forms)
        if len(forms) > 1:
            observer.note(f"chosen: {form.name}; the unfrozen twin is built in the same form")
        build_ort(
            twin,
            twin_engine,
            threads=config.profile.threads,
            forms=[form],
            calibration=_calibration(config) if form.int8 == "static" else None,
            min_agreement=config.build.min_agreement if form.int8 else None,
            observer=observer,
        )
        for path, output in zip(stock, stock_engine, strict=True):
            build_ort(path, output, threads=config.profile.threads, observer=observer)

    inputs = {
        "models": [digest_model(file) for path in files for file in (path, reference_path(path))],
        "threads": config.profile.threads,
        "versions": runtime_versions(form.provider for form in forms),
        **({} if forms == [AS_EXPORTED] else _conversion_inputs(config, forms)),
    }
    outputs = [*engines(config), *map(manifest_path, engines(config))]
    return Stage(inputs, outputs, action)


def _calibration(config: RunConfig) -> Calibration | None:
    if not config.build.calibrate:
        return None
    images = config.calibrate.source
    return Calibration(replace(images, limit=min(images.limit or CALIBRATION_IMAGES, CALIBRATION_IMAGES)))


def _conversion_inputs(config: RunConfig, forms: list[OrtForm]) -> dict[str, object]:
    """What else engines in other forms than the exported one depend on."""
    calibration = _calibration(config)
    images = None if calibration is None else calibration.images
    return {
        "forms": [form.record.model_dump() for form in forms],
        "min_agreement": config.build.min_agreement,
        "images": None if images is None else [images.skip_bad, folder_digest(images.open())],
        "conversion": versions_of("onnx", "onnx-graphsurgeon"),
    }


def evaluate_stage(config: RunConfig, observer: Observer) -> Stage | None:
    """None where there are no images to evaluate on."""
    if config.evaluate is None:
        return None
    output, images = config.output / "evaluation.json", config.evaluate.source
    engine, baseline, *_ = engines(config)

    def action() -> None:
        evaluate(engine, images, reference=baseline, observer=observer).write(output)

    header = checkpoints.load(checkpoint_of(config)).header
    folder = images.open_labelled(header.num_classes, header.class_names)
    asked = {} if images.class_order is None else {"class_order": images.class_order}  # which the report records
    inputs = {"images": folder_digest(folder, with_labels=True), **asked, **engine_inputs(config)}
    return Stage(inputs, [output], action)


def profile_stage(config: RunConfig, observer: Observer) -> Stage:
    output, options = config.output / "profile.json", config.profile
    engine, twin, *stock = engines(config)

    def action() -> None:
        observer.note("profiling; keep the machine otherwise idle")
        profile(
            [engine, *([twin] if stock else [])],
            stock[0] if stock else twin,
            threads=options.threads or usable_cores(),
            batch=options.batch,
            schedule=Schedule(options.warmup_ms, options.min_seconds, options.min_runs, options.sittings),
            observer=observer,
        ).write(output)

    inputs = {"config": options.model_dump(mode="json"), **engine_inputs(config)}
    return Stage(inputs, [output], action)
