"""Which images a stage reads: a folder, a part of it, and what happens to bad files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.file_kinds import text_in_words
from eamdeploy.errors import ConfigError
from eamdeploy.images.class_labels import UNKNOWN_COUNT
from eamdeploy.images.folder import ImageFolder, open_folder
from eamdeploy.images.preprocess import ImageBatch, iter_batches
from eamdeploy.observer import SILENT, Observer
from eamdeploy.vocabulary import ClassOrder, Split


@dataclass(frozen=True)
class ImageSource:
    """Images as the user names them.

    Attributes:
        root: a folder of class sub-folders, of files with `labels.csv`, or of unlabelled files.
        split: all files, or those at even or odd positions of their sorted list.
        limit: at most that many, spread evenly over the split.
        skip_bad: leave out files that can't be decoded; otherwise they are an error.
        exif_transpose: turn the images as their EXIF orientation says.
        class_order: how labels are to be read; None where they must say it by themselves.
        class_names: of the model, in place of those that it carries.
    """

    root: Path
    split: Split = "all"
    limit: int | None = None
    skip_bad: bool = False
    exif_transpose: bool = False
    class_order: ClassOrder | None = None
    class_names: Sequence[str] | None = None

    def open(self, observer: Observer = SILENT) -> ImageFolder:
        """The files without labels; nothing is decoded yet. Files that are not read because of their ending are noted.

        Raises:
            ConfigError: there is no such folder, or no image in it.
        """
        return self._open(None, None, observer)

    def open_labelled(
        self, num_classes: int | None, class_names: Sequence[str] | None, observer: Observer = SILENT
    ) -> ImageFolder:
        """As `open`, with labels if the folder has some.

        Args:
            num_classes: of the model; None if nothing tells.
            class_names: that the model carries.

        Raises:
            ConfigError: there is no such folder, no image in it, the labels make no sense, or `self.class_names` are
                not as many as the model has classes.
        """
        names = class_names if self.class_names is None else self.class_names
        if self.class_names is not None and num_classes not in (None, len(self.class_names)):
            raise ConfigError(
                "the class names given are not the model's", expected=f"{num_classes} names", got=len(self.class_names)
            )
        count = num_classes or (UNKNOWN_COUNT if names is None else len(names))
        return self._open(count, names, observer)

    def _open(self, num_classes: int | None, class_names: Sequence[str] | None, observer: Observer) -> ImageFolder:
        folder = open_folder(
            self.root,
            num_classes,
            class_names,
            self.split,
            self.limit,
            class_order=self.class_order,
            exif_transpose=self.exif_transpose,
        )
        if folder.unread_in_words is not None:
            observer.note(folder.unread_in_words)
        return folder

    def batches(
        self, folder: ImageFolder, how: Preprocessing, batch_size: int, observer: Observer
    ) -> Iterator[ImageBatch]:
        """The decoded images of `folder`; every bad file left out is noted, and how many are of one colour only."""
        plain = total = 0
        for batch in iter_batches(
            folder,
            how,
            batch_size,
            self.skip_bad,
            lambda file, reason: observer.note(f"skipped {folder.name_of(file)}: {reason}"),
        ):
            plain += int((batch.pixels == batch.pixels[:, :1, :1]).all(axis=(1, 2, 3)).sum())
            total += len(batch.files)
            yield batch
        if plain:
            observer.note(f"{plain} of {total} images of {folder.root.name} are of one colour throughout")


def read_class_names(path: Path | None) -> list[str] | None:
    """The class names in a JSON list or in the lines of a text file.

    Raises:
        ConfigError: the file can't be read or holds something else.
    """
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        names = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(
            f"cannot read class names from {path}: {text_in_words(path, err)}",
            expected="a JSON list of texts, or a text file in UTF-8 with a name in each line",
        ) from err
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"class names in {path}", expected="a list of texts")
    return names
