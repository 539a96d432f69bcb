"""Processes that judge hurt inputs: one that crashes or hangs is a finding, and another takes its place."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

from hostile.jobs import Job, Verdict

LIMIT_S = 10.0
FIRST_S = 60.0  # what the first file of a kind may take besides, as the good one is read before it
_START_S = 300.0  # to import torch on a busy machine
_ADDRESS_SPACE = 6 << 30  # more than a finding of too much memory takes, less than the machine has


class AnyJudge(Protocol):
    """What a worker asks."""

    def judge(self, job: Job) -> Verdict: ...


MakeJudge = Callable[[Path, Path], AnyJudge]


def real_judge(good: Path, scratch: Path) -> AnyJudge:
    """A `Judge`, imported in the worker alone, as it imports all that reads files."""
    from hostile.judging import Judge

    return Judge(good, scratch)


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    job: Job | None
    deadline: float
    known: set[str]


def judge_all(
    jobs: Iterable[Job],
    good: Path,
    scratch: Path,
    *,
    workers: int,
    limit_s: float = LIMIT_S,
    first_s: float = FIRST_S,
    make_judge: MakeJudge = real_judge,
) -> Iterator[tuple[Job, Verdict]]:
    """What came of every job, as it comes. A job that takes too long is tried once more before it is a finding.

    Args:
        good, scratch: folders of good files and for hurt ones.
        limit_s: what a job may take; `first_s` is added for the first of its kind in a worker.
        make_judge: makes what judges in a worker.
    """
    pool = [_start(good, scratch / str(number), make_judge) for number in range(workers)]
    waiting, late = iter(jobs), set[Job]()
    again: list[Job] = []
    try:
        for worker in pool:
            _give(worker, again, waiting, limit_s, first_s)
        while busy := [worker for worker in pool if worker.job is not None]:
            patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            ready = wait([worker.connection for worker in busy], timeout=patience)
            for number, worker in enumerate(pool):
                if worker.job is None:
                    continue
                job, verdict = worker.job, None
                if worker.connection in ready:
                    verdict = _received(worker)
                elif time.monotonic() < worker.deadline:
                    continue
                elif job not in late:
                    late.add(job)
                    again.append(job)
                else:
                    verdict = Verdict("", "", "hang", f"more than {limit_s:g} s, twice")
                if verdict is not None:
                    yield job, verdict
                if verdict is None or verdict.finding in ("hang", "crash"):
                    _end(worker)
                    pool[number] = worker = _start(good, scratch / str(number), make_judge)
                _give(worker, again, waiting, limit_s, first_s)
    finally:
        for worker in pool:
            _end(worker)


def _start(good: Path, scratch: Path, make_judge: MakeJudge) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, good, scratch, make_judge), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, None, 0.0, set())


def _give(worker: _Worker, again: list[Job], waiting: Iterator[Job], limit_s: float, first_s: float) -> None:
    """The next job, if there is one.

    Raises:
        RuntimeError: the worker did not start.
    """
    worker.job = again.pop() if again else next(waiting, None)
    if worker.job is None:
        return
    if not worker.known and not (worker.connection.poll(_START_S) and worker.connection.recv() == "ready"):
        raise RuntimeError(f"a worker did not start within {_START_S:g} s")
    first = worker.job.source not in worker.known
    worker.known.add(worker.job.source)
    worker.deadline = time.monotonic() + limit_s + (first_s if first else 0)
    worker.connection.send(worker.job)


def _received(worker: _Worker) -> Verdict:
    try:
        verdict = worker.connection.recv()
    except EOFError:
        worker.process.join()
        return Verdict("", "", "crash", f"exit code {worker.process.exitcode}")
    assert isinstance(verdict, Verdict)
    return verdict


def _end(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.kill()
    worker.process.join()


def _serve(connection: Connection, good: Path, scratch: Path, make_judge: MakeJudge) -> None:
    """Judges jobs until there are no more; what libraries print goes to a file beside the scratch folder."""
    scratch.mkdir(parents=True, exist_ok=True)
    log = os.open(f"{scratch}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    judge = make_judge(good, scratch)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _ADDRESS_SPACE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(judge.judge(job))
