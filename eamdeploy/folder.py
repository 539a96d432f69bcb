"""Which images a folder holds, in which order, and what their labels are. Nothing is decoded here."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from eamdeploy.artifact import digest_bytes, digest_file
from eamdeploy.errors import ConfigError

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
LABELS_FILE = "labels.csv"
LABELS_HEADER = ["file", "label"]

Split = Literal["all", "even", "odd"]
_POSITIONS = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


@dataclass(frozen=True)
class ImageFolder:
    """Images selected from a folder.

    Attributes:
        files: sorted by the parts of their path below `root`.
        labels: the class of each file, in [0, classes), or None for unlabelled images.
    """

    root: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None

    def name_of(self, file: Path) -> str:
        """The file's path below `root` with `/` between its parts, always printable as UTF-8."""
        return os.fsencode(file.relative_to(self.root).as_posix()).decode(errors="backslashreplace")


def open_folder(
    root: Path,
    num_classes: int | None,
    class_names: Sequence[str] | None = None,
    split: Split = "all",
    limit: int | None = None,
) -> ImageFolder:
    """The images below `root` with their labels, if any.

    Three layouts: a `labels.csv` (`file,label`; files relative to `root`, labels as class numbers or names); class
    sub-folders (named after a class, or its number, or one per class in sorted order); a flat folder of unlabelled
    images. Hidden files and folders don't count; links are followed.

    Args:
        num_classes: classes of the model, every label must be in [0, num_classes); None does not look for labels.
        class_names: names of the classes by number, if known.
        split: keeps every image, or those at even or odd positions (from 0) in the sorted list of all images.
        limit: keeps at most this many of the split, evenly spread over it.

    Raises:
        ConfigError: no such folder, no image in it, or labels that are missing, ambiguous or out of range.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"cannot take that number of images from {root}", expected="at least 1", got=limit)
    files = _find_images(root)
    labels = None if num_classes is None else _find_labels(root, files, num_classes, class_names)
    chosen = range(len(files))[_POSITIONS[split]]
    if not chosen:
        raise ConfigError(
            f"the {split} half of {root} is empty", expected="at least 2 images", got=len(files), hint="Use split all."
        )
    if limit is not None and limit < len(chosen):
        chosen_indices = [chosen[i * len(chosen) // limit] for i in range(limit)]
    else:
        chosen_indices = list(chosen)
    return ImageFolder(
        root=root,
        files=tuple(files[i] for i in chosen_indices),
        labels=None if labels is None else tuple(labels[i] for i in chosen_indices),
    )


def folder_digest(folder: ImageFolder, *, with_labels: bool = False) -> str:
    """`sha256:<64 hex digits>` over the images' names below the root and their bytes, wherever the folder lies.

    Args:
        with_labels: a changed label changes the digest too.

    Raises:
        ConfigError: a file can't be read.
    """
    labels = folder.labels if with_labels and folder.labels is not None else ("",) * len(folder.files)
    lines = [
        f"{folder.name_of(file)}\0{digest_file(file)}\0{label}\n"
        for file, label in zip(folder.files, labels, strict=True)
    ]
    return digest_bytes("".join(lines).encode())


def _find_images(root: Path) -> list[Path]:
    looked_for = f"images ({' '.join(IMAGE_EXTENSIONS)})"
    try:
        if not root.is_dir():
            found = "a file" if root.exists() else "nothing there"
            raise ConfigError(f"cannot read images from {root}", expected=f"a folder with {looked_for}", got=found)
        files = sorted(_images_below(root, frozenset()), key=lambda file: file.relative_to(root).parts)
    except OSError as err:
        raise ConfigError(f"cannot read images from {root}: {err.filename}: {err.strerror or err}") from err
    if not files:
        raise ConfigError(f"no image in {root} or its sub-folders", expected=looked_for, got="none")
    return files


def _images_below(folder: Path, parents: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in parents:  # a link that leads back up
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images_below(entry, parents | {real})
        elif entry.suffix.lower() in IMAGE_EXTENSIONS:
            yield entry


def _find_labels(
    root: Path, files: Sequence[Path], num_classes: int, class_names: Sequence[str] | None
) -> list[int] | None:
    if (root / LABELS_FILE).exists():
        labels = _labels_of_table(root, files, class_names)
    elif all(file.parent == root for file in files):
        return None
    else:
        labels = _labels_of_folders(root, files, num_classes, class_names)
    for file, label in zip(files, labels, strict=True):
        if not 0 <= label < num_classes:
            raise ConfigError(
                f"the label of {file} is out of range",
                expected=f"0 to {num_classes - 1}, as the model has {num_classes} classes",
                got=label,
            )
    return labels


def _labels_of_folders(
    root: Path, files: Sequence[Path], num_classes: int, class_names: Sequence[str] | None
) -> list[int]:
    loose = [file.name for file in files if file.parent == root]
    if loose:
        raise ConfigError(
            f"{root} mixes images with sub-folders of images",
            expected="only class sub-folders, or only images",
            got=f"{len(loose)} images such as {loose[0]} beside sub-folders",
            hint=f"Sort them into the sub-folders, or write a {LABELS_FILE} (file,label) there.",
        )
    folders = [file.relative_to(root).parts[0] for file in files]
    names = sorted(set(folders))
    by_text = _class_numbers(names, class_names, f"a sub-folder of {root}")
    if by_text is None and len(names) == num_classes:
        by_text = {name: number for number, name in enumerate(names)}
    if by_text is None:
        raise ConfigError(
            f"cannot tell the classes of the sub-folders of {root}",
            expected=f"class names, class numbers or exactly {num_classes} sub-folders",
            got=f"{len(names)} with images: {_shortened(names)}",
            hint=f"Write a {LABELS_FILE} (file,label) there, or put the images into one flat folder for no labels.",
        )
    return [by_text[name] for name in folders]


def _labels_of_table(root: Path, files: Sequence[Path], class_names: Sequence[str] | None) -> list[int]:
    table = root / LABELS_FILE
    known = {file.relative_to(root).as_posix() for file in files}
    texts: dict[str, str] = {}
    for line, (name, text) in _rows(table):
        file = PurePosixPath(name).as_posix()
        if file not in known:
            raise ConfigError(
                f"{table}, line {line} names {name!r}", expected=f"an image below {root}", got="no such image"
            )
        if file in texts:
            raise ConfigError(f"{table}, line {line} repeats {name!r}", expected="one row for each image", got="two")
        texts[file] = text
    missing = sorted(known - texts.keys())
    if missing:
        raise ConfigError(
            f"{table} lacks {len(missing)} of {len(known)} images",
            expected="one row for each image",
            got=f"none for {_shortened(missing)}",
        )
    by_text = _class_numbers(set(texts.values()), class_names, str(table))
    if by_text is None:
        known_names = class_names or ()
        strays = [(file, text) for file, text in texts.items() if not _is_number(text) and text not in known_names]
        raise ConfigError(
            f"cannot tell the classes in {table}",
            expected="class numbers" if class_names is None else "only class numbers, or only class names of the model",
            got=f"{strays[0][1]!r} for {strays[0][0]}" if strays else "both",
        )
    return [by_text[texts[file.relative_to(root).as_posix()]] for file in files]


def _rows(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and stripped file and label of each row; blank lines don't count."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            header = [cell.strip() for cell in next(reader, [])]
            if header != LABELS_HEADER:
                raise ConfigError(
                    f"{table} has no header", expected=",".join(LABELS_HEADER), got=",".join(header) or "nothing"
                )
            for row in reader:
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != len(LABELS_HEADER):
                    raise ConfigError(
                        f"{table}, line {reader.line_num} is no row", expected="file,label", got=",".join(row)
                    )
                yield reader.line_num, [cell.strip() for cell in row]
    except OSError as err:
        raise ConfigError(f"cannot read {table}: {err.strerror or err}") from err
    except (UnicodeDecodeError, csv.Error) as err:
        raise ConfigError(f"{table} is no CSV file: {err}", expected="UTF-8 text (file,label)") from err


def _class_numbers(texts: Collection[str], class_names: Sequence[str] | None, where: str) -> dict[str, int] | None:
    """Class number of each text: all are class names, or all are numbers; None when neither holds."""
    if class_names is not None and set(texts) <= set(class_names):
        for text in texts:
            if class_names.count(text) > 1:
                raise ConfigError(
                    f"{where} is labelled {text!r}, the name of {class_names.count(text)} classes of the model",
                    hint="Use class numbers.",
                )
        return {text: class_names.index(text) for text in texts}
    if all(_is_number(text) for text in texts):
        return {text: int(text) for text in texts}
    return None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,18}", text) is not None  # Python refuses to convert thousands of digits


def _shortened(names: Sequence[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
