"""Kills commands with `kill -9` at random moments, most of them while they write: old or new files, nothing else.

    make campaign-kill                                     200 kills, about 40 minutes on two cores
    make campaign-kill KILL="--count 20 --only export"     a few of one command

Every trial starts where an earlier run with other options left its outputs. After the kill every file must be the
earlier run's or the new one's, whole; files that belong together but are of two runs must be noticed by whoever reads
them. Then the command runs once more, and must end with the results of an undisturbed run and no leftovers.
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

from hostile.kill_targets import make_targets
from hostile.killing import Killed, kill_once, measure

SHARES = {"run": 50, "freeze": 30, "recover": 30, "export": 30, "build-ort": 30, "report": 30}


def main() -> int:
    """Print the table; 1 where something was found."""
    arguments = _parse()
    folder = arguments.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    targets = make_targets(folder / "good")
    told, began = [], time.monotonic()
    for name in [arguments.only] if arguments.only else SHARES:
        target, start = targets[name]
        known = measure(target, start, folder / "scratch")
        killed = Killed(name)
        told.append(killed)
        count = arguments.count if arguments.only else max(1, round(arguments.count * SHARES[name] / 200))
        for index in range(count):
            rng = Random(f"{arguments.seed}/{name}/{index}")
            kill_once(target, known, start, folder / "scratch", rng, killed)
        print(f"{name}: {count} kills, {time.monotonic() - began:.0f} s so far", file=sys.stderr)
    _show(told)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([vars(killed) for killed in told], indent=2))
    return 1 if any(killed.findings for killed in told) else 0


def _show(told: list[Killed]) -> None:
    states = sorted({state for killed in told for state in killed.states})
    head = ["command", "kills", *states, "temporary files left", "findings"]
    print("| " + " | ".join(head) + " |\n" + "| --- " * len(head) + "|")
    for killed in told:
        counts = [str(killed.states.get(state, "")) for state in states]
        row = [killed.name, str(sum(killed.states.values())), *counts]
        print("| " + " | ".join([*row, str(killed.leftovers), str(len(killed.findings))]) + " |")
    for killed in told:
        for finding in killed.findings:
            print(f"FINDING: {killed.name}: {finding}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="kills in all")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other moments")
    parser.add_argument("--only", choices=SHARES, help="kill this command alone")
    parser.add_argument("--folder", type=Path, default=Path("build/campaign-kill"), help="for files; emptied first")
    parser.add_argument("-o", "--output", type=Path, help="also write the counts and findings as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
