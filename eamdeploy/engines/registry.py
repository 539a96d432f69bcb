"""Chooses the backend that runs a file. Backends load when they are needed, and know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from eamdeploy.artifacts.files import is_file
from eamdeploy.artifacts.onnx_files import digest_model, model_files
from eamdeploy.devices.instructions import instruction_sets, products_saturate
from eamdeploy.devices.provenance import usable_cores
from eamdeploy.engines.manifest import read_manifest
from eamdeploy.engines.runner import Runner
from eamdeploy.errors import ConfigError, MissingDependency
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.vocabulary import Backend

_BACKENDS: dict[str, Backend] = {".onnx": "ort", ".plan": "trt", ".engine": "trt"}


def backend_of(engine: Path) -> Backend:
    """The backend that runs a file of this name.

    Raises:
        ConfigError: no backend does.
    """
    try:
        return _BACKENDS[engine.suffix.lower()]
    except KeyError as err:
        raise ConfigError(
            f"{engine} is not an engine by its name", expected=f"one of {', '.join(_BACKENDS)}", got=engine.suffix
        ) from err


def load_backend(backend: Backend) -> None:
    """The backend's runtime is imported.

    Raises:
        MissingDependency: it is not installed here.
        DeviceError: it needs a GPU, and there is none.
    """
    if backend == "trt":
        from eamdeploy.engines.trt.backend import require_device
        from eamdeploy.engines.trt.cuda import import_cuda

        require_device()
        import_cuda()
        return
    try:
        import onnxruntime  # noqa: F401
    except ImportError as err:
        raise MissingDependency(
            f"ONNX Runtime can't be imported: {err}", hint="Install the package onnxruntime."
        ) from err


def runs_on_gpu(engine: Path) -> bool:
    """Whether the engine computes on a GPU, by its name and its manifest.

    Raises:
        ConfigError: no backend runs a file of this name.
        CheckpointError, EngineError: as for `read_manifest`.
    """
    if backend_of(engine) == "trt":
        return True
    from eamdeploy.engines.ort.providers import PROVIDERS

    manifest = read_manifest(engine)
    return manifest is not None and PROVIDERS[manifest.provider].on_gpu


def open_runner(engine: Path, threads: int | None = None, *, verify: bool = True) -> Runner:
    """The engine at `engine`, loaded with the settings in its manifest and ready to run.

    An `.onnx` file without a manifest is any ONNX model and runs with ONNX Runtime's own defaults; but on a processor
    where products of INT8 saturate, with its exact ones, so that a quantized model is here what it is elsewhere. With a
    reference set beside it, it is an exported model as it was written.

    Args:
        threads: threads of one inference; None takes the manifest's, or without one every usable core.
        verify: an exported model must be as it was written; False for one that was changed on purpose.

    Raises:
        ConfigError: the file or one with its data can't be read, or `threads` is below 1.
        CheckpointError: the manifest or the model's reference set is damaged; the model was altered after its export;
            or a file with its data is too short or not in its folder.
        EngineError: the backend can't load the engine, or the manifest describes another file.
        MissingDependency: the backend is not installed here, or has not the manifest's execution provider.
        DeviceError: the backend needs a GPU, and there is none.
    """
    backend = backend_of(engine)
    if not is_file(engine):
        raise ConfigError(f"cannot read {engine}", expected="an engine file", got="no such file")
    load_backend(backend)
    model_files(engine)  # its words say which file is missing, ONNX Runtime's do not
    manifest = read_manifest(engine)
    if threads is None:
        threads = manifest.threads if manifest else usable_cores()
    if backend == "trt":
        from eamdeploy.engines.trt.backend import open_plan

        if threads < 1:  # an engine on a GPU has none, but a wrong number is wrong everywhere
            raise ConfigError("the number of threads can't be used", expected="at least 1", got=threads)
        return open_plan(engine, manifest)
    from eamdeploy.engines.ort.runner import EXACT_PRODUCTS, OrtRunner

    if manifest is None:
        if verify:
            _require_unaltered(engine)
        exact = products_saturate(instruction_sets())
        return OrtRunner(engine, threads=threads, settings=EXACT_PRODUCTS if exact else {})
    return OrtRunner(engine, threads=threads, settings=manifest.settings, provider=manifest.provider)


def _require_unaltered(model: Path) -> None:
    """An exported model is the one that the reference set beside it was written with.

    Raises:
        CheckpointError: it is not, or the reference set is damaged.
    """
    path = reference_path(model)
    if is_file(path):
        ReferenceSet.load(path).require_model(model, digest_model(model))


@contextmanager
def open_runners(opening: Sequence[Callable[[], Runner]], order: Sequence[int]) -> Iterator[list[Runner]]:
    """Runners opened in the order of the numbers given, listed in their own; all are closed when the block ends.

    Args:
        opening: what opens each.
    """
    with ExitStack() as stack:
        opened = {index: stack.enter_context(opening[index]()) for index in order}
        yield [opened[index] for index in range(len(opening))]
