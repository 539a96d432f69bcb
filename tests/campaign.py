"""Hurts files of every kind on purpose and reads them: right or refused, in one line, and nothing overwritten.

    make campaign                                   10,000 inputs, about 10 minutes on two cores
    make campaign CAMPAIGN="--seed 2"               as many others
    make campaign CAMPAIGN="--only engine --index 7 --seed 2"      one input again

Every input is read in a process of its own that may use 10 s and 1 GiB more than the good file takes. A finding is
whatever is neither a right result nor an error of ours: a traceback, a crash, a hang, much memory, a sealed file that
is read as something else, a changed input or a changed older output. Inputs of findings are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # a hurt configuration may ask for pretrained weights

from hostile.good_files import make_good_files
from hostile.jobs import Job, Verdict
from hostile.judging import Judge
from hostile.sources import SOURCES
from hostile.tally import Finding, Tally
from hostile.workers import judge_all

_KEPT = 3  # inputs of the same finding


def plan(count: int, seed: int, only: str | None = None) -> list[Job]:
    """About that many jobs, shared among the kinds of files by the table, in an order of their own."""
    chosen = {name: source for name, source in SOURCES.items() if only in (None, name)}
    shares = sum(source.share for source in chosen.values())
    jobs = [
        Job(name, index, seed)
        for name, source in chosen.items()
        for index in range(max(1, round(count * source.share / shares)))
    ]
    Random(seed).shuffle(jobs)
    return jobs


def main() -> int:
    """Print the table; 1 where something was found."""
    arguments = _parse()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    make_good_files(folder / "good")
    jobs = plan(arguments.count, arguments.seed, arguments.only)
    if arguments.index is not None:
        jobs = [Job(jobs[0].source, arguments.index, arguments.seed)]
    judge, tally, started = Judge(folder / "good", folder / "again"), Tally(), time.monotonic()
    for done, (job, verdict) in enumerate(
        judge_all(jobs, folder / "good", folder / "scratch", workers=arguments.workers), start=1
    ):
        tally.add(job, verdict)
        if verdict.finding is not None:
            tally.findings.append(_keep(judge, job, verdict, tally, folder))
            print(f"FINDING: {job.source} {job.index}: {verdict.finding}", file=sys.stderr)
        if done % 500 == 0:
            print(f"{done} of {len(jobs)}, {time.monotonic() - started:.0f} s", file=sys.stderr)
    print(tally.in_markdown())
    print(f"\n{len(jobs)} inputs, seed {arguments.seed}, {time.monotonic() - started:.0f} s.")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(tally.in_json(), indent=2))
    return 1 if tally.findings else 0


def _keep(judge: Judge, job: Job, verdict: Verdict, tally: Tally, folder: Path) -> Finding:
    """The finding, its input and its details written for a few of each."""
    _, data = judge.hurt(job)
    like = sum((each.source, each.what) == (job.source, verdict.finding) for each in tally.findings)
    place = folder / "findings" / f"{len(tally.findings):03}"
    if like < _KEPT:
        place.mkdir(parents=True)
        (place / Path(SOURCES[job.source].file).name).write_bytes(data)
        (place / "finding.txt").write_text(
            f"{job}\n{verdict.mutation!r}\n{verdict.finding}\n{verdict.details}\n", errors="backslashreplace"
        )
    return Finding(
        source=job.source,
        index=job.index,
        seed=job.seed,
        mutation=verdict.mutation or judge.hurt(job)[0],
        what=str(verdict.finding),
        details=verdict.details,
        input=str(place) if like < _KEPT else "",
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other inputs")
    parser.add_argument("--only", choices=SOURCES, help="hurt this kind of file alone")
    parser.add_argument("--index", type=int, help="with --only: this input alone")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    parser.add_argument("--folder", type=Path, default=Path("build/campaign"), help="for files; emptied first")
    parser.add_argument("-o", "--output", type=Path, help="also write the counts and findings as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
