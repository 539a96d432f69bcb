"""Everything in the records that makes a figure doubtful, in words for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from eamdeploy.artifact import RANDOM_WARNING
from eamdeploy.eam.analysis import Analysis
from eamdeploy.engines.base import Manifest
from eamdeploy.evaluation import EvaluationReport
from eamdeploy.parity import ParityReport
from eamdeploy.profiling.profile import EngineProfile, Profile
from eamdeploy.reporting.sources import Sources


def caveats(sources: Sources, names: Mapping[str, str]) -> list[str]:
    """Each once, the gravest first.

    Args:
        names: the short names of engines.
    """
    found = [
        *_random_weights(sources, names),
        *(f"{file}: it is no longer what its run.json says was written; run again" for file in sources.altered),
        *_parity(sources, names),
        *_other_builds(sources, names),
        *_skipped(sources, names),
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


def _unsteady(sources: Sources, names: Mapping[str, str]) -> Iterator[str]:
    several = len(sources.of(Profile)) > 1
    for profile, engine in _engines(sources):
        if engine.latency.warning:
            where = f" on {profile.machine.cpu}" if several else ""
            yield f"{names[engine.engine]}{where}: {engine.latency.warning}"


def _engines(sources: Sources) -> Iterator[tuple[Profile, EngineProfile]]:
    for item in sources.of(Profile):
        profile = item.record
        for engine in [*([profile.baseline] if profile.baseline else []), *profile.engines]:
            yield profile, engine
