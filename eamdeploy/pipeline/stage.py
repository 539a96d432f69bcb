"""A stage of `eamdeploy run`, and what several of them depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from eamdeploy.artifacts.onnx_files import digest_model
from eamdeploy.devices.provenance import package_versions
from eamdeploy.engines.manifest import Manifest, manifest_path
from eamdeploy.engines.registry import load_backend
from eamdeploy.pipeline.config import RunConfig
from eamdeploy.vocabulary import ProviderName

_OF_OTHER_PROVIDERS = ("onnxruntime-openvino", "onnxruntime-gpu", "tensorrt")


@dataclass(frozen=True)
class Stage:
    """One step of the run.

    Attributes:
        inputs: everything that its outputs depend on.
        outputs: the files it writes.
        action: writes them.
    """

    inputs: Mapping[str, object]
    outputs: list[Path]
    action: Callable[[], object]


def checkpoint_of(config: RunConfig) -> Path:
    """The checkpoint that is exported: the recovered one, where the configuration has `[recover]`."""
    return config.output / "model.eam.safetensors"


def teacher_of(config: RunConfig) -> Path:
    """The checkpoint with the weights of the unfrozen model: what `freeze` writes."""
    return checkpoint_of(config) if config.recover is None else config.output / "frozen.eam.safetensors"


def models(config: RunConfig) -> list[Path]:
    """The exported model, its unfrozen twin and, where it is asked for, the model as torch exports it."""
    names = ["model", "baseline", *(["stock"] if config.export.stock else [])]
    return [config.output / f"{name}.onnx" for name in names]


def engines(config: RunConfig) -> list[Path]:
    """Their engines: `model.ort.onnx` beside `model.onnx`."""
    return [model.with_suffix(".ort.onnx") for model in models(config)]


def versions_of(*packages: str) -> dict[str, str]:
    """Those of the packages that are installed."""
    versions = package_versions()
    return {name: versions[name] for name in packages if name in versions}


def runtime_versions(providers: Iterable[ProviderName]) -> dict[str, str]:
    """What an engine on one of these providers runs with.

    Raises:
        MissingDependency: ONNX Runtime is not installed here.
    """
    load_backend("ort")  # of several packages that bring it, the one that is loaded counts
    others = () if set(providers) <= {"cpu"} else _OF_OTHER_PROVIDERS
    return versions_of("eamdeploy", "onnxruntime", *others)


def engine_inputs(config: RunConfig) -> dict[str, object]:
    """What stages that run both engines depend on: the files, what runs them if not the CPU, and its versions."""
    files = engines(config)
    providers = [Manifest.read(manifest_path(engine)).provider for engine in files]
    elsewhere = {} if set(providers) == {"cpu"} else {"providers": providers}  # for which the file may be the same
    return {
        "engines": [digest_model(engine) for engine in files],
        "versions": runtime_versions(providers),
        **elsewhere,
    }
