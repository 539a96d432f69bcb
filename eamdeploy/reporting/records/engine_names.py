"""Short names of engines, the same everywhere in a report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePath

from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.reporting.records.sources import Sources


def engine_names(sources: Sources) -> dict[str, str]:
    """The short name of every engine and reference that profiles and evaluations speak of, by its path there."""
    paths = [engine.engine for profile in sources.profiles for engine in profile.engines]
    for item in sources.of(EvaluationReport):
        paths += [item.record.model, *([item.record.reference] if item.record.reference else [])]
    return short_names(paths)


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """For each path its file name, behind as many of its folders as it takes to tell it from the others."""
    parts = {path: PurePath(path).parts for path in paths}

    def shortest(path: str) -> str:
        for length in range(1, len(parts[path])):
            tail = parts[path][-length:]
            if not any(other != path and its[-length:] == tail for other, its in parts.items()):
                return "/".join(tail)
        return path

    return {path: shortest(path) for path in parts}
