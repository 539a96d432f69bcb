"""From the names of class folders, or from a table's labels, to class numbers: by a reading that is certain, or none.

Class folders come in no one order: torchvision sorts by letters (`class1, class10, class2`), timm by the numbers in the
names (`class1, class2, class10`), and a folder's name may be its class's number. Where these readings differ, the user
must say which it is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eamdeploy.errors import ConfigError
from eamdeploy.vocabulary import ClassOrder

UNKNOWN_COUNT = 1 << 31
"""Stands for a number of classes that nothing tells; every class number is below it."""

_Reading = Mapping[str, int]
_MEANINGS: Mapping[ClassOrder, str] = {
    "natural": "sorted as timm sorts them",
    "letters": "sorted as torchvision sorts them",
    "numbers": "each is its class's number, from 0",
}
_SPLIT = re.compile(
    r"(train(ing|val)?|val(id(ation)?)?|test(ing)?|eval(uat(e|ion))?|dev(elopment)?|hold[-_ ]?out|held[-_ ]?out"
    r"|calib(rat(e|ion))?)([-_ ]?(set|split|data|images|[0-9]+))?",
    re.IGNORECASE,
)
_SYNSET = re.compile(r"n[0-9]{8}")
_NUMBER = re.compile(r"-?[0-9]{1,18}")  # Python refuses to convert thousands of digits
_NAMES_FILE = "--class-names FILE"


@dataclass(frozen=True)
class Classes:
    """What is known of a model's classes, and how the user wants labels to be read.

    Attributes:
        count: how many there are, or `UNKNOWN_COUNT`.
        names: by class number, if known.
        order: None where the labels must say by themselves what they mean. `names`: they are class names; `numbers`:
            class numbers. `natural`, `letters`: there is one for each class, and sorting them as timm or as torchvision
            does gives the classes.
    """

    count: int
    names: Sequence[str] | None = None
    order: ClassOrder | None = None


def folder_classes(folders: Collection[str], empty: Collection[str], classes: Classes, root: Path) -> dict[str, int]:
    """The class number of each class folder.

    Class names go first. Folders that bear none of the known names must be class numbers, or the synsets of ImageNet,
    one for each class. Otherwise every possible reading (natural order, letters, numbers) must give the same.

    Args:
        folders: names of the folders in `root` that hold images.
        empty: names of the others.

    Raises:
        ConfigError: the folders can be read in several ways or in none, or look like the splits of a data set.
    """
    where = f"the sub-folders of {root}"
    if classes.order is not None:
        return dict(_asked(classes.order, folders, classes, where))
    known = set(classes.names or ())
    if strangers := sorted(set(folders) - known):
        if len(strangers) < len(folders):
            raise ConfigError(
                f"{len(strangers)} of {len(folders)} sub-folders of {root} have no class's name",
                expected=f"names such as {shortened(classes.names or (), 3)}",
                got=shortened(strangers),
                hint=_ways((), _NAMES_FILE),
            )
    else:
        return _by_name(folders, classes.names or (), where)
    _refuse_splits(folders, root)
    readings = _certain_readings(folders, empty, classes)
    if classes.names is not None and not readings.keys() & {"numbers"} and not _are_synsets(folders, classes.count):
        raise ConfigError(
            f"{where} have no class's name",
            expected=f"names such as {shortened(classes.names, 3)}",
            got=shortened(strangers),
            hint=_ways(readings, _NAMES_FILE),
        )
    if not readings:
        raise _untold(folders, empty, classes.count, root)
    if len(folders) == classes.count and "natural" not in readings:
        raise _ambiguous(readings, where, f"{shortened(_tied(folders))}, which are alike in natural order")
    if len({tuple(sorted(reading.items())) for reading in readings.values()}) > 1:
        raise _ambiguous(readings, where, _differences(readings))
    return dict(next(iter(readings.values())))


def table_classes(texts: Collection[str], classes: Classes, table: Path) -> dict[str, int] | None:
    """The class number of each label: all are class names, or all are numbers; None when neither holds.

    A number may be out of range; the caller knows which file has it.

    Raises:
        ConfigError: the labels can be read in both ways, or not as the user asked.
    """
    where = f"the labels in {table}"
    if classes.order is not None:
        return dict(_asked(classes.order, texts, classes, where))
    numbers = all(map(is_number, texts))
    if numbers and (twofold := _names_of_others(texts, classes.names or ())):
        raise ConfigError(
            f"{where} may be class numbers or class names",
            expected="one meaning",
            got=f"{twofold[0]}, which is a number and the name of class {_index(twofold[0], classes.names or ())}",
            hint="Say --class-order numbers or --class-order names.",
        )
    if set(texts) <= set(classes.names or ()):
        return _by_name(texts, classes.names or (), where)
    return {text: int(text) for text in texts} if numbers else None


def natural_key(name: str) -> list[str | int]:
    """What timm sorts class folders by: case does not count, and runs of digits count as numbers.

    Source: `timm.utils.misc.natural_key`.
    """
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name.lower()))]


def is_number(text: str) -> bool:
    """Whether it is a whole number in digits."""
    return _NUMBER.fullmatch(text) is not None


def shortened(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and a mark where there are more."""
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")


# --- readings ---------------------------------------------------------------------------------------------------------


def _readings(texts: Collection[str], count: int) -> dict[ClassOrder, _Reading]:
    """The class numbers of the texts by every order in which they can be read."""
    found: dict[ClassOrder, _Reading] = {}
    if len(texts) == count:
        if not _tied(texts):
            found["natural"] = {text: index for index, text in enumerate(sorted(texts, key=natural_key))}
        found["letters"] = {text: index for index, text in enumerate(sorted(texts))}
    if all(is_number(text) and 0 <= int(text) < count for text in texts):
        found["numbers"] = {text: int(text) for text in texts}
    return found


def _certain_readings(folders: Collection[str], empty: Collection[str], classes: Classes) -> dict[ClassOrder, _Reading]:
    """Those that nothing speaks against, as an empty folder N of 1…N or class names that are other numbers do."""
    found = _readings(folders, classes.count)
    stray = [name for name in empty if is_number(name)]
    if "numbers" not in _readings([*folders, *stray], classes.count) or _names_of_others(folders, classes.names or ()):
        found.pop("numbers", None)
    return found


def _by_name(texts: Collection[str], names: Sequence[str], where: str) -> dict[str, int]:
    counts = Counter(names)
    for text in texts:
        if counts[text] > 1:
            raise ConfigError(
                f"{where} have {text!r}, the name of {counts[text]} classes of the model", hint="Use class numbers."
            )
    return {text: names.index(text) for text in texts}


def _asked(order: ClassOrder, texts: Collection[str], classes: Classes, where: str) -> _Reading:
    """The reading that the user asked for.

    Raises:
        ConfigError: the texts can't be read so.
    """
    ordered = sorted(texts)
    if order == "names":
        names = classes.names or ()
        if set(texts) <= set(names):
            return _by_name(texts, names, where)
        expected = f"names such as {shortened(names, 3)}" if names else f"a model with class names, or {_NAMES_FILE}"
        got = shortened([text for text in ordered if text not in names])
    else:
        readings = _readings(texts, classes.count)
        if order in readings:
            return readings[order]
        if order == "numbers":
            expected = f"numbers from 0 to {classes.count - 1}"
            got = shortened([text for text in ordered if not (is_number(text) and 0 <= int(text) < classes.count)])
        elif len(texts) != classes.count:
            expected, got = f"one for each of {classes.count} classes", f"{len(texts)}: {shortened(ordered)}"
        else:
            expected, got = "names that differ in natural order", shortened(_tied(texts))
    raise ConfigError(f"{where} can't be read in the class order {order}", expected=expected, got=got)


def _names_of_others(texts: Collection[str], names: Sequence[str]) -> list[str]:
    """The texts that are a number, and, as a number, the name of another class than the one of that number."""
    named = {int(name): index for index, name in enumerate(names) if is_number(name)}
    return sorted(text for text in texts if is_number(text) and named.get(int(text), int(text)) != int(text))


def _index(number: str, names: Sequence[str]) -> int:
    return next(index for index, name in enumerate(names) if is_number(name) and int(name) == int(number))


def _tied(texts: Collection[str]) -> list[str]:
    """Those that natural order does not tell from another."""
    counts = Counter(tuple(natural_key(text)) for text in texts)
    return sorted(text for text in texts if counts[tuple(natural_key(text))] > 1)


def _are_synsets(folders: Collection[str], count: int) -> bool:
    """One ImageNet synset for each class: its classes are the sorted synsets."""
    return len(folders) == count and all(map(_SYNSET.fullmatch, folders))


# --- refusals ---------------------------------------------------------------------------------------------------------


def _refuse_splits(folders: Collection[str], root: Path) -> None:
    if all(map(_SPLIT.fullmatch, folders)):
        likely = sorted(folders, key=lambda name: (name.lower().startswith("train"), name))[0]
        raise ConfigError(
            f"the sub-folders of {root} look like the splits of a data set, not like classes",
            expected="a folder of class sub-folders",
            got=shortened(sorted(folders)),
            hint=f"Give one of them, e.g. --data {root / likely}; if they are classes, say --class-order.",
        )


def _untold(folders: Collection[str], empty: Collection[str], count: int, root: Path) -> ConfigError:
    numbers = [name for name in sorted(folders) if is_number(name)]
    outside = [name for name in numbers if not 0 <= int(name) < count]
    if outside and len(numbers) == len(folders):
        return ConfigError(
            f"the class number of the folder {root / outside[0]} is out of range",
            expected=f"0 to {count - 1}, as the model has {count} classes",
            got=outside[0],
        )
    one_each = "" if count == UNKNOWN_COUNT else f" or exactly {count} sub-folders"
    without = f"; without images: {shortened(sorted(empty))}" if empty else ""
    return ConfigError(
        f"cannot tell the classes of the sub-folders of {root}",
        expected=f"class names, class numbers{one_each}",
        got=f"{len(folders)} with images: {shortened(sorted(folders))}{without}",
        hint="Write a labels.csv (file,label) there, or put the images into one flat folder for no labels.",
    )


def _ambiguous(readings: Mapping[ClassOrder, _Reading], where: str, got: str) -> ConfigError:
    return ConfigError(
        f"{where} can be read in several ways",
        expected="one class for each",
        got=got,
        hint=_ways(readings, _NAMES_FILE),
    )


def _differences(readings: Mapping[ClassOrder, _Reading], shown: int = 3) -> str:
    """The first names of which the readings differ, with what each makes of them."""
    names = sorted(next(iter(readings.values())), key=natural_key)
    unlike = [name for name in names if len({reading[name] for reading in readings.values()}) > 1]
    return "; ".join(
        f"{name}: " + ", ".join(f"class {reading[name]} by {order}" for order, reading in readings.items())
        for name in unlike[:shown]
    )


def _ways(readings: Collection[ClassOrder], *others: str) -> str:
    orders = [f"--class-order {order} ({_MEANINGS[order]})" for order in _MEANINGS if order in readings]
    return f"Say {', or '.join([*orders, *others])}."
