"""TensorRT on NVIDIA GPUs, 8.5 to 11: builds engines of ONNX models and opens them.

This module alone imports tensorrt, inside a function. What is asked of the builder is decided in `trt_request`, and
`trt_build` asks it; `trt_run` runs engines and `trt_inspect` reads what became of the model.

The engine file is TensorRT's own plan, byte for byte, which trtexec takes too. What else must be known (card, version,
GPU) is in the manifest beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from eamdeploy.artifacts.files import digest_bytes, require_output
from eamdeploy.artifacts.onnx_output import staging
from eamdeploy.devices.clock import utc_now
from eamdeploy.devices.provenance import machine_summary, package_versions
from eamdeploy.engines.gate import check_against_reference
from eamdeploy.engines.manifest import (
    DeviceBuild,
    EngineLayers,
    EngineSize,
    Manifest,
    manifest_path,
    publish,
    read_manifest,
)
from eamdeploy.engines.trt.api import require_api
from eamdeploy.engines.trt.build import build_plan
from eamdeploy.engines.trt.cuda import import_cuda
from eamdeploy.engines.trt.device import Gpu, how_to_get_tensorrt, require_gpu
from eamdeploy.engines.trt.engine import LoadedEngine
from eamdeploy.engines.trt.inspect import inspect_engine
from eamdeploy.engines.trt.log import BuildLog
from eamdeploy.engines.trt.request import BuilderRequest, ModelFacts, TrtModel
from eamdeploy.engines.trt.run import TrtRunner
from eamdeploy.engines.trt.versions import TrtVersion, capabilities
from eamdeploy.errors import ConfigError, EngineError, MissingDependency
from eamdeploy.parity.gate import TOLERANCES, Tolerance, reduced_tolerance
from eamdeploy.parity.reference_set import ReferenceSet

SUFFIXES = (".plan", ".engine")
_MOSTLY_FP32 = 0.85  # of the model's bytes; 8.6.0's engines of a DeiT-Tiny had 0.57 where they computed in FP16, or 1.1


def import_tensorrt() -> Any:
    """The module tensorrt.

    Raises:
        MissingDependency: it is not installed, or can't be loaded; says how to get it on this machine.
    """
    try:
        import tensorrt
    except (ImportError, OSError) as err:
        reason = "" if isinstance(err, ModuleNotFoundError) and err.name == "tensorrt" else f" ({err})"
        raise MissingDependency(f"TensorRT is not installed here{reason}", hint=how_to_get_tensorrt()) from err
    if not hasattr(tensorrt, "__version__"):  # any folder of that name on the path
        raise MissingDependency(f"TensorRT is not installed here: {tensorrt} is none", hint=how_to_get_tensorrt())
    require_api(tensorrt, TrtVersion.parse(tensorrt.__version__))
    return tensorrt


def installed_version() -> TrtVersion:
    """The version of the TensorRT that is installed; needs no GPU.

    Raises:
        MissingDependency: none is.
    """
    return TrtVersion.parse(import_tensorrt().__version__)


def require_device() -> tuple[TrtVersion, Gpu]:
    """TensorRT's version and the GPU that it will use.

    Raises:
        MissingDependency: TensorRT is not installed.
        DeviceError: there is no GPU. Both are found out before anything in TensorRT that needs one is touched.
        ConfigError: TensorRT is older than 8.5.
    """
    version = installed_version()
    gpu = require_gpu()
    capabilities(version)
    return version, gpu


def build(
    model: TrtModel,
    request: BuilderRequest,
    output: Path,
    *,
    reference: ReferenceSet | None,
    min_agreement: float | None = None,
    baseline: Path | None = None,
    note: Callable[[str], None],
) -> Manifest:
    """`output` is an engine that was run and checked, and its manifest lies beside it; the builder's log is `*.log`.

    The finished engine must give the reference's logits before anything is written; when it does not, whatever was at
    `output` stays. An FP32 engine of unchanged maps is held to tolerance `f32-engine`, any other to `reduced-engine`.

    Args:
        model: in the form that the installed version takes.
        reference: images and logits of the model; None leaves the engine unchecked, and its manifest says so.
        min_agreement: percent of first classes that must be the reference's, in place of `reduced-engine`'s.
        baseline: engine of the unfrozen twin, whose size is noted.
        note: is told what a person should know.

    Raises:
        ConfigError: the output can't be written, or its name ends in neither `.plan` nor `.engine`.
        EngineError: TensorRT can't build or run the engine.
        ParityError: the engine's logits are not the reference's.
        MissingDependency, DeviceError: TensorRT, a GPU or cuda-python is missing.
    """
    require_plan_output(output, model.path)
    gate = _tolerance(request, model.facts, min_agreement)
    trt = import_tensorrt()
    version, gpu = require_device()
    cuda = import_cuda() if reference is not None or request.layer_profile else None
    twin = None if baseline is None else _size_of(baseline)
    log_path = output.with_name(f"{output.name}.log")
    with BuildLog(log_path) as log, staging(output) as stage:
        plan = build_plan(trt, request, stage.source(model.data), model.facts, log, note)
    model_bytes = model.data.bytes_at(output)
    if _is_mostly_fp32(request, len(plan), model_bytes):
        note(
            f"the engine has {len(plan) / 1e6:.1f} MB, the model in FP32 {model_bytes / 1e6:.1f} MB: most of it "
            f"computes in FP32, though {request.precision.upper()} is allowed; {log_path.name} and what TensorRT "
            "printed may tell why"
        )
    loaded = LoadedEngine(trt, plan, host_code=request.version_compatible, name=str(model.path))
    try:
        io, layers = loaded.io(), inspect_engine(trt, loaded.engine, model.facts.maps)
        manifest = Manifest(
            backend="trt",
            engine=output.name,
            engine_digest=digest_bytes(plan),
            engine_bytes=len(plan),
            model_digest=model.digest,
            card=model.card,
            batch=io.batch,
            settings=request.settings(),
            threads=1,
            parity=None,
            versions={**package_versions(), "tensorrt": str(version), "cuda": gpu.cuda},
            machine=machine_summary(),
            created=utc_now(),
            device=_device(model, request, version, gpu, loaded, layers, twin, log_path),
        )
        if cuda is not None:
            manifest = _run(loaded, cuda, manifest, request, reference, gate)
    finally:
        loaded.close()
    publish(output, plan, manifest)
    return manifest


def _is_mostly_fp32(request: BuilderRequest, plan_bytes: int, model_bytes: int) -> bool:
    """Whether a builder that may choose a type for each layer stored FP32 weights for most of them."""
    chooses = request.precision.upper() in request.set_flags and not request.int8
    return chooses and plan_bytes > _MOSTLY_FP32 * model_bytes


def require_plan_output(output: Path, source: Path) -> None:
    """An engine can be written to `output`.

    Raises:
        ConfigError: it can't, or its name ends in neither `.plan` nor `.engine`.
    """
    require_output(output, source)
    if output.suffix not in SUFFIXES:
        raise ConfigError(
            f"the engine can't be named {output}", expected=f"a name that ends in {' or '.join(SUFFIXES)}"
        )
    require_output(manifest_path(output))


def _size_of(baseline: Path) -> EngineSize:
    manifest = read_manifest(baseline)
    if manifest is None:
        raise ConfigError(f"no manifest beside {baseline}", hint="Build the baseline with `eamdeploy build-trt` first.")
    layers = manifest.device.engine_layers if manifest.device else None
    return EngineSize(
        engine=baseline.name, layers=None if layers is None else layers.layers, engine_bytes=manifest.engine_bytes
    )


def _device(
    model: TrtModel,
    request: BuilderRequest,
    version: TrtVersion,
    gpu: Gpu,
    loaded: LoadedEngine,
    layers: EngineLayers | None,
    baseline: EngineSize | None,
    log: Path,
) -> DeviceBuild:
    return DeviceBuild(
        runtime=str(version),
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        version_compatible=request.version_compatible,
        hardware_compatible=request.hardware_compatibility_level is not None,
        precision=request.precision,
        int8=request.int8,
        model_changes=request.model_changes,
        calibration=model.calibration,
        device_memory_bytes=loaded.device_memory_bytes(),
        engine_layers=layers,
        baseline=baseline,
        log=log.name,
    )


def _run(
    loaded: LoadedEngine,
    cuda: Any,
    manifest: Manifest,
    request: BuilderRequest,
    reference: ReferenceSet | None,
    gate: Tolerance,
) -> Manifest:
    """The manifest with the results of running the engine: the parity gate, and the layers' times."""
    changes: dict[str, Any] = {}
    with TrtRunner(loaded, cuda, manifest) as runner:
        if reference is not None:
            hint = None if request.keep_fp32 in (None, "norm-softmax") else _KEEP_MORE
            changes["parity"] = check_against_reference(runner, reference, gate, hint)
        if request.layer_profile and manifest.device is not None:
            images = np.zeros((runner.opt_batch, *runner.io.input_shape[1:]), np.float32)
            times = runner.layer_times(images)
            changes["device"] = manifest.device.model_copy(update={"layer_ms": times})
    return manifest.model_copy(update=changes)


def _tolerance(request: BuilderRequest, facts: ModelFacts, min_agreement: float | None) -> Tolerance:
    """What the engine is held to.

    Raises:
        ConfigError: `min_agreement` is no percentage, or the engine is held to FP32's own noise.
    """
    exact = request.precision == "fp32" and not request.int8 and not facts.requantized
    if not exact:
        return reduced_tolerance(min_agreement)
    if min_agreement is not None:
        raise ConfigError(
            "the agreement that the gate asks for can't be set so",
            expected="an engine in FP16, BF16 or INT8",
            got="an FP32 engine, which is held to FP32's noise",
        )
    return TOLERANCES["f32-engine"]


def open_plan(engine: Path, manifest: Manifest | None) -> TrtRunner:
    """The engine at `engine`, ready to run.

    Args:
        manifest: the one beside it, already checked against it; None for a foreign engine.

    Raises:
        ConfigError: the file can't be read.
        EngineError: it was built for another version or GPU, is damaged, or is no image classifier.
        MissingDependency, DeviceError: TensorRT, a GPU or cuda-python is missing.
    """
    trt = import_tensorrt()
    version, gpu = require_device()
    cuda = import_cuda()
    if manifest is not None and manifest.device is not None:
        require_fitting(engine, manifest.device, version, gpu)
    try:
        data = engine.read_bytes()
    except OSError as err:
        raise ConfigError(f"cannot read {engine}: {err.strerror or err}") from err
    host_code = manifest is not None and manifest.device is not None and manifest.device.version_compatible
    loaded = LoadedEngine(trt, data, host_code=host_code, name=str(engine))
    try:
        return TrtRunner(loaded, cuda, manifest)
    except BaseException:
        loaded.close()
        raise


def require_fitting(engine: Path, built: DeviceBuild, version: TrtVersion, gpu: Gpu) -> None:
    """The engine was built for this TensorRT and this GPU, or for others in a way that this one runs too.

    Version-compatible engines run on the same or the next major version and later releases of it: 8→10, 10→11, not 8→11
    (docs/tensorrt.md, The Python API by version). Hardware-compatible ones run on any GPU from Ampere, compute
    capability 8.0.

    Raises:
        EngineError: it was not; names both.
    """
    theirs = TrtVersion.parse(built.runtime)
    majors = {8: (8, 10), 10: (10, 11)}.get(theirs.major, (theirs.major,))
    newer = version.parts >= theirs.parts and version.major in majors
    if str(theirs) != str(version) and not (built.version_compatible and newer):
        raise EngineError(
            f"{engine} was built for another TensorRT", expected=f"TensorRT {theirs}", got=version, hint=_AGAIN
        )
    same = (built.gpu, built.compute_capability) == (gpu.name, gpu.compute_capability)
    ampere = float(gpu.compute_capability) >= 8
    if not same and not (built.hardware_compatible and ampere):
        raise EngineError(
            f"{engine} was built for another GPU",
            expected=f"{built.gpu} (compute capability {built.compute_capability})",
            got=gpu,
            hint=_AGAIN,
        )


_KEEP_MORE = "try --keep-fp32 norm-softmax, or "
_AGAIN = "Build it again on this machine with `eamdeploy build-trt`."
