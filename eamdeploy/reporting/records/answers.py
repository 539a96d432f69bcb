"""What a person must see at one glance: of every model what was frozen, what it cost and what it gained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from eamdeploy.eam.selection import PLURALS
from eamdeploy.profiling.timing import SpeedUp
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.reporting import numbers
from eamdeploy.reporting.records.exports import Exported
from eamdeploy.reporting.records.measurements import Engine, Measurement
from eamdeploy.reporting.records.reported_models import Frozen, ReportedModel


@dataclass(frozen=True)
class Figure:
    """One large number.

    Attributes:
        label: what the number is.
        details: what else belongs to it, each a line.
        verdict: for a speed-up, what its interval says; empty for others.
    """

    value: str
    label: str
    details: tuple[str, ...] = ()
    verdict: str = ""


@dataclass(frozen=True)
class Panel:
    """The answer to one question.

    Attributes:
        figures: empty where the records have no answer, which `missing` then says.
    """

    question: str
    figures: tuple[Figure, ...]
    missing: str


@dataclass(frozen=True)
class Answers:
    """One model's three answers."""

    title: str
    panels: tuple[Panel, Panel, Panel]


def answers(reported: ReportedModel, names: Mapping[str, str]) -> Answers:
    """What the records say of the model.

    Args:
        names: the short names of engines.
    """
    frozen = () if reported.frozen is None else (_frozen(reported.frozen),)
    several = len(reported.evaluations) > 1
    costs = tuple(_cost(each, names, named=several) for each in reported.evaluations)
    gains = tuple(_gain(*each, named=len(reported.measured) > 1) for each in reported.measured)
    is_live = any(engine.model is not None and not engine.is_frozen for _, engine in reported.measured)
    return Answers(
        reported.title,
        (
            Panel("Frozen", frozen, "Nothing is frozen." if is_live else "No record says what is frozen here."),
            Panel("Cost", costs, "Accuracy was not measured, or its record is not among these files."),
            Panel("Gain", gains or tuple(map(_gain_at_export, reported.exports)), "Speed was not measured here."),
        ),
    )


def _frozen(frozen: Frozen) -> Figure:
    heads = f"{frozen.heads} of {frozen.all_heads} heads" if frozen.all_heads else numbers.plural(frozen.heads, "head")
    asked = "" if frozen.sparsity_asked is None else f" ({numbers.share(frozen.sparsity_asked)} asked for)"
    details = [f"sparsity {numbers.share(frozen.sparsity)} of all attention entries{asked}"]
    details += [f"{numbers.plural(count, 'head')} with rank {rank}" for rank, count in frozen.low_rank]
    if frozen.bits is not None:
        details.append(f"{frozen.bits}-bit codes, {frozen.quantizer}")
    if frozen.score is not None:
        details.append("chosen by the maps' author" if frozen.score == "given" else f"chosen by {frozen.score}")
    if (cost := frozen.cost) is not None:
        images = numbers.plural(cost.n_images, "calibration image")
        details.append(f"agreement {numbers.percent(cost.agreement)}, KL {cost.kl:.3g} nats on {images}")
    if (recovery := frozen.recovery) is not None:
        before, after = recovery.before, recovery.after
        images = numbers.plural(after.n_images, "image")
        details.append(
            f"recovered ({recovery.method}): agreement {numbers.percent(before.agreement)} before, "
            f"{numbers.percent(after.agreement)} after, on {images} held back"
        )
    if frozen.window_maps is not None:
        details.append(f"window maps: {frozen.window_maps}")
    return Figure(heads, _how(frozen), tuple(details))


def _how(frozen: Frozen) -> str:
    """How much of these heads is frozen."""
    if frozen.granularity is None:
        return "frozen; whole or in part is not recorded"
    if frozen.granularity == "head":
        return "would be frozen" if frozen.planned else "frozen"
    return f"{'would have' if frozen.planned else 'with'} frozen {PLURALS[frozen.granularity]}"


def _cost(report: EvaluationReport, names: Mapping[str, str], *, named: bool) -> Figure:
    images = numbers.plural(report.n_images, "image")
    source = (*((names[report.model],) if named else ()), f"images of {report.images}")
    against = "" if report.reference is None else f"agreement with {names[report.reference]}"
    if report.top1 is None:
        if report.agreement is None:
            return Figure("–", f"neither labels nor a reference, {images}", source)
        label = f"{against}, {images}"
        return Figure(numbers.percent(report.agreement), label, ("no labels: top-1 is unknown", *source))
    agreement = () if report.agreement is None else (f"{against} {numbers.percent(report.agreement)}",)
    label = f"top-1 of {images}"
    if report.reference_top1 is None:
        return Figure(numbers.percent(report.top1), label, (*agreement, *source))
    change = numbers.points(report.top1, report.reference_top1)
    value = f"{report.reference_top1:.1f} → {numbers.percent(report.top1)}"
    return Figure(value, label, (change, *agreement, *source))


def _gain(measurement: Measurement, engine: Engine, *, named: bool) -> Figure:
    where = (f"{engine.name} on {measurement.place}",) if named else ()
    baseline = measurement.baseline
    p50 = numbers.milliseconds(engine.times.p50_ms)
    if engine.speed_up is None or baseline is None:
        return Figure(p50, "p50 of one inference, without a baseline", (*where, *_needs(engine, None)))
    details = (_interval(engine.speed_up), f"p50 {numbers.milliseconds(baseline.times.p50_ms)} → {p50}")
    return _speed(engine.speed_up, baseline.name, (*where, *details, *_needs(engine, baseline)))


def _gain_at_export(exported: Exported) -> Figure:
    sizes = (f"model {_before_after(exported.twin_bytes, exported.bytes, numbers.size)}",)
    if exported.gain is None:
        return Figure(numbers.size(exported.bytes), "ONNX model; speed was not measured", sizes)
    twin = "the unfrozen twin"
    return _speed(exported.gain, twin, (f"at export on {exported.gain_place}", _interval(exported.gain), *sizes))


def _speed(ratio: SpeedUp, baseline: str, details: tuple[str, ...]) -> Figure:
    return Figure(numbers.ratio(ratio.median), f"speed of {baseline}", details, ratio.verdict)


def _interval(ratio: SpeedUp) -> str:
    return numbers.interval(ratio.low, ratio.high)


def _needs(engine: Engine, baseline: Engine | None) -> tuple[str, ...]:
    """Energy, disk and memory, as far as they were measured."""
    named = (("energy per image", numbers.energy), ("file", numbers.size), ("peak memory", numbers.size))
    old = (None,) * len(named) if baseline is None else _amounts(baseline)
    return tuple(
        f"{name} {_before_after(before, after, write)}"
        for (name, write), before, after in zip(named, old, _amounts(engine), strict=True)
        if after is not None
    )


def _amounts(engine: Engine) -> tuple[float | None, ...]:
    energy_mj = None if engine.power is None else engine.power.energy_mj_per_image
    return (energy_mj, engine.sizes.file, engine.sizes.peak)


def _before_after(before: float | None, after: float, write: Callable[[float], str]) -> str:
    if not before:
        return write(after)
    return f"{write(before)} → {write(after)} ({numbers.change(after, before)})"
