"""Which images a stage reads: a folder, a part of it, and what happens to bad files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eamdeploy.artifact import Preprocessing
from eamdeploy.errors import ConfigError
from eamdeploy.file_kinds import text_in_words
from eamdeploy.folder import ImageFolder, Split, open_folder
from eamdeploy.images import ImageBatch, iter_batches
from eamdeploy.observer import Observer


@dataclass(frozen=True)
class ImageSource:
    """Images as the user names them.

    Attributes:
        root: a folder of class sub-folders, of files with `labels.csv`, or of unlabelled files.
        split: all files, or those at even or odd positions of their sorted list.
        limit: at most that many, spread evenly over the split.
        skip_bad: leave out files that can't be decoded; otherwise they are an error.
    """

    root: Path
    split: Split = "all"
    limit: int | None = None
    skip_bad: bool = False

    def open(self) -> ImageFolder:
        """The files without labels; nothing is decoded yet.

        Raises:
            ConfigError: there is no such folder, or no image in it.
        """
        return open_folder(self.root, None, None, self.split, self.limit)

    def open_labelled(self, num_classes: int, class_names: Sequence[str] | None) -> ImageFolder:
        """The files and, if the folder has some, their labels; nothing is decoded yet.

        Raises:
            ConfigError: there is no such folder, no image in it, or the labels make no sense.
        """
        return open_folder(self.root, num_classes, class_names, self.split, self.limit)

    def batches(
        self, folder: ImageFolder, how: Preprocessing, batch_size: int, observer: Observer
    ) -> Iterator[ImageBatch]:
        """The decoded images of `folder`; every bad file left out is noted."""
        return iter_batches(
            folder,
            how,
            batch_size,
            self.skip_bad,
            lambda file, reason: observer.note(f"skipped {folder.name_of(file)}: {reason}"),
        )


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
