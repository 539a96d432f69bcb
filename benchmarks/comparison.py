"""Engines of several kinds that take turns: what is measured of them, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
from candidates import Candidate, Family, Plan, Runtime, Skipped, make
from floor import Arithmetic, Peak, count_multiply_adds, measure_peak, products
from numpy.typing import NDArray
from peer_engines import stock
from study import Study, versions

from eamdeploy.artifacts.records import Record
from eamdeploy.devices.machine import Machine, describe_machine
from eamdeploy.images.preprocess import normalize
from eamdeploy.parity.accuracy import mean_kl, same_top1, top_k_hits
from eamdeploy.profiling.timing import (
    Call,
    Latency,
    Schedule,
    Sittings,
    SpeedUp,
    runs_of,
    speed_up,
    summarize,
    time_sittings,
)

PEAK_SECONDS = 0.1
# Other runtimes' threads spin on after each inference, on cores that whoever is next needs: taking turns with torch's
# OpenMP, stock went from 16.5 to 21 ms. Forbidding it slows torch itself, from 20 to 27 ms; so we wait for its end.
# ONNX Runtime's don't: `OrtRunner` stops them, for peers and ours alike.
SETTLE_SECONDS = 0.015


class Row(Record):
    """An engine and what it says of the images; figures are None where it is skipped.

    Attributes:
        skipped: why there is no engine.
        top1: percent; None without labels or with random weights.
        agreement, kl, max_abs: with the FP32 model in torch: percent of first classes, nats, largest |Δ logit|.
        model_bytes: of the files that one would ship.
        multiply_adds: of its products for one image.
    """

    name: str
    family: Family
    runtime: Runtime
    arithmetic: Arithmetic
    note: str = ""
    skipped: str | None = None
    top1: float | None = None
    agreement: float | None = None
    kl: float | None = None
    max_abs: float | None = None
    model_bytes: int | None = None
    multiply_adds: int | None = None


class Against(Record):
    """How much faster than another engine; `name` is the other's."""

    name: str
    speed_up: SpeedUp


class Timed(Record):
    """An engine's turns, and for ours how they compare.

    Attributes:
        floor_ms: its multiply-adds ÷ the peak of its arithmetic; `times_floor` is p50 ÷ that.
        stock: against the faster stock export.
        like: ours, against the fastest peer of the same runtime and arithmetic; None where there is none.
        best: ours, against the fastest peer of all.
        unfrozen: ours, against the same engine with nothing frozen.
    """

    name: str
    latency: Latency
    floor_ms: float
    times_floor: float
    stock: Against | None
    like: Against | None
    best: Against | None
    unfrozen: Against | None


class Combination(Record):
    """One interleaved run.

    Attributes:
        stock: the faster of the stock exports.
    """

    threads: int
    batch: int
    peaks: list[Peak]
    stock: str
    timed: list[Timed]


class ModelResult(Record):
    """Every engine of one model.

    Attributes:
        weights: a file name, or `random`.
        images: how many the accuracy is of.
        reference_top1: of the model in torch, percent.
    """

    model: str
    weights: str
    images: int
    reference_top1: float | None
    rows: list[Row]
    combinations: list[Combination]


class Peers(Record):
    """All that was measured, and how."""

    machine: Machine
    versions: dict[str, str]
    min_seconds: float
    min_runs: int
    sittings: int
    calibration_images: int
    models: list[ModelResult]


def run(
    studies: Sequence[Callable[[], Study]],
    plans: Sequence[Plan],
    combinations: Sequence[tuple[int, int]],
    schedule: Schedule,
    note: Callable[[str], None],
) -> Iterator[Peers]:
    """The comparison so far, each time when a combination of a model is done.

    Args:
        studies: open the models, one after the other.
        combinations: threads and batch of each interleaved run.
        note: is told what is being done.

    Raises:
        EamDeployError: an engine of ours can't be made or run, or no stock export can.
    """
    machine = describe_machine()
    done: list[ModelResult] = []
    for open_study in studies:
        study = open_study()
        found = []
        for plan in plans:
            note(f"{study.spec.name}: {plan.name}")
            found.append(make(plan, study))
        candidates = [item for item in found if isinstance(item, Candidate)]
        rows = [_row(item, study) for item in found]
        measured: list[Combination] = []
        for threads, batch in combinations:
            note(f"{study.spec.name}: taking turns, {threads} threads, batch {batch}")
            measured.append(measure(study, candidates, threads, batch, schedule))
            result = ModelResult(
                model=study.spec.name,
                weights=study.spec.source,
                images=len(study.pixels),
                reference_top1=_top1(study, study.reference),
                rows=rows,
                combinations=measured,
            )
            yield Peers(
                machine=machine,
                versions=versions(),
                min_seconds=schedule.min_seconds,
                min_runs=schedule.min_runs,
                sittings=schedule.sittings,
                calibration_images=study.settings.calibration_images,
                models=[*done, result],
            )
        done.append(result)


def measure(study: Study, candidates: Sequence[Candidate], threads: int, batch: int, schedule: Schedule) -> Combination:
    """The candidates take turns on the same images; the machine's peak is measured before and after."""
    before, clock = _measure_peaks(study, threads, batch), PausableClock()
    images = normalize(np.resize(study.pixels, (batch, *study.pixels.shape[1:])), study.how)

    @contextmanager
    def load(order: Sequence[int]) -> Iterator[list[Call]]:
        with ExitStack() as stack:
            opened = {index: stack.enter_context(candidates[index].load(threads, images)) for index in order}
            calls = [opened[index] for index in range(len(candidates))]
            runtimes = [candidate.plan.runtime for candidate in candidates]
            yield [
                clock.then_pause(call, SETTLE_SECONDS) if runtime != "onnxruntime" else call
                for call, runtime in zip(calls, runtimes, strict=True)
            ]

    times = time_sittings(load, len(candidates), schedule, clock)
    pairs = zip(before, _measure_peaks(study, threads, batch), strict=True)
    peaks = [max(pair, key=lambda peak: peak.multiply_adds_per_s) for pair in pairs]
    latencies = [summarize(runs_of(times, index), batch) for index in range(len(candidates))]
    rivals = _Rivals([candidate.plan for candidate in candidates], latencies, times)
    rates = {peak.arithmetic: peak.multiply_adds_per_s for peak in peaks}
    timed = [
        _timed(candidate, latency, 1e3 / rates[candidate.plan.arithmetic], rivals)
        for candidate, latency in zip(candidates, latencies, strict=True)
    ]
    return Combination(threads=threads, batch=batch, peaks=peaks, stock=rivals.stock, timed=timed)


class PausableClock:
    """Nanoseconds, monotonic, that stand still during pauses."""

    def __init__(self) -> None:
        self._paused_ns = 0

    def __call__(self) -> int:
        return time.perf_counter_ns() - self._paused_ns

    def then_pause(self, call: Call, seconds: float) -> Call:
        """The call and then a pause, which the clock does not count."""

        def both() -> object:
            result, start = call(), time.perf_counter_ns()
            time.sleep(seconds)
            self._paused_ns += time.perf_counter_ns() - start
            return result

        return both


def _timed(candidate: Candidate, latency: Latency, ms_per_multiply_add: float, rivals: _Rivals) -> Timed:
    plan = candidate.plan
    ours = plan.family == "ours"
    floor_ms = latency.batch * _multiply_adds(candidate.engine.graph) * ms_per_multiply_add
    return Timed(
        name=plan.name,
        latency=latency,
        floor_ms=floor_ms,
        times_floor=latency.p50_ms / floor_ms,
        stock=rivals.against(plan, lambda other: other.is_stock),
        like=rivals.against(plan, lambda other: _are_alike(other, plan)) if ours else None,
        best=rivals.against(plan, lambda other: other.family == "peer") if ours else None,
        unfrozen=rivals.against(plan, lambda other: other.name == plan.unfrozen),
    )


class _Rivals:
    """Who is the fastest of some, and how much faster than that another one is."""

    def __init__(self, plans: Sequence[Plan], latencies: Sequence[Latency], times: Sittings) -> None:
        self._plans, self._latencies, self._times = plans, latencies, times

    @property
    def stock(self) -> str:
        """The baseline's name."""
        fastest = self._fastest(lambda plan: plan.is_stock)
        assert fastest is not None, "the studies can't be made without a stock export"
        return self._plans[fastest].name

    def against(self, plan: Plan, is_rival: Callable[[Plan], bool]) -> Against | None:
        """None where there is no rival, or the plan is the fastest itself."""
        rival, own = self._fastest(is_rival), self._plans.index(plan)
        if rival is None or rival == own:
            return None
        return Against(name=self._plans[rival].name, speed_up=speed_up(self._times, rival, own))

    def _fastest(self, is_rival: Callable[[Plan], bool]) -> int | None:
        rivals = [index for index, plan in enumerate(self._plans) if is_rival(plan)]
        return min(rivals, key=lambda index: self._latencies[index].p50_ms, default=None)


def _are_alike(other: Plan, plan: Plan) -> bool:
    return other.family == "peer" and (other.runtime, other.arithmetic) == (plan.runtime, plan.arithmetic)


def _row(item: Candidate | Skipped, study: Study) -> Row:
    plan = item.plan
    if isinstance(item, Skipped):
        return Row(
            name=plan.name,
            family=plan.family,
            runtime=plan.runtime,
            arithmetic=plan.arithmetic,
            skipped=item.reason,
        )
    return Row(
        name=plan.name,
        family=plan.family,
        runtime=plan.runtime,
        arithmetic=plan.arithmetic,
        note=item.engine.note,
        top1=_top1(study, item.logits),
        agreement=100 * float(same_top1(study.reference, item.logits).mean()),
        kl=mean_kl(study.reference, item.logits),
        max_abs=float(np.abs(item.logits - study.reference).max()),
        model_bytes=item.model_bytes,
        multiply_adds=_multiply_adds(item.engine.graph),
    )


def _top1(study: Study, logits: NDArray[np.float32]) -> float | None:
    return None if study.labels is None else 100 * float(top_k_hits(logits, study.labels, 1).mean())


@lru_cache
def _multiply_adds(graph: Path) -> int:
    return count_multiply_adds(onnx.load(graph))


def _measure_peaks(study: Study, threads: int, batch: int) -> list[Peak]:
    sizes = list(products(onnx.load(stock(study))))
    return [
        measure_peak(sizes, arithmetic, threads=threads, batch=batch, seconds=PEAK_SECONDS)
        for arithmetic in get_args(Arithmetic)
    ]
