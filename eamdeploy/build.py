"""The stages that turn an ONNX model into an engine, under the parity gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eamdeploy.engines.base import Manifest
from eamdeploy.engines.provenance import usable_cores
from eamdeploy.engines.registry import load_backend
from eamdeploy.errors import ConfigError, host_packages
from eamdeploy.observer import SILENT, Observer
from eamdeploy.parity import ReferenceSet, reference_path

if TYPE_CHECKING:
    from eamdeploy.engines.trt_request import BuilderRequest, TrtOptions
    from eamdeploy.engines.trt_versions import TrtVersion

_CONVERSION = ("converting a model for TensorRT", "Get it with: pip install onnx onnx-graphsurgeon")  # on a board too


def build_ort(
    model: Path, output: Path, *, threads: int | None = None, reference: Path | None = None, check: bool = True
) -> Manifest:
    """`output` is an ONNX Runtime engine that gives the model's reference logits; its manifest lies beside it.

    Args:
        threads: the engine's default number of threads; every usable core if None.
        reference: the reference set; the one that `export` left beside the model if None.
        check: run the parity gate; without it the manifest says that the engine was not checked.

    Raises:
        ConfigError: a file can't be read or written, or there is no reference set.
        EngineError: ONNX Runtime can't load or run the model.
        ParityError: the engine's logits are not the reference's; what was at `output` stays.
        MissingDependency: ONNX Runtime is not installed here.
    """
    load_backend("ort")
    from eamdeploy.engines import ort

    references = _reference(model, reference) if check else None
    return ort.build(model, output, threads=threads or usable_cores(), reference=references)


def build_trt(
    model: Path,
    output: Path,
    options: TrtOptions,
    *,
    reference: Path | None = None,
    check: bool = True,
    baseline: Path | None = None,
    observer: Observer = SILENT,
) -> Manifest:
    """`output` is a TensorRT engine for this machine's GPU that passed the parity gate; its manifest lies beside it.

    The model is converted to what the installed TensorRT takes, in memory. The builder's log lies beside the engine.

    Args:
        reference, check: as for `build_ort`.
        baseline: engine of the unfrozen twin, whose size the manifest notes.

    Raises:
        MissingDependency, DeviceError: TensorRT, a GPU, or a package that the build needs is not here.
        ConfigError: a file or an option can't be used, or there is no reference set.
        EngineError: TensorRT can't build or run the engine.
        ParityError: the engine's logits are not the reference's; what was at `output` stays.
    """
    from eamdeploy.engines import trt
    from eamdeploy.engines.trt_request import make_request

    version, _ = trt.require_device()  # before anything else: without it there is nothing to do here
    trt.require_plan_output(output, model)
    references = _reference(model, reference) if check else None
    with host_packages(*_CONVERSION):
        from eamdeploy.trt_model import prepare
    prepared = prepare(model, version, options)
    for change in prepared.changes:
        observer.note(f"for TensorRT {version}: {change}")
    return trt.build(
        prepared,
        make_request(version, options, prepared.facts, list(prepared.changes)),
        output,
        reference=references,
        baseline=baseline,
        note=observer.note,
    )


def plan_trt_build(model: Path, options: TrtOptions, version: TrtVersion | None = None) -> BuilderRequest:
    """What `build_trt` would ask of the builder; needs no GPU.

    Args:
        version: of TensorRT; the installed one if None.

    Raises:
        MissingDependency: no version is given and TensorRT is not installed, or a package for the conversion is not.
        ConfigError: the model or an option can't be used.
        EngineError: the file is no ONNX model that can be built.
    """
    from eamdeploy.engines import trt
    from eamdeploy.engines.trt_request import make_request

    wanted = version or trt.installed_version()
    with host_packages(*_CONVERSION):
        from eamdeploy.trt_model import prepare
    prepared = prepare(model, wanted, options)
    return make_request(wanted, options, prepared.facts, list(prepared.changes))


def _reference(model: Path, reference: Path | None) -> ReferenceSet:
    path = reference_path(model) if reference is None else reference
    if not path.is_file():
        raise ConfigError(
            f"no reference set at {path}, so the engine can't be checked",
            hint="Copy it together with the model (export writes both), name it with --reference, or use --no-check.",
        )
    return ReferenceSet.load(path)
