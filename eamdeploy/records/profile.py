"""What `profile` measured."""

from __future__ import annotations

from eamdeploy.artifacts.card import ModelCard
from eamdeploy.artifacts.records import Record
from eamdeploy.devices.base import DeviceState, SensorNotes
from eamdeploy.devices.machine import Machine
from eamdeploy.engines.runner import LatencySplit
from eamdeploy.parity.gate import ParityReport
from eamdeploy.profiling.fresh_process import ColdStart, Memory
from eamdeploy.profiling.power import Power
from eamdeploy.profiling.streams import Throughput
from eamdeploy.profiling.timing import (
    Latency,
    SpeedUp,
)
from eamdeploy.vocabulary import ProviderName


class ModelSummary(Record):
    """The part of a model's card that a table of figures needs.

    Attributes:
        frozen_heads: heads of all layers that are frozen; with `sparsity` 0 for an unfrozen model.
        bits, quantizer, score: None for an unfrozen model.
    """

    timm_model: str
    weights: str
    num_classes: int
    sparsity: float
    frozen_heads: int
    bits: int | None
    quantizer: str | None
    score: str | None


class EngineProfile(Record):
    """Figures of one engine.

    Attributes:
        engine: the path as it was given.
        digest: SHA-256 of what was measured (`onnx_files.digest_model`).
        model: None for a foreign model.
        provider: what ONNX Runtime ran it on; None for another backend, and where an older profile does not say.
        settings: what the backend ran it with, beyond its defaults.
        parity: the gate on this kind of processor, at build time or before the profile; None means not checked.
        memory, cold_start: in a fresh process; None where that was not asked for.
        split: where the time goes; None for an engine that copies nothing to a device.
        throughput: with several inferences at once; None for one at a time, which `latency` tells.
        layer_ms: time of every layer; None where that was not asked for.
        power: while it ran alone; None where the device has no sensor or it gave no reading, or that was not asked for.
        speed_up: against the baseline, from runs that took turns; None for the baseline itself or without one.
    """

    engine: str
    backend: str
    digest: str
    model: ModelSummary | None
    provider: ProviderName | None = None
    settings: dict[str, str]
    parity: ParityReport | None
    latency: Latency
    memory: Memory | None
    cold_start: ColdStart | None
    split: LatencySplit | None
    throughput: Throughput | None
    layer_ms: dict[str, float] | None
    power: Power | None
    speed_up: SpeedUp | None


class Profile(Record):
    """Figures of engines that took turns on one machine.

    Attributes:
        device_before, device_after: state of the device at the start and right after the last block.
        threads: threads of each inference.
        baseline: what the speed-ups are against.
        sensor: what the sensors could not read while power was measured; None where there are none, or that was not
            asked for, and where an older profile does not say.
    """

    machine: Machine
    device_before: DeviceState
    device_after: DeviceState
    threads: int
    batch: int
    warmup_ms: float
    min_seconds: float
    min_runs: int
    sittings: int
    baseline: EngineProfile | None
    engines: list[EngineProfile]
    sensor: SensorNotes | None = None


def summarize_card(card: ModelCard) -> ModelSummary:
    """What a table says about the model."""
    freezing = card.freezing
    return ModelSummary(
        timm_model=card.timm_model,
        weights=card.weights,
        num_classes=card.num_classes,
        sparsity=freezing.sparsity if freezing else 0.0,
        frozen_heads=sum(len(heads) for heads in freezing.heads.values()) if freezing else 0,
        bits=freezing.bits if freezing else None,
        quantizer=freezing.quantizer if freezing else None,
        score=freezing.score if freezing else None,
    )
