"""Latency and memory of engines on this machine, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from eamdeploy.artifact import ModelCard, Record, digest_file
from eamdeploy.engines.base import Runner, read_manifest
from eamdeploy.engines.registry import backend_of, open_runner
from eamdeploy.errors import ConfigError
from eamdeploy.parity import ParityReport
from eamdeploy.profiling.inputs import random_images
from eamdeploy.profiling.machine import Machine, describe_machine
from eamdeploy.profiling.memory import Memory, measure_memory
from eamdeploy.profiling.timing import Clock, Latency, Schedule, SpeedUp, speed_up, summarize, time_rounds


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
        digest: SHA-256 of the file that was measured.
        model: None for a foreign model.
        settings: what the backend ran it with, beyond its defaults.
        parity: the gate at build time; None means not checked.
        speed_up: against the baseline, from runs that took turns; None for the baseline itself or without one.
    """

    engine: str
    backend: str
    digest: str
    model: ModelSummary | None
    settings: dict[str, str]
    parity: ParityReport | None
    latency: Latency
    memory: Memory | None
    speed_up: SpeedUp | None


class Profile(Record):
    """Figures of engines that took turns on one machine.

    Attributes:
        threads: threads of each inference.
        baseline: what the speed-ups are against.
    """

    machine: Machine
    threads: int
    batch: int
    warmup_ms: float
    min_seconds: float
    min_runs: int
    baseline: EngineProfile | None
    engines: list[EngineProfile]


def profile(
    engines: Sequence[Path],
    baseline: Path | None = None,
    *,
    threads: int,
    batch: int = 1,
    warmup_ms: float = 200.0,
    min_seconds: float = 3.0,
    min_runs: int = 50,
    with_memory: bool = True,
    clock: Clock = time.perf_counter_ns,
) -> Profile:
    """Latency and memory of every engine, all measured with the same input and number of threads.

    With more than one engine, the baseline among them, they are loaded together and take turns in the order given,
    the baseline first. Memory is measured before, in a process for each engine.

    Raises:
        ConfigError: no engine is given, one can't be read, or it does not take batches of this size.
        EngineError: an engine fails.
        MissingDependency: its backend is not installed here.
    """
    if not engines:
        raise ConfigError("there is nothing to profile", expected="at least 1 engine")
    schedule = Schedule(warmup_ms, min_seconds, min_runs)
    paths = [*([baseline] if baseline is not None else []), *engines]
    with ExitStack() as stack:
        runners = [stack.enter_context(open_runner(path, threads)) for path in paths]
        calls = [_call(runner, batch) for runner in runners]  # a wrong batch size fails here, before minutes of work
        memories = [measure_memory(path, threads=threads, batch=batch) if with_memory else None for path in paths]
        times = time_rounds(calls, schedule, clock)
    profiles = []
    for index, (path, runner, memory) in enumerate(zip(paths, runners, memories, strict=True)):
        is_candidate = baseline is not None and index > 0
        manifest = read_manifest(path)
        profiles.append(
            EngineProfile(
                engine=str(path),
                backend=backend_of(path),
                digest=digest_file(path),
                model=None if runner.card is None else summarize_card(runner.card),
                settings=dict(runner.settings),
                parity=manifest.parity if manifest else None,
                latency=summarize(times[:, index], batch),
                memory=memory,
                speed_up=speed_up(times[:, 0], times[:, index]) if is_candidate else None,
            )
        )
    return Profile(
        machine=describe_machine(),
        threads=threads,
        batch=batch,
        warmup_ms=warmup_ms,
        min_seconds=min_seconds,
        min_runs=min_runs,
        baseline=profiles[0] if baseline is not None else None,
        engines=profiles[1:] if baseline is not None else profiles,
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


def _call(runner: Runner, batch: int) -> Callable[[], object]:
    return partial(runner.infer, random_images(runner, batch))
