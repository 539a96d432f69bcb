"""Latency and memory of engines on this machine, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from eamdeploy.artifacts.card import ModelCard
from eamdeploy.artifacts.onnx_files import digest_model
from eamdeploy.devices.base import Device, DeviceState, SensorNotes
from eamdeploy.devices.machine import describe_machine
from eamdeploy.devices.registry import find_device
from eamdeploy.engines.manifest import read_manifest
from eamdeploy.engines.proof import prove_here
from eamdeploy.engines.registry import backend_of, open_runner, runs_on_gpu
from eamdeploy.engines.runner import LatencySplit
from eamdeploy.errors import ConfigError, DeviceError
from eamdeploy.observer import SILENT, Observer
from eamdeploy.profiling.fresh_process import measure_fresh
from eamdeploy.profiling.inputs import random_images
from eamdeploy.profiling.power import PowerMeasurement, measure_power
from eamdeploy.profiling.streams import Throughput, measure_throughput
from eamdeploy.profiling.timing import (
    Call,
    Clock,
    Schedule,
    runs_of,
    speed_up,
    summarize,
    time_sittings,
)
from eamdeploy.profiling.turns import taking_turns
from eamdeploy.records.profile import EngineProfile, Profile, summarize_card
from eamdeploy.vocabulary import ProviderName

_SPLIT_RUNS = 100
_LAYER_RUNS = 50
_SENSOR_INTERVAL_S = 0.1


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
    load = taking_turns([partial(open_runner, path, threads) for path in paths], batch)
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
        with taking_turns(opening, batch)(range(extras.streams)) as calls:
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
