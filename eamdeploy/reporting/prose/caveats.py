"""Everything in the records that makes a figure doubtful, in words for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from eamdeploy.artifacts.card import RANDOM_WARNING
from eamdeploy.eam.analysis import Analysis
from eamdeploy.engines.manifest import Manifest
from eamdeploy.parity.gate import ParityReport
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.records.profile import EngineProfile
from eamdeploy.remote.profile import RemoteProfiles
from eamdeploy.reporting.records.sources import ProfileSource, Sources


def caveats(sources: Sources, names: Mapping[str, str]) -> list[str]:
    """Each once, the gravest first.

    Args:
        names: the short names of engines.
    """
    found = [
        *_random_weights(sources, names),
        *_labels(sources, names),
        *(f"{file}: it is no longer what its run.json says was written; run again" for file in sources.altered),
        *(
            f"{item.file}: a machine gave no figures: {failure.message}"
            for item in sources.of(RemoteProfiles)
            for failure in item.record.failures.values()
        ),
        *_parity(sources, names),
        *_other_builds(sources, names),
        *_skipped(sources, names),
        *_devices(sources),
        *_unsteady(sources, names),
    ]
    return list(dict.fromkeys(found))


def _random_weights(sources: Sources, names: Mapping[str, str]) -> Iterator[str]:
    weights = [
        *((item.record.timm_model, item.record.weights) for item in sources.checkpoints),
        *((item.record.timm_model, item.record.weights) for item in sources.of(Analysis)),
        *((card.timm_model, card.weights) for item in sources.of(Manifest) if (card := item.record.card)),
        *((engine.model.timm_model, engine.model.weights) for _, engine in _engines(sources) if engine.model),
        *((names[item.record.model], item.record.weights) for item in sources.of(EvaluationReport)),
    ]
    for name, source in weights:
        if source == "random":
            yield f"{name}: {RANDOM_WARNING}"


def _labels(sources: Sources, names: Mapping[str, str]) -> Iterator[str]:
    for item in sources.of(EvaluationReport):
        if item.record.doubt is not None:
            yield f"{names[item.record.model]}: {item.record.doubt}"


def _parity(sources: Sources, names: Mapping[str, str]) -> Iterator[str]:
    checked = [
        *((item.record.engine, item.record.parity) for item in sources.of(Manifest)),
        *((names[engine.engine], engine.parity) for _, engine in _engines(sources)),
    ]
    for name, parity in checked:
        yield from _doubt(name, parity)


def _doubt(name: str, parity: ParityReport | None) -> Iterator[str]:
    if parity is None:
        yield f"{name}: its parity was not checked"
    elif not parity.passed:
        yield f"{name}: its parity check failed: {parity.reason}"


def _other_builds(sources: Sources, names: Mapping[str, str]) -> Iterator[str]:
    """Figures of a file that was another one when it was described elsewhere."""
    described = {item.file.removesuffix(".json"): item.record.engine_digest for item in sources.of(Manifest)}
    measured = {engine.engine: engine.digest for _, engine in _engines(sources)}
    known = {*described.values(), *measured.values()}
    for path, digest in measured.items():
        if described.get(path, digest) != digest:
            yield f"{names[path]}: its manifest describes another build than the one that was measured"
    for item in sources.of(EvaluationReport):
        path, digest = item.record.model, item.record.model_digest
        if digest not in known and path in described.keys() | measured.keys():
            yield f"{names[path]}: its accuracy is that of another build than the one described or measured"


def _skipped(sources: Sources, names: Mapping[str, str]) -> Iterator[str]:
    for item in sources.of(EvaluationReport):
        if item.record.n_skipped:
            yield (
                f"{names[item.record.model]}: {item.record.n_skipped} images could not be decoded and are left out of "
                f"its accuracy: {', '.join(item.record.skipped)}"
            )


def _devices(sources: Sources) -> Iterator[str]:
    """What devices said of themselves, before and after, and what their sensors could not read."""
    for source in sources.profiles:
        name, before, after = source.short_name, source.record.device_before, source.record.device_after
        for moment, state in (("at the start", before), ("at the end", after)):
            yield from (f"{name}: slowed down {moment} of the measurement: {reason}" for reason in state.throttling)
        sensor = source.record.sensor
        said = [] if sensor is None else sensor.warnings()
        yield from (f"{name}: {warning}" for warning in (*before.warnings, *after.warnings, *said))


def _unsteady(sources: Sources, names: Mapping[str, str]) -> Iterator[str]:
    several = len(sources.profiles) > 1
    for source, engine in _engines(sources):
        name = f"{names[engine.engine]} on {source.short_name}" if several else names[engine.engine]
        if engine.latency.warning:
            yield f"{name}: {engine.latency.warning}"
        if engine.speed_up is not None and engine.speed_up.sittings == 1:
            yield f"{name}: its speed-up rests on one sitting; the interval does not hold what another would give"
        if engine.power is not None:
            yield from (f"{name}: {warning}" for warning in engine.power.warnings)


def _engines(sources: Sources) -> Iterator[tuple[ProfileSource, EngineProfile]]:
    return ((source, engine) for source in sources.profiles for engine in source.engines)
