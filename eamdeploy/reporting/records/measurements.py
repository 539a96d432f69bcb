"""Profiles as the plain figures that a report shows; what a profile records, and how, is known here alone.

Parts of a profile that are plain figures already are taken over as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from eamdeploy.engines.manifest import Manifest
from eamdeploy.engines.runner import LatencySplit
from eamdeploy.profiling.fresh_process import ColdStart
from eamdeploy.profiling.power import Power
from eamdeploy.profiling.streams import Throughput
from eamdeploy.profiling.timing import Latency, SpeedUp
from eamdeploy.records.profile import EngineProfile, ModelSummary, Profile
from eamdeploy.reporting import numbers
from eamdeploy.reporting.records.layers import LayerTimes, layer_times
from eamdeploy.reporting.records.machines import Facts, machine_facts, place
from eamdeploy.reporting.records.sources import ProfileSource, Sources

RUNTIMES: Final[Mapping[str, str]] = {"ort": "ONNX Runtime", "trt": "TensorRT"}


@dataclass(frozen=True)
class EngineBytes:
    """Bytes of an engine; None where one was not recorded.

    Attributes:
        file: the engine file.
        peak: resident memory of a process that holds this engine alone, at its worst; `own` is the part of it that
            came with the engine, `rss` what was resident at the end, `pss` the same with shared pages divided.
        device: on the GPU, besides the weights.
        drop: by how much less the whole machine had available; negative where other programs gave memory back.
        nvmap: that a Tegra GPU's driver gave out to all programs.
    """

    file: int | None
    peak: int | None = None
    own: int | None = None
    rss: int | None = None
    pss: int | None = None
    device: int | None = None
    drop: int | None = None
    nvmap: int | None = None


@dataclass(frozen=True)
class Engine:
    """One engine as it was measured; None for what was not.

    Attributes:
        name: the file's, with as many of its folders as it takes to tell it from the others.
        digest: SHA-256 of the file.
        what: which model it is and what of it is frozen, in words.
        speed_up: against the baseline of its measurement.
        split: where the time goes on a GPU.
        throughput: with several inferences at once.
    """

    name: str
    digest: str
    runtime: str
    model: ModelSummary | None
    what: str
    is_baseline: bool
    times: Latency
    speed_up: SpeedUp | None
    split: LatencySplit | None
    throughput: Throughput | None
    cold_start: ColdStart | None
    power: Power | None
    sizes: EngineBytes
    layers: LayerTimes | None

    @property
    def is_frozen(self) -> bool:
        return self.model is not None and self.model.frozen_heads > 0


@dataclass(frozen=True)
class Measurement:
    """Engines that took turns on one machine.

    Attributes:
        source: the profile's file, and the machine's address if the file has several.
        place: the machine in a few words.
        conditions: how it was measured, in words.
        engines: the baseline first, if there is one.
    """

    source: str
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
    return [_measurement(item, manifests, names) for item in sources.profiles]


def describe(model: ModelSummary | None) -> str:
    """What of a model is frozen, in words."""
    if model is None:
        return "a model of somebody else"
    if model.frozen_heads == 0:
        return f"{model.timm_model}, unfrozen"
    heads = numbers.plural(model.frozen_heads, "head")
    stored = f"{model.bits} bits {model.quantizer}"
    return f"{model.timm_model}, {heads} frozen, sparsity {numbers.share(model.sparsity)}, {stored}"


def _measurement(source: ProfileSource, manifests: Mapping[str, Manifest], names: Mapping[str, str]) -> Measurement:
    profile, where = source.record, place(source)
    return Measurement(
        source=source.label,
        place=where,
        conditions=_conditions(profile, len(source.engines)),
        machine=machine_facts(profile),
        engines=tuple(
            _engine(item, item is profile.baseline, manifests.get(item.digest), names[item.engine], where)
            for item in source.engines
        ),
    )


def _conditions(profile: Profile, n_engines: int) -> str:
    parts = (
        numbers.plural(profile.threads, "thread"),
        f"batch {profile.batch}",
        "engines took turns" if n_engines > 1 else "one engine alone",
        f"{numbers.plural(profile.sittings, 'sitting')} with {profile.warmup_ms:g} ms of warm-up",
        f"at least {profile.min_seconds:g} s and {numbers.plural(profile.min_runs, 'run')} each",
    )
    return ", ".join(parts)


def runtime_name(backend: str, provider: str | None) -> str:
    """What ran an engine, with ONNX Runtime's execution provider where that is not its CPU's."""
    name = RUNTIMES.get(backend, backend)
    return name if provider in (None, "cpu") else f"{name} ({provider})"


def _engine(item: EngineProfile, is_baseline: bool, manifest: Manifest | None, name: str, where: str) -> Engine:
    return Engine(
        name=name,
        digest=item.digest,
        runtime=runtime_name(item.backend, item.provider),
        model=item.model,
        what=describe(item.model),
        is_baseline=is_baseline,
        times=item.latency,
        speed_up=item.speed_up,
        split=item.split,
        throughput=item.throughput,
        cold_start=item.cold_start,
        power=item.power,
        sizes=_sizes(item, manifest),
        layers=layer_times(name, item.digest, f"by profile, on {where}", item.layer_ms),
    )


def _sizes(item: EngineProfile, manifest: Manifest | None) -> EngineBytes:
    """What was measured, and for want of that what the manifest says."""
    device = manifest.device if manifest else None
    planned = None if device is None else device.device_memory_bytes
    memory = item.memory
    if memory is None:
        return EngineBytes(file=manifest.engine_bytes if manifest else None, device=planned)
    return EngineBytes(
        file=memory.engine_bytes,
        peak=memory.peak_rss_bytes,
        own=memory.engine_peak_rss_bytes,
        rss=memory.rss_bytes,
        pss=memory.pss_bytes,
        device=planned if memory.device_memory_bytes is None else memory.device_memory_bytes,
        drop=memory.available_drop_bytes,
        nvmap=memory.nvmap_bytes,
    )
