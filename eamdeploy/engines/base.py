"""What every engine backend offers: a runner, and a manifest beside the engine file.

Backends import this module and never each other; `registry` chooses one for a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eamdeploy.accuracy import with_fixed_batch
from eamdeploy.artifact import ModelCard, Record, atomic_output
from eamdeploy.errors import ConfigError, EngineError, ParityError
from eamdeploy.images import network_input
from eamdeploy.onnx_files import digest_model, move_model
from eamdeploy.parity import ParityReport, ReferenceSet, Tolerance, compare, require

ProviderName: TypeAlias = Literal["cpu", "openvino", "cuda", "tensorrt", "xnnpack", "acl"]
"""Execution providers of ONNX Runtime, as the command line and manifests name them."""
_GATE_BATCH = 4  # more than one image at a time, so that an engine that mixes them up fails


@dataclass(frozen=True)
class EngineIO:
    """The engine's one input and one output.

    Attributes:
        input_shape: [B, 3, H, W] of the input; B is None when any batch size is accepted.
        num_classes: width of the logits; None when the engine does not say.
        takes_pixels: the input is uint8, normalized by the engine itself; otherwise float32, normalized already.
    """

    input_name: str
    input_shape: tuple[int | None, int, int, int]
    output_name: str
    num_classes: int | None
    takes_pixels: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the input."""
        return np.dtype(np.uint8 if self.takes_pixels else np.float32)

    @property
    def batch(self) -> int | None:
        """The only batch size accepted, or None for any."""
        return self.input_shape[0]

    def check(self, images: NDArray[Any], engine: str) -> None:
        """`images` can be given to the engine.

        Raises:
            ConfigError: another dtype or shape, or no image.
        """
        dims = zip(self.input_shape, images.shape, strict=False)
        fits = images.ndim == 4 and all(want in (None, got) for want, got in dims)
        if images.dtype != self.dtype or not fits or len(images) == 0:
            raise ConfigError(
                f"engine {engine} can't take this input",
                expected=f"{self.dtype} {['B' if dim is None else dim for dim in self.input_shape]}",
                got=f"{images.dtype} {list(images.shape)}",
            )


class LatencySplit(Record):
    """Where the time of one inference goes; medians over the runs.

    Attributes:
        copy_in_ms, compute_ms, copy_out_ms: on the GPU, between events.
        enqueue_ms: of the processor, to queue all that.
        cuda_graph: whether it was queued as one recorded graph; copies are then part of `compute_ms`.
    """

    runs: int
    batch: int
    copy_in_ms: float
    compute_ms: float
    copy_out_ms: float
    enqueue_ms: float
    cuda_graph: bool


class Runner(Protocol):
    """An engine loaded and ready to run; closes itself as a context manager.

    Attributes:
        name: the engine's path, for messages.
        card: the model's description; None for a foreign model.
        settings: the backend's own options that it runs with, by its own names.
    """

    @property
    def name(self) -> str: ...

    @property
    def io(self) -> EngineIO: ...

    @property
    def card(self) -> ModelCard | None: ...

    @property
    def settings(self) -> Mapping[str, str]: ...

    @property
    def device_memory_bytes(self) -> int | None:
        """What it needs on a GPU to run, besides its weights; None without a GPU."""
        ...

    def infer(self, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits float32 [B, classes] of images [B, 3, H, W] of the type that `io` says, when they are all computed.

        Raises:
            ConfigError: the input's dtype or shape does not fit.
            EngineError: the backend failed.
        """
        ...

    def split(self, images: NDArray[Any], runs: int) -> LatencySplit | None:
        """Where the time of an inference of these images goes; None where nothing is copied to a device.

        Raises:
            ConfigError: the images don't fit, or are more than the engine takes at once.
            EngineError: the backend failed.
        """
        ...

    def layer_times(self, images: NDArray[Any], runs: int) -> dict[str, float]:
        """Mean milliseconds of every layer on these images, in the engine's order; measuring slows it a little.

        Raises:
            ConfigError: the images don't fit.
            EngineError: the backend failed, or can't tell.
        """
        ...

    def close(self) -> None:
        """The engine's memory is released; a second call does nothing."""
        ...

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class FrozenMapLayer(Record):
    """A layer of a built engine that holds a frozen map, or computes with it.

    Attributes:
        frozen_map: the map's constant in the ONNX model.
        layer: the engine's name for the layer; None where the engine names no layer that has to do with it.
        type: of the layer's weights, or of its output, in the engine's words.
    """

    frozen_map: str
    layer: str | None
    type: str | None

    @property
    def in_words(self) -> str:
        """The map, the type it became, and the layer that holds it."""
        return f"{self.frozen_map}: " + (
            "in no layer of its own" if self.layer is None else f"{self.type} in {self.layer}"
        )


class EngineLayers(Record):
    """What a built engine says about its layers.

    Attributes:
        layers: how many there are.
        fused_attention: names of those in which a whole attention is one kernel.
        frozen_maps: where each frozen map went; at least one entry for each.
    """

    layers: int
    fused_attention: list[str]
    frozen_maps: list[FrozenMapLayer]


class EngineSize(Record):
    """Another engine's size, to compare with."""

    engine: str
    layers: int | None
    engine_bytes: int


class DeviceBuild(Record):
    """What ties an engine to the runtime and the GPU that it was built with, and what became of the model.

    Attributes:
        runtime: version of TensorRT.
        gpu, compute_capability: e.g. "Orin", "8.7".
        version_compatible: runs on newer versions too; hardware_compatible: on any GPU from Ampere.
        precision: the lowest floating-point type allowed; `int8`: activations are INT8 where the model says so.
        model_changes: what was done to the ONNX model before it was parsed.
        device_memory_bytes: what the engine needs on the GPU to run, besides its weights.
        engine_layers: None where the engine does not tell.
        layer_ms: mean time of every layer on `opt` images, if it was asked for.
        baseline: the unfrozen twin's engine, if one was named.
        log: file beside the engine with what the builder said.
    """

    runtime: str
    gpu: str
    compute_capability: str
    version_compatible: bool
    hardware_compatible: bool
    precision: Literal["fp32", "fp16", "bf16"]
    int8: bool
    model_changes: list[str]
    device_memory_bytes: int
    engine_layers: EngineLayers | None
    layer_ms: dict[str, float] | None = None
    baseline: EngineSize | None = None
    log: str


class TriedForm(Record):
    """A form of the model that was built and timed on this machine, in turns with the others.

    Attributes:
        form: what makes it up, in words.
        p50_ms: median time of one inference.
        speed_up, low, high: against the first form that passed the gate: median and its 95 % confidence interval; None
            for that form itself.
        refused: why it is no candidate, e.g. the gate's words; None for a candidate, which has times.
        chosen: it became the engine.
    """

    form: str
    p50_ms: float | None = None
    speed_up: float | None = None
    low: float | None = None
    high: float | None = None
    refused: str | None = None
    chosen: bool = False


class ReferenceFile(Record):
    """The reference set that an engine was proved with; it can prove it anew where it lies beside the engine.

    Attributes:
        name: of the file, without a folder; `digest` is its SHA-256.
    """

    name: str = Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$")
    digest: str


class Manifest(Record):
    """How an engine was built; lies beside it as JSON.

    Attributes:
        backend: which backend runs it.
        engine, engine_digest, engine_bytes: name of the engine file; SHA-256 and size of it and of its second file, if
            it has one (`onnx_files.digest_model`).
        model_digest: likewise of the ONNX model it was built from.
        card: the model's description; None for a foreign model.
        batch: the only batch size accepted, or None for any.
        settings: the backend's own options, by its own names; needed again to run the engine as it was checked.
        threads: default number of threads.
        provider: what ONNX Runtime runs it on; says nothing about other backends.
        parity: result of the gate; None means **not checked**, and people must be told.
        machine: what it was built on.
        created: UTC, ISO 8601.
        device: for an engine that is tied to a GPU.
        tried: forms of the model among which this engine was the fastest; None where there was no choice.
        instructions: instruction sets of the processor that it was proved on (`devices.instructions`); None in an
            older manifest.
        reference: None where it was not checked, and in an older manifest.
    """

    format: Literal[1] = 1
    backend: Literal["ort", "trt"]
    engine: str
    engine_digest: str
    engine_bytes: int
    model_digest: str
    card: ModelCard | None
    batch: int | None
    settings: dict[str, str]
    threads: int = Field(ge=1)
    provider: ProviderName = "cpu"
    parity: ParityReport | None
    versions: dict[str, str]
    machine: str
    created: str
    device: DeviceBuild | None = None
    tried: list[TriedForm] | None = None
    instructions: str | None = None
    reference: ReferenceFile | None = None


def manifest_path(engine: Path) -> Path:
    """Where the manifest of an engine lies: `eam.ort.onnx.json` beside `eam.ort.onnx`."""
    return engine.with_name(f"{engine.name}.json")


def read_manifest(engine: Path) -> Manifest | None:
    """The manifest beside the engine, checked against it; None when there is none.

    Raises:
        ConfigError, CheckpointError: the manifest is damaged or foreign, or a file of the engine is missing or short.
        EngineError: it describes another file than the one beside it.
    """
    path = manifest_path(engine)
    if not path.exists():
        return None
    manifest = Manifest.read(path)
    digest = digest_model(engine)
    if manifest.engine_digest != digest:
        raise EngineError(
            f"{path} describes another engine than {engine}",
            expected=manifest.engine_digest,
            got=digest,
            hint=f"Build the engine again, or delete {path.name} to use the file without its settings.",
        )
    return manifest


def publish(output: Path, engine: bytes | Path, manifest: Manifest) -> None:
    """Engine and manifest are both in place; both are on the disk in full before either is renamed.

    Args:
        engine: its bytes, or where its two files are staged.

    Raises:
        ConfigError: one can't be written; whatever was there stays.
    """
    if isinstance(engine, Path):
        with atomic_output(manifest_path(output)) as manifest_file:
            manifest_file.write((manifest.model_dump_json(indent=2) + "\n").encode())
            manifest_file.flush()
            os.fsync(manifest_file.fileno())
            move_model(engine, output)
        return
    with atomic_output(output) as engine_file, atomic_output(manifest_path(output)) as manifest_file:
        engine_file.write(engine)
        engine_file.flush()
        os.fsync(engine_file.fileno())
        manifest_file.write(manifest.sealed())


def check_against_reference(
    runner: Runner, reference: ReferenceSet, tolerance: Tolerance, hint: str | None = None
) -> ParityReport:
    """The engine gives the reference's logits for the reference's images.

    Args:
        hint: as for `parity.require`.

    Raises:
        ConfigError: the images don't fit the engine, or the engine has no card to preprocess by.
        ParityError: the logits differ by more than the tolerance.
    """
    what = f"{runner.name} against its reference set ({reference.source})"
    if runner.card is None:
        raise ConfigError(
            f"{runner.name} carries no model card, so its reference images can't be preprocessed",
            hint="Build from a model that eamdeploy exported, or without a reference set.",
        )
    if runner.io.num_classes not in (None, reference.logits.shape[1]):
        raise ParityError(
            f"parity of {what} can't hold: it is another model's",
            expected=f"{runner.io.num_classes} classes",
            got=reference.logits.shape[1],
        )
    images = network_input(reference.pixels, runner.card.preprocessing, takes_pixels=runner.io.takes_pixels)
    predict = with_fixed_batch(runner.infer, runner.io.batch or min(_GATE_BATCH, len(images)))
    report = compare(reference.logits, predict(images), tolerance)
    require(report, what, hint)
    return report


def utc_now() -> str:
    """The time now in UTC, ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
