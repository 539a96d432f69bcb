"""What must hold in a record beyond its types, so that a damaged file is an error and no strange picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from eamdeploy.artifacts.card import Freezing
from eamdeploy.artifacts.records import Record
from eamdeploy.eam.analysis import Analysis
from eamdeploy.engines.manifest import Manifest
from eamdeploy.errors import CheckpointError
from eamdeploy.records.profile import Profile
from eamdeploy.remote.profile import RemoteProfiles


def check_record(record: Record, path: Path) -> None:
    """The record, read from `path`, holds together.

    Raises:
        CheckpointError: a number is not finite, there is nothing in it, or heads, scores and shares contradict each
            other; names file and key.
    """
    for key, number in _numbers(record.model_dump()):
        if not math.isfinite(number):
            raise CheckpointError(f"{path}: {key}", expected="a finite number", got=number)
    if isinstance(record, Profile):
        _check_profile(record, f"{path}: engines")
    if isinstance(record, RemoteProfiles):
        if not record.profiles and not record.failures:
            raise CheckpointError(f"{path}: profiles", expected="at least 1 machine", got="none")
        for target, profile in record.profiles.items():
            _check_profile(profile, f"{path}: profiles.{target}.engines")
    if isinstance(record, Analysis):
        _check_analysis(record, str(path))
    if isinstance(record, Manifest) and record.card is not None and record.card.freezing is not None:
        _check_freezing(record.card.freezing, str(path))


def _check_profile(profile: Profile, where: str) -> None:
    if not profile.engines:
        raise CheckpointError(where, expected="at least 1 engine", got="none")


def _numbers(value: object, key: str = "") -> Iterator[tuple[str, float]]:
    """Every fraction in a record, with its key."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{key}.{index}")


def _check_analysis(analysis: Analysis, where: str) -> None:
    heads = {path: shape.heads for path, shape in analysis.attention.items()}
    if not heads:
        raise CheckpointError(f"{where}: attention", expected="at least 1 module", got="none")
    if analysis.score not in analysis.scores:
        raise CheckpointError(f"{where}: scores", expected=f"those of {analysis.score}", got=", ".join(analysis.scores))
    for name, scores in analysis.scores.items():
        counts = {path: len(values) for path, values in scores.items()}
        if counts != heads:
            raise CheckpointError(
                f"{where}: scores.{name} have other heads than the attention", expected=heads, got=counts
            )
    _check_heads(analysis.frozen, heads, f"{where}: frozen")
    for path, frozen in analysis.frozen.items():
        shares = analysis.shares.get(path, [])
        if len(shares) != len(frozen) or not all(0 < share <= 1 for share in shares):
            raise CheckpointError(f"{where}: shares of {path}", expected=f"{len(frozen)} in (0, 1]", got=shares)


def _check_freezing(freezing: Freezing, where: str) -> None:
    """Where scores are recorded, each frozen head has one; heads of somebody's own training have none."""
    if freezing.scores:
        counts = {path: len(values) for path, values in freezing.scores.items()}
        if not all(counts.values()):
            raise CheckpointError(f"{where}: card.freezing.scores", expected="a score for every head", got=counts)
        _check_heads(freezing.heads, counts, f"{where}: card.freezing.heads")


def _check_heads(frozen: Mapping[str, Sequence[int]], counts: Mapping[str, int], where: str) -> None:
    for path, heads in frozen.items():
        count = counts.get(path, 0)
        if not all(0 <= head < count for head in heads):
            raise CheckpointError(f"{where}.{path}", expected=f"heads below {count}", got=heads)
