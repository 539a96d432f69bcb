"""The stage that brings a frozen model closer to its unfrozen self, with images that need no labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from eamdeploy.artifacts.card import Recovery
from eamdeploy.artifacts.files import digest_bytes, digest_file, require_output
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.checkpoint import Checkpoint
from eamdeploy.eam.records import CheckpointHeader
from eamdeploy.eam.recovery import DEFAULT_RECOVERY, RecoverOptions, check_recovery
from eamdeploy.errors import ConfigError
from eamdeploy.host.reference import load_reference
from eamdeploy.images.folder import ImageFolder, folder_digest
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT, Observer
from eamdeploy.recovery.distilling import distill
from eamdeploy.recovery.processes import Processes, joined_processes
from eamdeploy.recovery.shares import SharedImages, Shares
from eamdeploy.recovery.solving import Solved, solve
from eamdeploy.recovery.spool import Spool
from eamdeploy.recovery.training_images import TrainingImages
from eamdeploy.recovery.training_state import TrainingState
from eamdeploy.vocabulary import RecoveryMethod


def recover(
    checkpoint: Path,
    images: ImageSource,
    output: Path,
    options: RecoverOptions = DEFAULT_RECOVERY,
    *,
    verify: bool = True,
    observer: Observer = SILENT,
) -> CheckpointHeader:
    """`output` is the frozen model of `checkpoint` with numbers that bring it closer to the unfrozen model.

    The images need no labels: the unfrozen model, the weights of `checkpoint` with all attention live, is the teacher.
    On the images that are held back, the KL divergence from the teacher is no larger than before after `solve`. What
    `distill` adds is kept where agreement is higher, or the KL divergence lower and agreement within a standard error.

    Under torchrun all processes distil together, and the first one writes `output`.

    Args:
        verify: the checkpoint must be as it was written; False for one that was changed on purpose.

    Raises:
        ConfigError, CheckpointError: checkpoint, images or options can't be used, or `output` can't be written; what
            was there stays.
    """
    require_output(output, checkpoint)
    check_recovery(options)
    loaded = checkpoints.load(checkpoint, verify=verify)
    _require_recoverable(loaded.header, checkpoint)
    with joined_processes("cpu" if options.method == "solve" else options.device) as processes:
        told = observer if processes.is_first else SILENT
        folder = images.open(told)
        task = _Task(checkpoint, loaded, folder, images, output, options, processes, told)
        found = _METHODS[options.method](task)
        header = processes.from_first(lambda: checkpoints.save(found, output))
        if processes.is_first and options.method == "distill":
            task.state_file.unlink(missing_ok=True)
        return header


@dataclass(frozen=True, eq=False)
class _Task:
    """What is to recover, from which images, and how."""

    path: Path
    checkpoint: Checkpoint
    folder: ImageFolder
    images: ImageSource
    output: Path
    options: RecoverOptions
    processes: Processes
    observer: Observer

    @cached_property
    def images_digest(self) -> str:
        return folder_digest(self.folder)

    @cached_property
    def state_file(self) -> Path:
        """Where training keeps its state: another file for another task, so that none is taken for one of its own."""
        asked = {key: value for key, value in asdict(self.options).items() if key != "device"}
        told = [digest_file(self.path), self.images_digest, sorted(asked.items())]
        name = digest_bytes(repr(told).encode()).removeprefix("sha256:")[:12]
        return self.output.with_name(f".{self.output.name}.{name}.training")

    def shared_images(self) -> SharedImages:
        how = self.checkpoint.header.preprocessing
        return SharedImages(self.images, self.folder, self.options, how, self.observer)


def _solve(task: _Task) -> Checkpoint:
    """The checkpoint with linear layers that were solved anew."""
    if task.processes.count > 1:
        raise ConfigError(
            "solve is the work of one process", expected="no torchrun", got=f"{task.processes.count} processes"
        )
    images = task.shared_images()
    found = _solved(task, images)
    record = _record(task, images.shares, layers=found.layers, before=found.before, after=found.after)
    return replace(task.checkpoint, weights={**task.checkpoint.weights, **found.weights}, header=record)


def _solved(task: _Task, images: SharedImages) -> Solved:
    loaded = task.checkpoint
    teacher = load_reference(loaded, frozen=False, where=str(task.path))
    student = load_reference(loaded, frozen=True, where=str(task.path))
    return solve(
        teacher.model,
        student.model,
        teacher.sites,
        loaded.header.freezing.heads.keys(),
        loaded.weights,
        images.batches(),
        task.output.parent,
        lambda done, total: task.observer.progress("layers solved", done, total),
    )


def _distill(task: _Task) -> Checkpoint:
    """The checkpoint with layers that were solved anew, and then weights, maps and factors that were trained."""
    loaded, processes, state_file = task.checkpoint, task.processes, task.state_file
    state = processes.from_first(lambda: TrainingState.load(state_file) or _begun(task))
    with Spool(task.output.parent) as held_back:
        shares = processes.from_first(lambda: task.shared_images().keep_held_back(held_back))
        how = loaded.header.preprocessing
        learning = TrainingImages(shares.learning, how, task.images.exif_transpose, task.options.seed)
        try:
            found = distill(
                loaded,
                state,
                learning,
                held_back,
                task.options,
                processes,
                state_file,
                str(task.path),
                task.observer,
            )
        except KeyboardInterrupt:
            task.observer.note(f"the same command goes on from the last epoch, which is in {state_file}")
            raise
    record = _record(
        task, shares, layers=dict(state.layers), training=found.training, before=state.before, after=found.after
    )
    return replace(found.checkpoint, header=record)


def _begun(task: _Task) -> TrainingState:
    """Training that has yet to begin."""
    state = TrainingState.begun(_solved(task, task.shared_images()))
    state.save(task.state_file)
    return state


_METHODS: Mapping[RecoveryMethod, Callable[[_Task], Checkpoint]] = MappingProxyType(
    {"solve": _solve, "distill": _distill}
)


def _record(task: _Task, shares: Shares, **found: Any) -> CheckpointHeader:
    """The header with what recovery did and found."""
    header = task.checkpoint.header
    recovery = Recovery(
        method=task.options.method,
        teacher=header.content_digest,
        n_images=len(shares.learning) + len(shares.held_back),
        n_held_back=len(shares.held_back),
        digest=task.images_digest,
        source=task.folder.root.name,
        exif_transpose=task.images.exif_transpose,
        seed=task.options.seed,
        **found,
    )
    return header.model_copy(update={"recovery": recovery})


def _require_recoverable(header: CheckpointHeader, path: Path) -> None:
    if not header.freezing.heads:
        raise ConfigError(
            f"{path} has nothing to recover from", expected="frozen heads, rows or entries", got="none frozen"
        )
    if header.recovery is not None:
        raise ConfigError(
            f"{path} has recovered already, and no longer holds the weights of its teacher",
            hint="Give the checkpoint that it was made of.",
        )
