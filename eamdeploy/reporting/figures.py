"""Profiles as the plain figures that a report shows; what a profile records, and how, is known here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from eamdeploy.engines.base import Manifest
from eamdeploy.profiling.machine import Machine
from eamdeploy.profiling.profile import EngineProfile, ModelSummary, Profile
from eamdeploy.profiling.timing import SpeedUp
from eamdeploy.reporting import numbers
from eamdeploy.reporting.sources import Sources

RUNTIMES: Final[Mapping[str, str]] = {"ort": "ONNX Runtime", "trt": "TensorRT"}

Facts = tuple[tuple[str, str], ...]
"""Names and values, as they are written."""


@dataclass(frozen=True)
class Ratio:
    """How much faster something is than its baseline.

    Attributes:
        low, high: the interval around `median`, and `interval` what it is in words.
        p5, p95: between them lie nine of ten rounds.
        verdict: whether the interval says more than noise.
    """

    median: float
    low: float
    high: float
    interval: str
    p5: float
    p95: float
    verdict: Literal["faster", "slower", "no difference"]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one inference: where its distribution lies."""

    min_ms: float
    p50_ms: float
    mean_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    runs: int
    variation_percent: float
    images_per_s: float


@dataclass(frozen=True)
class Room:
    """Bytes of an engine.

    Attributes:
        file: the engine file; None where it was not recorded.
        peak: resident memory of a process that holds this engine alone, at its worst; `own` is the part of it that
            came with the engine. None, like `pss`, where it was not measured.
        device: on the GPU, besides the weights.
    """

    file: int | None
    peak: int | None
    own: int | None
    pss: int | None
    device: int | None


@dataclass(frozen=True)
class Engine:
    """One engine as it was measured.

    Attributes:
        name: the file's, with as many of its folders as it takes to tell it from the others.
        digest: SHA-256 of the file.
        what: which model it is and what of it is frozen, in words.
        speed_up: against the baseline of its measurement.
    """

    name: str
    digest: str
    runtime: str
    model: ModelSummary | None
    what: str
    is_baseline: bool
    times: Times
    speed_up: Ratio | None
    room: Room

    @property
    def is_frozen(self) -> bool:
        return self.model is not None and self.model.frozen_heads > 0


@dataclass(frozen=True)
class Measurement:
    """Engines that took turns on one machine.

    Attributes:
        file: the profile's.
        place: the machine in a few words.
        conditions: how it was measured, in words.
        engines: the baseline first, if there is one.
    """

    file: str
    place: str
    conditions: str
    machine: Facts
    engines: tuple[Engine, ...]

    @property
    def baseline(self) -> Engine | None:
        return next((engine for engine in self.engines if engine.is_baseline), None)


def measurements(sources: Sources, names: Mapping[str, str]) -> list[Measurement]:
    """One for each profile.

    Args:
        names: the short names of engines, see `engine_names`.
    """
    manifests = {item.record.engine_digest: item.record for item in sources.of(Manifest)}
    return [_measurement(item.file, item.record, manifests, names) for item in sources.of(Profile)]


def ratio(speed_up: SpeedUp) -> Ratio:
    """The speed-up with the middle half of its rounds; within the noise where that half holds 1."""
    low, high = speed_up.p25, speed_up.p75
    return Ratio(
        median=speed_up.median,
        low=low,
        high=high,
        interval=f"middle half of {numbers.plural(speed_up.rounds, 'round')}",
        p5=speed_up.p5,
        p95=speed_up.p95,
        verdict="faster" if low > 1 else "slower" if high < 1 else "no difference",
    )


def describe(model: ModelSummary | None) -> str:
    """What of a model is frozen, in words."""
    if model is None:
        return "a model of somebody else"
    if model.frozen_heads == 0:
        return f"{model.timm_model}, unfrozen"
    heads = numbers.plural(model.frozen_heads, "head")
    stored = f"{model.bits} bits {model.quantizer}"
    return f"{model.timm_model}, {heads} frozen, sparsity {numbers.share(model.sparsity)}, {stored}"


def _measurement(
    file: str, profile: Profile, manifests: Mapping[str, Manifest], names: Mapping[str, str]
) -> Measurement:
    everyone = [*([profile.baseline] if profile.baseline else []), *profile.engines]
    machine = profile.machine
    return Measurement(
        file=file,
        place=f"{machine.cpu}, {numbers.plural(machine.usable_cores, 'core')}",
        conditions=_conditions(profile, len(everyone)),
        machine=_machine(machine),
        engines=tuple(
            _engine(item, item is profile.baseline, manifests.get(item.digest), names[item.engine]) for item in everyone
        ),
    )


def _conditions(profile: Profile, n_engines: int) -> str:
    parts = (
        numbers.plural(profile.threads, "thread"),
        f"batch {profile.batch}",
        "engines took turns" if n_engines > 1 else "one engine alone",
        f"{profile.warmup_ms:g} ms of warm-up",
        f"at least {profile.min_seconds:g} s and {numbers.plural(profile.min_runs, 'run')} each",
    )
    return ", ".join(parts)


def _engine(item: EngineProfile, is_baseline: bool, manifest: Manifest | None, name: str) -> Engine:
    latency, memory = item.latency, item.memory
    device = manifest.device if manifest else None
    built = manifest.engine_bytes if manifest else None
    return Engine(
        name=name,
        digest=item.digest,
        runtime=RUNTIMES.get(item.backend, item.backend),
        model=item.model,
        what=describe(item.model),
        is_baseline=is_baseline,
        times=Times(
            min_ms=latency.min_ms,
            p50_ms=latency.p50_ms,
            mean_ms=latency.mean_ms,
            p90_ms=latency.p90_ms,
            p95_ms=latency.p95_ms,
            p99_ms=latency.p99_ms,
            runs=latency.runs,
            variation_percent=latency.variation_percent,
            images_per_s=latency.throughput_images_per_s,
        ),
        speed_up=None if item.speed_up is None else ratio(item.speed_up),
        room=Room(
            file=built if memory is None else memory.engine_bytes,
            peak=None if memory is None else memory.peak_rss_bytes,
            own=None if memory is None else memory.engine_peak_rss_bytes,
            pss=None if memory is None else memory.pss_bytes,
            device=None if device is None else device.device_memory_bytes,
        ),
    )


def _machine(machine: Machine) -> Facts:
    clock = [f"{mhz:.0f} MHz {when}" for mhz, when in _clocks(machine) if mhz is not None]
    facts = {
        "processor": machine.cpu,
        "cores": f"{machine.usable_cores} usable of {machine.cores}",
        "architecture": machine.architecture,
        "memory": numbers.size(machine.memory_bytes),
        "system": machine.system,
        "clock": ", ".join(clock),
        "governor": machine.governor or "",
        "load": "" if machine.load_1min is None else f"{machine.load_1min:.2f} (mean of a minute, at the end)",
        "measured": machine.measured_at,
    }
    return tuple((name, value or "not told by the system") for name, value in facts.items())


def _clocks(machine: Machine) -> tuple[tuple[float | None, str], ...]:
    return ((machine.frequency_mhz, "now"), (machine.max_frequency_mhz, "at most"))
