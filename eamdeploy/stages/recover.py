"""The stage that brings a frozen model closer to its unfrozen self, without labels and without training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from eamdeploy.artifacts.card import Preprocessing, Recovery
from eamdeploy.artifacts.files import require_output
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.records import CheckpointHeader
from eamdeploy.eam.recovery import DEFAULT_RECOVERY, RecoverOptions, check_recovery, held_back_images
from eamdeploy.errors import ConfigError
from eamdeploy.host.calibrate import as_tensors
from eamdeploy.host.recovering import SharedBatch, solve
from eamdeploy.host.reference import load_reference
from eamdeploy.images.folder import ImageFolder, folder_digest
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT, Observer

_BATCH = 16


def recover(
    checkpoint: Path,
    images: ImageSource,
    output: Path,
    options: RecoverOptions = DEFAULT_RECOVERY,
    *,
    verify: bool = True,
    observer: Observer = SILENT,
) -> CheckpointHeader:
    """`output` is the frozen model of `checkpoint` with weights that bring it closer to the unfrozen model.

    The images need no labels: the unfrozen model, the weights of `checkpoint` with all attention live, is the teacher.
    On the images that are held back the KL divergence from the teacher is no larger than before.

    Args:
        verify: the checkpoint must be as it was written; False for one that was changed on purpose.

    Raises:
        ConfigError, CheckpointError: checkpoint, images or options can't be used, or `output` can't be written; what
            was there stays.
    """
    require_output(output, checkpoint)
    check_recovery(options)
    loaded = checkpoints.load(checkpoint, verify=verify)
    header = loaded.header
    _require_recoverable(header, checkpoint)
    teacher = load_reference(loaded, frozen=False, where=str(checkpoint))
    student = load_reference(loaded, frozen=True, where=str(checkpoint))
    folder = images.open(observer)
    shares = _Shares(held_back_images(len(folder.files), options), folder)
    done = solve(
        teacher.model,
        student.model,
        teacher.sites,
        header.freezing.heads.keys(),
        loaded.weights,
        shares.batches(images, header.preprocessing, observer),
        output.parent,
        lambda done, total: observer.progress("recovery", done, total),
    )
    recovery = Recovery(
        method=options.method,
        teacher=header.content_digest,
        n_images=shares.n_images,
        n_held_back=shares.n_held_back,
        digest=folder_digest(folder),
        source=folder.root.name,
        exif_transpose=images.exif_transpose,
        seed=options.seed,
        layers=done.layers,
        before=done.before,
        after=done.after,
    )
    weights = {**loaded.weights, **done.weights}
    recovered = header.model_copy(update={"recovery": recovery})
    return checkpoints.save(replace(loaded, weights=weights, header=recovered), output)


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


class _Shares:
    """Which images are learnt from and which are held back, and how many of each could be read."""

    def __init__(self, held_back: frozenset[int], folder: ImageFolder) -> None:
        self._folder = folder
        self._held = {folder.files[number] for number in held_back}
        self.n_images = self.n_held_back = 0

    def batches(self, images: ImageSource, how: Preprocessing, observer: Observer) -> Iterator[SharedBatch]:
        """Normalized images, and which of them are held back.

        Raises:
            ConfigError: an image can't be read, or all that can be are of one share.
        """
        for batch in images.batches(self._folder, how, _BATCH, observer):
            held = [file in self._held for file in batch.files]
            self.n_images += len(held)
            self.n_held_back += sum(held)
            yield from ((tensor, held) for tensor in as_tensors([batch], how))
            observer.progress("images read", self.n_images, len(self._folder.files))
        if not 0 < self.n_held_back < self.n_images:
            raise ConfigError(
                f"too few images of {self._folder.root} can be read",
                expected="at least one to learn from and one to check on",
                got=f"{self.n_images - self.n_held_back} and {self.n_held_back}",
            )
