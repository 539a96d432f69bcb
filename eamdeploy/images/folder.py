"""Which images a folder holds, in which order, and what their labels are. Nothing is decoded here."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from eamdeploy.artifacts.files import digest_bytes, digest_file, is_folder, is_there
from eamdeploy.errors import ConfigError
from eamdeploy.images.class_labels import Classes, folder_classes, is_number, shortened, table_classes
from eamdeploy.vocabulary import ClassOrder, Split

IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
LABELS_FILE = "labels.csv"
LABELS_HEADER = ["file", "label"]


# What lies beside pictures and is none; any other file that is not read may be a picture, and is counted
_BESIDE_IMAGES = {".csv", ".db", ".ini", ".json", ".md", ".txt", ".xml", ".yaml", ".yml"}
_HOW_PIXELS_ARE_READ = 2  # goes up when a file gives other pixels than before; part of the digest
_POSITIONS = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}


@dataclass(frozen=True)
class ImageFolder:
    """Images selected from a folder.

    Attributes:
        files: sorted by the parts of their path below `root`.
        labels: the class of each file, in [0, classes), or None for unlabelled images.
        exif_transpose: whether the images are turned as their EXIF orientation says.
        unread: how many files of each ending, lower-cased, are below `root` and are not read because of it.
    """

    root: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    exif_transpose: bool = False
    unread: tuple[tuple[str, int], ...] = ()

    @property
    def unread_in_words(self) -> str | None:
        """A line that counts the files that are not read; None if there are none."""
        return _unread_in_words(self.root, self.unread)

    def name_of(self, file: Path) -> str:
        """The file's path below `root` with `/` between its parts, always printable as UTF-8."""
        return _printable(file.relative_to(self.root).as_posix())


def open_folder(
    root: Path,
    num_classes: int | None,
    class_names: Sequence[str] | None = None,
    split: Split = "all",
    limit: int | None = None,
    *,
    class_order: ClassOrder | None = None,
    exif_transpose: bool = False,
) -> ImageFolder:
    """The images below `root` with their labels, if any.

    Three layouts: a `labels.csv` (`file,label`; files relative to `root`, labels as class numbers or names); class
    sub-folders (see `folder_classes`); a flat folder of unlabelled images. Hidden files and folders don't count; links
    are followed.

    Args:
        num_classes: classes of the model, every label must be in [0, num_classes); None does not look for labels.
        class_names: names of the classes by number, if known.
        split: keeps every image, or those at even or odd positions (from 0) in the sorted list of all images.
        limit: keeps at most this many of the split, evenly spread over it.
        class_order: how labels are to be read; None where they must say it by themselves.
        exif_transpose: whether the images are to be turned as their EXIF orientation says.

    Raises:
        ConfigError: no such folder, no image in it, or labels that are missing, ambiguous or out of range.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"cannot take that number of images from {root}", expected="at least 1", got=limit)
    files, unread = _find_images(root)
    classes = None if num_classes is None else Classes(num_classes, class_names, class_order)
    labels = None if classes is None else _find_labels(root, files, classes)
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
        exif_transpose=exif_transpose,
        unread=unread,
    )


def folder_digest(folder: ImageFolder, *, with_labels: bool = False) -> str:
    """`sha256:<64 hex digits>` over the images' names below the root, their bytes, and how bytes become pixels.

    Where the folder lies does not count.

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
    lines.append(f"read {_HOW_PIXELS_ARE_READ}{' exif_transpose' if folder.exif_transpose else ''}\n")
    return digest_bytes("".join(lines).encode())


def _find_images(root: Path) -> tuple[list[Path], tuple[tuple[str, int], ...]]:
    """The images, sorted, and how many other files have which ending."""
    looked_for = f"images ({' '.join(IMAGE_EXTENSIONS)})"
    try:
        if not is_folder(root):
            got = "a file" if is_there(root) else "nothing there"
            raise ConfigError(f"cannot read images from {root}", expected=f"a folder with {looked_for}", got=got)
        found = list(_files_below(root, frozenset()))
    except OSError as err:
        raise ConfigError(f"cannot read images from {root}: {err.filename}: {err.strerror or err}") from err
    images = [file for file in found if file.suffix.lower() in IMAGE_EXTENSIONS]
    others = [file.suffix.lower() for file in found if file.suffix.lower() not in {*IMAGE_EXTENSIONS, *_BESIDE_IMAGES}]
    unread = tuple(sorted(Counter(others).items(), key=lambda item: (-item[1], item[0])))
    if not images:
        raise ConfigError(
            f"no image in {root} or its sub-folders",
            expected=looked_for,
            got=_unread_in_words(root, unread) or "none",
        )
    return sorted(images, key=lambda file: file.relative_to(root).parts), unread


def _unread_in_words(root: Path, unread: Sequence[tuple[str, int]]) -> str | None:
    if not unread:
        return None
    total = sum(count for _, count in unread)
    endings = ", ".join(f"{_printable(ending) or 'none'} {count}" for ending, count in unread)
    return (
        f"{total} {'file' if total == 1 else 'files'} of {_printable(str(root))} "
        f"{'was' if total == 1 else 'were'} not read because of {'its' if total == 1 else 'their'} ending: {endings}"
    )


def _printable(name: str) -> str:
    return os.fsencode(name).decode(errors="backslashreplace")


def _files_below(folder: Path, parents: frozenset[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in parents:  # a link that leads back up
        return
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if is_folder(entry):
            yield from _files_below(entry, parents | {real})
        else:
            yield entry


def _find_labels(root: Path, files: Sequence[Path], classes: Classes) -> list[int] | None:
    if is_there(root / LABELS_FILE):
        labels = _labels_of_table(root, files, classes)
    elif any(file.parent != root for file in files):
        labels = _labels_of_folders(root, files, classes)
    elif classes.order is None:
        return None
    else:
        raise ConfigError(
            f"the images of {root} have no labels to read in the class order {classes.order}",
            expected=f"class sub-folders, or a {LABELS_FILE}",
            got="a flat folder",
        )
    for file, label in zip(files, labels, strict=True):
        if not 0 <= label < classes.count:
            raise ConfigError(
                f"the label of {file} is out of range",
                expected=f"0 to {classes.count - 1}, as the model has {classes.count} classes",
                got=label,
            )
    return labels


def _labels_of_folders(root: Path, files: Sequence[Path], classes: Classes) -> list[int]:
    loose = [file.name for file in files if file.parent == root]
    if loose:
        raise ConfigError(
            f"{root} mixes images with sub-folders of images",
            expected="only class sub-folders, or only images",
            got=f"{len(loose)} images such as {loose[0]} beside sub-folders",
            hint=f"Sort them into the sub-folders, or write a {LABELS_FILE} (file,label) there.",
        )
    folders = [file.relative_to(root).parts[0] for file in files]
    by_text = folder_classes(set(folders), _sub_folders(root) - set(folders), classes, root)
    return [by_text[name] for name in folders]


def _sub_folders(root: Path) -> set[str]:
    try:
        return {entry.name for entry in root.iterdir() if is_folder(entry) and not entry.name.startswith(".")}
    except OSError as err:
        raise ConfigError(f"cannot read images from {root}: {err.strerror or err}") from err


def _labels_of_table(root: Path, files: Sequence[Path], classes: Classes) -> list[int]:
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
            got=f"none for {shortened(missing)}",
        )
    by_text = table_classes(set(texts.values()), classes, table)
    if by_text is None:
        known_names = classes.names or ()
        strays = [(file, text) for file, text in texts.items() if not is_number(text) and text not in known_names]
        raise ConfigError(
            f"cannot tell the classes in {table}",
            expected="class numbers"
            if classes.names is None
            else "only class numbers, or only class names of the model",
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
