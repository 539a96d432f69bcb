"""The stage that builds a TensorRT engine, under the parity gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eamdeploy.artifacts.onnx_output import require_model_output, write_model
from eamdeploy.engines.manifest import Manifest
from eamdeploy.errors import ConfigError, conversion_packages
from eamdeploy.observer import SILENT, Observer

if TYPE_CHECKING:
    from eamdeploy.convert.ranges import Calibration
    from eamdeploy.engines.trt.request import BuilderRequest, TrtModel, TrtOptions
    from eamdeploy.engines.trt.versions import TrtVersion

from eamdeploy.stages.engine_inputs import read_reference, with_cache


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
    from eamdeploy.engines.trt import backend as trt
    from eamdeploy.engines.trt.request import make_request

    version, _ = trt.require_device()  # before anything else: without it there is nothing to do here
    trt.require_plan_output(output, model)
    references = read_reference(model, reference, verify=verify) if check else None
    prepared = _prepare(model, version, options, with_cache(calibration, output), onnx_output, observer)
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
    from eamdeploy.engines.trt import backend as trt
    from eamdeploy.engines.trt.request import make_request

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
        from eamdeploy.convert.trt import prepare
    prepared = prepare(model, version, options, calibration, observer)
    if onnx_output is not None:
        write_model(onnx_output, prepared.data)
    return prepared
