"""The stages that turn an ONNX model into an engine, under the parity gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from eamdeploy.artifact import digest_file, printable
from eamdeploy.engines.base import Manifest, ReferenceFile
from eamdeploy.engines.ort_providers import require_provider
from eamdeploy.engines.provenance import usable_cores
from eamdeploy.engines.registry import load_backend
from eamdeploy.errors import ConfigError, conversion_packages
from eamdeploy.observer import SILENT, Observer
from eamdeploy.onnx_files import digest_model, require_model_output, write_model
from eamdeploy.ort_form import AS_EXPORTED, OrtForm
from eamdeploy.parity import ReferenceSet, reduced_tolerance, reference_path

if TYPE_CHECKING:
    from eamdeploy.activation_ranges import Calibration
    from eamdeploy.engines.trt_request import BuilderRequest, TrtModel, TrtOptions
    from eamdeploy.engines.trt_versions import TrtVersion


def build_ort(
    model: Path,
    output: Path,
    *,
    threads: int | None = None,
    forms: Sequence[OrtForm] = (AS_EXPORTED,),
    calibration: Calibration | None = None,
    reference: Path | None = None,
    check: bool = True,
    verify: bool = True,
    min_agreement: float | None = None,
    observer: Observer = SILENT,
) -> Manifest:
    """`output` is an ONNX Runtime engine that gives the model's reference logits; its manifest lies beside it.

    Args:
        threads: the engine's default number of threads; every usable core if None.
        forms: how the model is specialised, and which execution provider runs it, here and wherever the manifest goes
            along. Of several (see `candidates`) the fastest on this machine that passes the gate is kept, and the times
            of all in the manifest. A fused or an INT8 one needs the packages onnx and onnx-graphsurgeon here.
        calibration: images for static INT8; its ranges are kept beside the engine unless it names a cache.
        reference: the reference set; the one that `export` left beside the model if None.
        check: run the parity gate; without it the manifest says that the engine was not checked.
        verify: model and reference set must be the files that were exported together; False for one that was changed
            on purpose.
        min_agreement: with INT8, percent of the reference images that need the reference's first class; None for that
            of tolerance `reduced-engine`.

    Raises:
        ConfigError: a file can't be read or written, an option is of no use, or there is no reference set.
        CheckpointError: model or reference set was altered after the export, or they don't belong together.
        UnsupportedGraph: the model has nothing that a form would change.
        EngineError: ONNX Runtime can't load or run the model, or not on that provider.
        ParityError: the engine's logits are not the reference's; what was at `output` stays.
        MissingDependency: ONNX Runtime is not installed here, or has no such provider, or a package for the conversion.
        DeviceError: the provider's GPU can't be used.
    """
    load_backend("ort")
    from eamdeploy import ort_build

    if not forms:
        raise ConfigError("there is nothing to build", expected="at least one form", got="none")
    for form in forms:
        require_provider(form.provider)
    any_int8 = any(form.int8 for form in forms)
    if min_agreement is not None and not any_int8:
        raise ConfigError("an FP32 engine is held to FP32's noise", hint="Leave --min-agreement out, or use --int8.")
    if calibration is not None and not any_int8:
        raise ConfigError("calibration images are of use for INT8 alone", hint="Give --int8 too.")
    references = _reference(model, reference, verify=verify) if check else None
    request = ort_build.Request(
        model=model,
        output=output,
        threads=threads or usable_cores(),
        calibration=_with_cache(calibration, output),
        reference=references,
        reduced=reduced_tolerance(min_agreement),
        reference_file=_reference_file(reference or reference_path(model)) if check else None,
    )
    return ort_build.build(request, forms, observer)


def build_trt(
    model: Path,
    output: Path,
    options: TrtOptions,
    *,
    reference: Path | None = None,
    check: bool = True,
    verify: bool = True,
    min_agreement: float | None = None,
    calibration: Calibration | None = None,
    baseline: Path | None = None,
    onnx_output: Path | None = None,
    observer: Observer = SILENT,
) -> Manifest:
    """`output` is a TensorRT engine for this machine's GPU that passed the parity gate; its manifest lies beside it.

    The model is converted to what the installed TensorRT takes, in memory. The builder's log lies beside the engine.

    Args:
        reference, check, verify: as for `build_ort`.
        min_agreement: percent of the reference images that need the reference's first class, where the engine is not
            held to FP32's tolerance; None for that of tolerance `reduced-engine`.
        calibration: images for INT8; its ranges are kept beside the engine unless it names a cache.
        onnx_output: where to write the model that TensorRT's parser gets; None for nowhere.
        baseline: engine of the unfrozen twin, whose size the manifest notes.

    Raises:
        MissingDependency, DeviceError: TensorRT, a GPU, or a package that the build needs is not here.
        ConfigError: a file or an option can't be used, or there is no reference set.
        CheckpointError: as for `build_ort`.
        EngineError: TensorRT can't build or run the engine.
        ParityError: the engine's logits are not the reference's; what was at `output` stays.
    """
    from eamdeploy.engines import trt
    from eamdeploy.engines.trt_request import make_request

    version, _ = trt.require_device()  # before anything else: without it there is nothing to do here
    trt.require_plan_output(output, model)
    references = _reference(model, reference, verify=verify) if check else None
    prepared = _prepare(model, version, options, _with_cache(calibration, output), onnx_output, observer)
    request = make_request(version, options, prepared.facts, list(prepared.changes))
    for change in prepared.changes:
        observer.note(f"for TensorRT {version}: {change}")
    return trt.build(
        prepared,
        request,
        output,
        reference=references,
        min_agreement=min_agreement,
        baseline=baseline,
        note=observer.note,
    )


def plan_trt_build(
    model: Path,
    options: TrtOptions,
    version: TrtVersion | None = None,
    *,
    calibration: Calibration | None = None,
    onnx_output: Path | None = None,
    observer: Observer = SILENT,
) -> BuilderRequest:
    """What `build_trt` would ask of the builder; needs no GPU.

    Args:
        version: of TensorRT; the installed one if None.
        calibration, onnx_output: as for `build_trt`; ranges are kept only where `calibration` names a cache.

    Raises:
        MissingDependency: no version is given and TensorRT is not installed, or a package for the conversion is not.
        ConfigError: the model or an option can't be used.
        EngineError: the file is no ONNX model that can be built.
    """
    from eamdeploy.engines import trt
    from eamdeploy.engines.trt_request import make_request

    wanted = version or trt.installed_version()
    prepared = _prepare(model, wanted, options, calibration, onnx_output, observer)
    return make_request(wanted, options, prepared.facts, list(prepared.changes))


def _prepare(
    model: Path,
    version: TrtVersion,
    options: TrtOptions,
    calibration: Calibration | None,
    onnx_output: Path | None,
    observer: Observer,
) -> TrtModel:
    """The model as that TensorRT takes it, and written to `onnx_output` too."""
    if calibration is not None and not options.int8:
        raise ConfigError("calibration images are of use for INT8 alone", hint="Give --int8 too.")
    for file in (onnx_output, calibration.cache if calibration else None):
        if file is not None:
            require_model_output(file, model)
    with conversion_packages("converting a model for TensorRT"):
        from eamdeploy.trt_model import prepare
    prepared = prepare(model, version, options, calibration, observer)
    if onnx_output is not None:
        write_model(onnx_output, prepared.data)
    return prepared


def _with_cache(calibration: Calibration | None, output: Path) -> Calibration | None:
    """The same with a file for the ranges, beside the engine if it names none."""
    if calibration is None or calibration.cache is not None:
        return calibration
    return replace(calibration, cache=output.with_name(f"{output.name}.ranges.json"))


def _reference(model: Path, reference: Path | None, *, verify: bool) -> ReferenceSet:
    path = reference_path(model) if reference is None else reference
    if not path.is_file():
        raise ConfigError(
            f"no reference set at {path}, so the engine can't be checked",
            hint="Copy it together with the model (export writes both), name it with --reference, or use --no-check.",
        )
    loaded = ReferenceSet.load(path, verify=verify)
    if verify:
        loaded.require_model(model, digest_model(model))
    return loaded


def _reference_file(path: Path) -> ReferenceFile:
    name = printable(path.name).replace("\\", "_")  # of a name that is no text, one that is never found again
    return ReferenceFile(name=name, digest=digest_file(path))
