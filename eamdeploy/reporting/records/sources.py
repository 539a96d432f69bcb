"""The records that a report is made of, read from the files that the stages wrote."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from eamdeploy.artifacts.documents import DocumentKind, read_document
from eamdeploy.artifacts.files import digest_file, is_file
from eamdeploy.artifacts.records import Record
from eamdeploy.artifacts.run_state import RunState
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.analysis import Analysis
from eamdeploy.eam.records import CheckpointHeader
from eamdeploy.engines.manifest import Manifest
from eamdeploy.errors import ConfigError
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.records.profile import EngineProfile, Profile
from eamdeploy.remote.profile import RemoteProfiles
from eamdeploy.reporting.records.checks import check_record

RecordT = TypeVar("RecordT", bound=Record)
RecordT_co = TypeVar("RecordT_co", bound=Record, covariant=True)

_CHECKPOINT, _DOCUMENT = ".safetensors", ".json"


@dataclass(frozen=True)
class Sourced(Generic[RecordT_co]):
    """A record, the file that it stands in as text, and what that file is in words."""

    file: str
    kind: str
    record: RecordT_co


@dataclass(frozen=True)
class CheckpointFile(Sourced[CheckpointHeader]):
    """The header of a checkpoint.

    Attributes:
        digest: SHA-256 of the file.
        shares: by module path, for each of its frozen heads, which share of the entries is frozen.
    """

    digest: str
    shares: dict[str, list[float]]


@dataclass(frozen=True)
class ProfileSource(Sourced[Profile]):
    """A profile, of a file of its own or one of those of several machines.

    Attributes:
        target: the machine's address, `ssh://…`; None for a file of its own.
    """

    target: str | None

    @property
    def label(self) -> str:
        """The file, and which of its profiles."""
        return self.file if self.target is None else f"{self.file}, {self.target}"

    @property
    def hardware(self) -> str:
        """What the engines ran on: the processor, the board, or the GPU beside its processor."""
        device, cpu = self.record.device_before, self.record.machine.cpu
        return {"cpu": cpu, "jetson": device.name, "cuda": f"{device.name}, {cpu}"}[device.kind]

    @property
    def short_name(self) -> str:
        """The machine's address, and for want of that its hardware."""
        return self.hardware if self.target is None else self.target

    @property
    def engines(self) -> list[EngineProfile]:
        """All that were measured, the baseline first."""
        baseline = self.record.baseline
        return [*([] if baseline is None else [baseline]), *self.record.engines]


@dataclass(frozen=True)
class Sources:
    """Everything that was read, in the order in which the files were given.

    Attributes:
        altered: files that are no longer what their `run.json` says was written.
    """

    items: tuple[Sourced[Record], ...]
    altered: tuple[str, ...]

    def of(self, kind: type[RecordT]) -> list[Sourced[RecordT]]:
        """The records of that type."""
        return [Sourced(item.file, item.kind, item.record) for item in self.items if isinstance(item.record, kind)]

    @property
    def profiles(self) -> list[ProfileSource]:
        """All profiles, also those of several machines in one file."""
        found = []
        for item in self.items:
            if isinstance(item.record, Profile):
                found.append(ProfileSource(item.file, item.kind, item.record, None))
            elif isinstance(item.record, RemoteProfiles):
                found += [
                    ProfileSource(item.file, item.kind, each, target) for target, each in item.record.profiles.items()
                ]
        return found

    @property
    def checkpoints(self) -> list[CheckpointFile]:
        return [item for item in self.items if isinstance(item, CheckpointFile)]


def read_sources(files: Sequence[Path], *, verify: bool = True) -> Sources:
    """What the files hold; a `run.json` stands for itself and for the files of its stages. A file counts once.

    Args:
        verify: checkpoints must be as they were written; False for one that was changed on purpose.

    Raises:
        ConfigError: there is no file, or one can't be read or is nothing that a report can show.
        CheckpointError: a file is damaged; the message names it.
        MissingDependency: a checkpoint is given and safetensors is not installed.
    """
    if not files:
        raise ConfigError("there is nothing to report", expected="at least 1 file")
    paths: dict[Path, Path] = {}
    altered: list[str] = []
    for path in files:
        paths.setdefault(path.resolve(), path)
        for output, is_altered in _outputs(path):
            paths.setdefault(output.resolve(), output)
            altered += [_text(output)] if is_altered else []
    return Sources(tuple(_read(path, verify=verify) for path in paths.values()), tuple(dict.fromkeys(altered)))


def _outputs(path: Path) -> Iterator[tuple[Path, bool]]:
    """If `path` is a `run.json`, the files of its stages that a report can show, and whether they were altered."""
    if path.suffix.lower() != _DOCUMENT or read_document(path)[0] != "run":
        return
    written = {name: digest for stage in RunState.read(path).stages.values() for name, digest in stage.outputs.items()}
    for name, digest in written.items():
        output = path.parent / name
        if output.suffix not in (_CHECKPOINT, _DOCUMENT):
            continue
        if not is_file(output):
            raise ConfigError(
                f"{path} names {output}, which is not there",
                hint="Run `eamdeploy run` again, or name the files one by one instead of run.json.",
            )
        yield output, digest_file(output) != digest


def _read(path: Path, *, verify: bool) -> Sourced[Record]:
    suffix = path.suffix.lower()
    if suffix == _CHECKPOINT:
        loaded = checkpoints.load(path, verify=verify)
        return CheckpointFile(_text(path), "EAM checkpoint", loaded.header, digest_file(path), loaded.shares)
    kind = read_document(path)[0] if suffix == _DOCUMENT else None
    record_type = None if kind is None else _record_types().get(kind)
    if kind is None or record_type is None:
        other = f"JSON of another kind{'' if kind is None else f': {kind}'}"
        raise ConfigError(
            f"{path} is nothing that a report can show",
            expected="an EAM checkpoint, or JSON by analyze, export, build-ort, build-trt, evaluate, profile or run",
            got=other if suffix == _DOCUMENT else f"a file that ends in {suffix or 'nothing'}",
        )
    record = record_type.read(path)
    check_record(record, path)
    return Sourced(_text(path), kind, record)


def _record_types() -> dict[DocumentKind, type[Record]]:
    from eamdeploy.records.export import Export

    return {
        "analysis": Analysis,
        "engine manifest": Manifest,
        "evaluation": EvaluationReport,
        "export": Export,
        "profile": Profile,
        "profiles of machines": RemoteProfiles,
        "run": RunState,
    }


def _text(path: Path) -> str:
    """The path as text that any encoding takes; names on disk are bytes."""
    return os.fsencode(path).decode(errors="replace")
