"""The models that a report is about, each with all that the records say of it: what was frozen, its cost, its gain.

Records name files by their SHA-256: an evaluation and a profile those of engines, a manifest also those of the ONNX
model and the checkpoint behind its engine. What shares a digest is one model. A profile's frozen engine that no digest
ties to another record is taken for a known model only if its summary fits exactly one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from eamdeploy.artifacts.card import Freezing, FreezingCost, Recovery
from eamdeploy.eam.analysis import Analysis
from eamdeploy.engines.manifest import Manifest
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.records.profile import ModelSummary
from eamdeploy.reporting import numbers
from eamdeploy.reporting.records import heat_map
from eamdeploy.reporting.records.exports import Exported
from eamdeploy.reporting.records.heat_map import HeatMap
from eamdeploy.reporting.records.measurements import Engine, Measurement
from eamdeploy.reporting.records.sources import CheckpointFile, Sources
from eamdeploy.vocabulary import Granularity


@dataclass(frozen=True)
class Frozen:
    """What of a model is frozen.

    Attributes:
        heads: how many have something frozen, of `all_heads`; the latter is None where no record says it.
        granularity: None where no record says it.
        planned: it would be frozen, by an analysis.
        cost: what the frozen set costs on its calibration images, where that was measured.
        low_rank: how many of these heads are frozen with which rank, ranks ascending.
        recovery: how the model recovered from it; None where it did not.
    """

    heads: int
    sparsity: float
    bits: int | None
    quantizer: str | None
    score: str | None
    all_heads: int | None = None
    granularity: Granularity | None = None
    window_maps: str | None = None
    sparsity_asked: float | None = None
    planned: bool = False
    cost: FreezingCost | None = None
    low_rank: tuple[tuple[int, int], ...] = ()
    recovery: Recovery | None = None

    @property
    def summary(self) -> tuple[object, ...]:
        """The part that a profile records."""
        return (self.heads, self.sparsity, self.bits, self.quantizer, self.score)


@dataclass(frozen=True)
class ReportedModel:
    """One model, or what one record says of it.

    Attributes:
        model: its name in timm, or that of the file which is all that is known.
        title: its name, and what tells it from others of the same name.
        digests: of its checkpoint, ONNX model and engines, as far as they are known.
        frozen: None where nothing is, or no record says what.
        heat: None where the scores of its heads are not recorded.
        measured: its engines, each with the measurement that it is part of.
    """

    model: str
    title: str = ""
    digests: frozenset[str] = frozenset()
    frozen: Frozen | None = None
    heat: HeatMap | None = None
    evaluations: tuple[EvaluationReport, ...] = ()
    measured: tuple[tuple[Measurement, Engine], ...] = ()
    exports: tuple[Exported, ...] = ()


def reported_models(
    sources: Sources, measurements: Sequence[Measurement], exports: Sequence[Exported], names: Mapping[str, str]
) -> list[ReportedModel]:
    """The models, in the order in which the records speak of them; one per analysis only if it has no other record.

    Args:
        names: the short names of engines, for models that nothing else names.
    """
    found: list[ReportedModel] = []
    for part in _parts(sources, measurements, exports, names):
        index = _index(part, found)
        if index is None:
            found.append(part)
        else:
            found[index] = _joined(found[index], part)
    found = [each for each in found if each.frozen or each.evaluations or each.measured or each.exports]
    models = {reported.model for reported in found}
    found += [_planned(item.record) for item in sources.of(Analysis) if item.record.timm_model not in models]
    return _told_apart(found)


def _told_apart(found: Sequence[ReportedModel]) -> list[ReportedModel]:
    """The models; those of the same model have their sparsity in the title, and a number if that is the same too."""
    models = Counter(reported.model for reported in found)
    seen: Counter[str] = Counter()
    result = []
    for reported in found:
        title = reported.model
        if models[title] > 1 and reported.frozen is not None:
            title = f"{title} at {numbers.share(reported.frozen.sparsity)} sparsity"
        seen[title] += 1
        title = title if seen[title] == 1 else f"{title} ({seen[title]})"
        picture = None if reported.heat is None else replace(reported.heat, title=title)
        result.append(replace(reported, title=title, heat=picture))
    return result


def _parts(
    sources: Sources, measurements: Sequence[Measurement], exports: Sequence[Exported], names: Mapping[str, str]
) -> Iterator[ReportedModel]:
    """What every record says of a model; those that tie digests together first."""
    seals = {item.record.content_digest: item.digest for item in sources.checkpoints}
    teachers = [item.record.recovery.teacher for item in sources.checkpoints if item.record.recovery is not None]
    deployed = [item for item in sources.checkpoints if item.record.content_digest not in teachers]
    yield from (_of_checkpoint(item, seals) for item in deployed)
    for manifest in sources.of(Manifest):
        yield from _of_manifest(manifest.record)
    for measurement in measurements:
        for engine in measurement.engines:
            if not engine.is_baseline:
                yield _of_engine(measurement, engine)
    for export in exports:
        yield ReportedModel(export.model, digests=frozenset({export.digest}), exports=(export,))
    for item in sources.of(EvaluationReport):
        evaluation = item.record
        yield ReportedModel(
            names[evaluation.model], digests=frozenset({evaluation.model_digest}), evaluations=(evaluation,)
        )


def _index(part: ReportedModel, found: Sequence[ReportedModel]) -> int | None:
    """Which model the part belongs to."""
    for index, reported in enumerate(found):
        if reported.digests & part.digests:
            return index
    if part.frozen is None or not part.measured:
        return None
    summary = (part.model, part.frozen.summary)
    alike = [i for i, each in enumerate(found) if each.frozen and (each.model, each.frozen.summary) == summary]
    return alike[0] if len(alike) == 1 else None


def _joined(reported: ReportedModel, part: ReportedModel) -> ReportedModel:
    return replace(
        reported,
        digests=reported.digests | part.digests,
        frozen=reported.frozen or part.frozen,
        heat=reported.heat or part.heat,
        evaluations=reported.evaluations + part.evaluations,
        measured=reported.measured + part.measured,
        exports=reported.exports + part.exports,
    )


def _of_checkpoint(item: CheckpointFile, seals: Mapping[str | None, str]) -> ReportedModel:
    """What a checkpoint says; what its unfrozen teacher was made into belongs to the same model.

    Args:
        seals: the digests of all checkpoints by their seals.
    """
    header, digests = item.record, [item.digest]
    if header.recovery is not None and header.recovery.teacher in seals:
        digests.append(seals[header.recovery.teacher])
    return ReportedModel(
        header.timm_model,
        digests=frozenset(digests),
        frozen=_frozen(header.freezing, sum(shape.heads for shape in header.attention.values()), header.recovery),
        heat=heat_map.of_checkpoint(header, item.shares),
    )


def _of_manifest(manifest: Manifest) -> Iterator[ReportedModel]:
    """What a manifest ties together; of an unfrozen twin that it belongs to the model of its checkpoint."""
    card = manifest.card
    if card is None:
        return
    digests = (manifest.engine_digest, manifest.model_digest, card.checkpoint_digest)
    if card.freezing is None:
        yield ReportedModel(card.timm_model, digests=frozenset(filter(None, digests)))
        return
    heads = {path: len(values) for path, values in card.freezing.scores.items()}
    picture = heat_map.of_freezing(card.timm_model, card.freezing, heads, None) if heads else None
    yield ReportedModel(
        card.timm_model,
        digests=frozenset(filter(None, digests)),
        frozen=_frozen(card.freezing, sum(heads.values()) or None, card.recovery),
        heat=picture,
    )


def _of_engine(measurement: Measurement, engine: Engine) -> ReportedModel:
    model, digests, measured = engine.model, frozenset({engine.digest}), ((measurement, engine),)
    if model is None or not engine.is_frozen:
        return ReportedModel(engine.name, digests=digests, measured=measured)
    return ReportedModel(model.timm_model, digests=digests, frozen=_summarized(model), measured=measured)


def _planned(analysis: Analysis) -> ReportedModel:
    frozen = Frozen(
        heads=sum(map(len, analysis.frozen.values())),
        sparsity=analysis.sparsity,
        bits=None,
        quantizer=None,
        score=analysis.score,
        all_heads=sum(shape.heads for shape in analysis.attention.values()),
        granularity=analysis.granularity,
        window_maps=analysis.window_maps,
        sparsity_asked=analysis.sparsity_asked,
        planned=True,
    )
    return ReportedModel(analysis.timm_model, frozen=frozen)


def _frozen(freezing: Freezing, all_heads: int | None, recovery: Recovery | None) -> Frozen:
    return Frozen(
        heads=sum(map(len, freezing.heads.values())),
        sparsity=freezing.sparsity,
        bits=freezing.bits,
        quantizer=freezing.quantizer,
        score=freezing.score,
        all_heads=all_heads,
        granularity=freezing.granularity,
        window_maps=freezing.window_maps,
        sparsity_asked=freezing.sparsity_asked,
        cost=freezing.cost,
        low_rank=tuple((rank, count) for rank, count in freezing.low_rank.items()),
        recovery=recovery,
    )


def _summarized(model: ModelSummary) -> Frozen:
    return Frozen(model.frozen_heads, model.sparsity, model.bits, model.quantizer, model.score)
