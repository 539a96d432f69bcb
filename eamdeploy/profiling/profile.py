"""Latency and memory of engines on this machine, side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eamdeploy.artifact import ModelCard, Record
from eamdeploy.devices.base import Device, DeviceState, SensorNotes
from eamdeploy.devices.registry import find_device
from eamdeploy.engines.base import LatencySplit, ProviderName, read_manifest
from eamdeploy.engines.proof import prove_here
from eamdeploy.engines.registry import backend_of, open_runner, open_runners, runs_on_gpu
from eamdeploy.errors import ConfigError, DeviceError
from eamdeploy.observer import SILENT, Observer
from eamdeploy.onnx_files import digest_model
from eamdeploy.parity import ParityReport
from eamdeploy.profiling.fresh_process import ColdStart, Memory, measure_fresh
from eamdeploy.profiling.inputs import random_images
from eamdeploy.profiling.machine import Machine, describe_machine
from eamdeploy.profiling.power import Power, PowerMeasurement, measure_power
from eamdeploy.profiling.streams import Throughput, measure_throughput
from eamdeploy.profiling.timing import (
    Call,
    Clock,
    Latency,
    Schedule,
    SpeedUp,
    runs_of,
    speed_up,
    summarize,
    time_sittings,
)

_SPLIT_RUNS = 100
_LAYER_RUNS = 50
_SENSOR_INTERVAL_S = 0.1


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


@dataclass(frozen=True)
class Extras:
    """What is measured besides latency.

    Attributes:
        fresh: memory and cold start, in a fresh process for each engine.
        streams: inferences side by side for the throughput; with 1 there is nothing besides latency to measure.
        layers: the time of every layer.
        power: power and energy, for `power_seconds` in each of an engine's two blocks.
    """

    fresh: bool = True
    streams: int = 1
    layers: bool = False
    power: bool = True
    power_seconds: float = 5.0

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ConfigError("the number of streams can't be used", expected="at least 1", got=self.streams)


def profile(
    engines: Sequence[Path],
    baseline: Path | None = None,
    *,
    threads: int,
    batch: int = 1,
    device: Device | None = None,
    schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
    extras: Extras = Extras(),
    clock: Clock = time.perf_counter_ns,
    check: bool = True,
    observer: Observer = SILENT,
) -> Profile:
    """Figures of every engine, all measured with the same input and number of threads.

    In this order: memory and cold start, in a process for each engine; latency, with all engines loaded together and
    taking turns in several sittings; power, if the device has a sensor; then engine by engine throughput, split and
    layers. A device or a sensor that stops to answer meanwhile takes no other figure away: the profile says so.

    Args:
        device: what the engines run on; None finds it: a Jetson, else a GPU if an engine needs one, else the processor.
        check: prove engines anew that were proved on another kind of processor, see `engines.proof`.

    Raises:
        ParityError: such an engine is not what it was there.
        ConfigError: no engine is given, one can't be read, or it does not take batches of this size.
        EngineError: an engine fails.
        MissingDependency: its backend is not installed here.
    """
    if not engines:
        raise ConfigError("there is nothing to profile", expected="at least 1 engine")
    paths = [*([baseline] if baseline is not None else []), *engines]

    opening = [partial(open_runner, path, threads) for path in paths]

    @contextmanager
    def load(order: Sequence[int]) -> Iterator[list[Call]]:
        with open_runners(opening, order) as runners:
            yield [partial(runner.infer, random_images(runner, batch)) for runner in runners]

    device = device or find_device(gpu=any(map(runs_on_gpu, paths)))
    with load(range(len(paths))):
        pass  # what can't be loaded, or takes another batch, fails here and not after minutes of work
    parities = [prove_here(path, threads, check=check, note=observer.note) for path in paths]
    before = _state(device)
    fresh = [measure_fresh(path, threads=threads, batch=batch) for path in paths] if extras.fresh else []
    times = time_sittings(load, len(paths), schedule, clock)
    latencies = [summarize(runs_of(times, index), batch) for index in range(len(paths))]
    with load(range(len(paths))) as calls:
        measured = _measure_power(device, calls, batch, extras)
    alone = [_run_alone(path, threads, batch, schedule.min_seconds, extras) for path in paths]
    profiles = [
        EngineProfile(
            engine=str(path),
            backend=backend_of(path),
            digest=digest_model(path),
            model=None if single.card is None else summarize_card(single.card),
            provider=single.provider,
            settings=single.settings,
            parity=parities[index],
            latency=latencies[index],
            memory=fresh[index].memory if fresh else None,
            cold_start=fresh[index].cold_start if fresh else None,
            split=single.split,
            throughput=single.throughput,
            layer_ms=single.layer_ms,
            power=None if measured is None else measured.powers[index],
            speed_up=speed_up(times, 0, index) if baseline is not None and index > 0 else None,
        )
        for index, (path, single) in enumerate(zip(paths, alone, strict=True))
    ]
    return Profile(
        machine=describe_machine(),
        device_before=before,
        device_after=_state(device),
        threads=threads,
        batch=batch,
        warmup_ms=schedule.warmup_ms,
        min_seconds=schedule.min_seconds,
        min_runs=schedule.min_runs,
        sittings=schedule.sittings,
        baseline=profiles[0] if baseline is not None else None,
        engines=profiles[1:] if baseline is not None else profiles,
        sensor=None if measured is None else measured.notes,
    )


def _state(device: Device) -> DeviceState:
    """The device now; of one that does not answer any more, what it said instead."""
    try:
        return device.state()
    except (DeviceError, OSError) as err:
        return DeviceState(kind=device.kind, name=device.kind, warnings=[f"its state could not be read: {err}"])


def _measure_power(device: Device, calls: Sequence[Call], batch: int, extras: Extras) -> PowerMeasurement | None:
    """Power of every engine, as far as the sensor gave it; None where there is no sensor, or that was not asked for."""
    if not extras.power:
        return None
    try:
        sensor = device.sensor(_SENSOR_INTERVAL_S)
    except (DeviceError, OSError) as err:
        return PowerMeasurement([None] * len(calls), SensorNotes(source=device.kind, failure=str(err)))
    return None if sensor is None else measure_power(sensor, calls, batch, seconds=extras.power_seconds)


@dataclass(frozen=True)
class _Alone:
    """What is read off and measured while one engine alone is loaded."""

    card: ModelCard | None
    provider: ProviderName | None
    settings: dict[str, str]
    split: LatencySplit | None
    throughput: Throughput | None
    layer_ms: dict[str, float] | None


def _run_alone(path: Path, threads: int, batch: int, seconds: float, extras: Extras) -> _Alone:
    throughput = None
    if extras.streams > 1:
        opening = [partial(open_runner, path, threads)] * extras.streams
        with open_runners(opening, range(extras.streams)) as runners:
            calls = [partial(runner.infer, random_images(runner, batch)) for runner in runners]
            throughput = measure_throughput(calls, batch=batch, seconds=seconds)
    manifest = read_manifest(path)
    with open_runner(path, threads) as runner:
        images = random_images(runner, batch)
        return _Alone(
            card=runner.card,
            provider=(manifest.provider if manifest else "cpu") if backend_of(path) == "ort" else None,
            settings=dict(runner.settings),
            split=runner.split(images, _SPLIT_RUNS),
            throughput=throughput,
            layer_ms=runner.layer_times(images, _LAYER_RUNS) if extras.layers else None,
        )


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
