"""The manifest: how an engine was built and proved; it lies beside the engine as JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from eamdeploy.artifacts.card import ModelCard
from eamdeploy.artifacts.files import atomic_output, is_there
from eamdeploy.artifacts.onnx_files import digest_model
from eamdeploy.artifacts.onnx_output import move_model
from eamdeploy.artifacts.records import Record
from eamdeploy.errors import EngineError
from eamdeploy.parity.gate import ParityReport
from eamdeploy.vocabulary import CalibrationMethod, Int8, ProviderName


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


class CalibratedProducts(Record):
    """Products that became INT8 by ranges from calibration images.

    Attributes:
        products: how many.
        method: how the ranges follow from the images.
        images: how many were used.
        folder: name of the images' folder; where the folder lies is not recorded.
    """

    products: int
    method: CalibrationMethod
    images: int
    folder: str

    @property
    def in_words(self) -> str:
        ranges = f"{self.method} of {self.images} images of {self.folder}"
        return f"{self.products} products in INT8, ranges: {ranges}"


class DeviceBuild(Record):
    """What ties an engine to the runtime and the GPU that it was built with, and what became of the model.

    Attributes:
        runtime: version of TensorRT.
        gpu, compute_capability: e.g. "Orin", "8.7".
        version_compatible: runs on newer versions too; hardware_compatible: on any GPU from Ampere.
        precision: the lowest floating-point type allowed; `int8`: activations are INT8 where the model says so.
        model_changes: what was done to the ONNX model before it was parsed, in words for people.
        calibration: what became INT8 by calibration images; None where nothing did, and in an
            older manifest.
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
    calibration: CalibratedProducts | None = None
    device_memory_bytes: int
    engine_layers: EngineLayers | None
    layer_ms: dict[str, float] | None = None
    baseline: EngineSize | None = None
    log: str


class EngineForm(Record):
    """What makes up a form of the model, as `convert.ort_form.OrtForm` has it."""

    fused_attention: bool
    int8: Int8 | None
    provider: ProviderName


class TriedForm(Record):
    """A form of the model that was built and timed on this machine, in turns with the others.

    Attributes:
        form: what makes it up, in words for people.
        made_of: the same as fields; None in an older manifest.
        p50_ms: median time of one inference.
        speed_up, low, high: against the first form that passed the gate: median and its 95 % confidence interval; None
            for that form itself.
        refused: why it is no candidate, e.g. the gate's words; None for a candidate, which has times.
        chosen: it became the engine.
    """

    form: str
    made_of: EngineForm | None = None
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
    if not is_there(path):
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
