from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eamdeploy.errors import ConfigError
from eamdeploy.images.class_labels import UNKNOWN_COUNT, Classes, folder_classes, natural_key, table_classes
from eamdeploy.vocabulary import ClassOrder

ROOT = Path("photos")
WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kite", "lynx"]

NATURAL_TO_12 = [f"class{n}" for n in range(1, 13)]
NUMBERS_TO_12 = [str(n) for n in range(12)]
ONE_TO_12 = [str(n) for n in range(1, 13)]
SYNSETS = ["n02119789", "n01440764", "n03075370"]


def read(
    folders: list[str],
    count: int | None = None,
    names: list[str] | None = None,
    order: ClassOrder | None = None,
    empty: list[str] | None = None,
) -> dict[str, int]:
    shuffled = random.Random(0).sample(folders, len(folders))
    return folder_classes(shuffled, empty or [], Classes(count or len(folders), names, order), ROOT)


def numbered(names: list[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


# --- the orders are those of the libraries ---------------------------------------------------------------------------


@settings(deadline=None)
@given(names=st.sets(st.from_regex(r"[a-cA-C0-3 _-]{1,6}", fullmatch=True), min_size=1, max_size=8))
def test_orders_are_timms_and_torchvisions_own(names: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    find_images_and_targets = pytest.importorskip("timm.data.readers.reader_image_folder").find_images_and_targets
    find_classes = pytest.importorskip("torchvision.datasets.folder").find_classes
    root = tmp_path_factory.mktemp("orders")
    for name in names:
        (root / name).mkdir()
        (root / name / "a.png").write_bytes(b"")
    tied = len({tuple(natural_key(name)) for name in names}) < len(names)
    assert read([*names], order="letters") == find_classes(str(root))[1]
    if tied:  # timm sorts a set: which comes first differs from process to process
        with pytest.raises(ConfigError, match=r"class order natural; expected names that differ in natural order"):
            read([*names], order="natural")
    else:
        assert read([*names], order="natural") == find_images_and_targets(str(root))[1]


def test_natural_order_bears_digits_that_are_no_decimals() -> None:
    assert sorted(["x10", "x²", "x2"], key=natural_key) == ["x2", "x10", "x²"]


# --- what folders say by themselves ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (["cat", "ant", "bee"], {"ant": 0, "bee": 1, "cat": 2}),
        ([*"0123456789"], {str(n): n for n in range(10)}),
        ([f"{n:02}" for n in range(12)], {f"{n:02}": n for n in range(12)}),
        ([*"123456789"], {str(n): n - 1 for n in range(1, 10)}),
        ([f"class{n:02}" for n in range(1, 13)], {f"class{n:02}": n - 1 for n in range(1, 13)}),
        (SYNSETS, {"n01440764": 0, "n02119789": 1, "n03075370": 2}),
        (["train", "ship", "bus"], {"bus": 0, "ship": 1, "train": 2}),
    ],
    ids=["words", "0…9", "00…11", "1…9", "class01…12", "synsets", "a train among others"],
)
def test_one_folder_for_each_class_is_read_where_all_orders_agree(folders: list[str], classes: dict[str, int]) -> None:
    assert read(folders) == classes


def test_some_folders_are_read_by_number_only() -> None:
    assert read(["10", "2", "007"], 11) == {"10": 10, "2": 2, "007": 7}
    assert read(["3", "900"], UNKNOWN_COUNT) == {"3": 3, "900": 900}
    assert read(["3", "4"], 10, WORDS[:10]) == {"3": 3, "4": 4}


BY_NUMBER = "class 2 by natural, class 5 by letters"


@pytest.mark.parametrize("names", [None, [f"animal {n}" for n in range(12)]], ids=["no names", "other names"])
@pytest.mark.parametrize(
    ("folders", "told", "orders"),
    [
        (NATURAL_TO_12, f"class2: class 1 by natural, class 4 by letters; class3: {BY_NUMBER}", "natural letters"),
        (ONE_TO_12, f"2: class 1 by natural, class 4 by letters; 3: {BY_NUMBER}", "natural letters"),
        (
            NUMBERS_TO_12,
            "2: class 2 by natural, class 4 by letters, class 2 by numbers; 3: class 3",
            "natural letters numbers",
        ),
        (
            ["B", *"acdefghijkl"],
            "a: class 0 by natural, class 1 by letters; B: class 1 by natural, class 0",
            "natural letters",
        ),
        (["1", "01", *map(str, range(2, 12))], "01, 1, which are alike in natural order", "letters numbers"),
        (["Cat", "cat", *WORDS[3:], "z"], "Cat, cat, which are alike in natural order", "letters"),
    ],
    ids=["class1…12", "1…12", "0…11", "capitals", "alike numbers", "alike letters"],
)
def test_orders_that_differ_are_never_guessed(
    folders: list[str], told: str, orders: str, names: list[str] | None
) -> None:
    assert len(folders) == 12
    with pytest.raises(ConfigError) as err:
        read(folders, 12, names)
    message = str(err.value)
    assert re.findall(r"--class-order (\w+)", message) == orders.split() and "--class-names FILE" in message
    if names is None or "numbers" in orders:
        assert message.startswith("the sub-folders of photos can be read in several ways; expected one class for each")
        assert f"; got {told}" in message
    else:
        assert "have no class's name; expected names such as animal 0, animal 1, animal 2, …" in message


@pytest.mark.parametrize(
    ("folders", "count", "message"),
    [
        (
            ["ant", "bee"],
            3,
            r"expected class names, class numbers or exactly 3 sub-folders; got 2 with images: ant, bee",
        ),
        (["ant", "7"], 9, r"got 2 with images: 7, ant"),
        (["ant", "bee"], UNKNOWN_COUNT, r"expected class names, class numbers; got 2 with images"),
        (["0", "3"], 3, r"class number of the folder photos/3 is out of range; expected 0 to 2, .* got 3"),
        (["-1", "0"], 3, r"class number of the folder photos/-1 is out of range; expected 0 to 2, .* got -1"),
    ],
)
def test_folders_that_fit_no_reading_are_refused(folders: list[str], count: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(folders, count)


def test_an_empty_folder_may_be_the_one_that_numbers_do_not_fit() -> None:
    """1…12, of which 12 has lost its pictures: class 3 is not the folder 3."""
    with pytest.raises(ConfigError, match=r"cannot tell the classes .* 1, 10, 11, 2, 3, …; without images: 12, notes"):
        read(ONE_TO_12[:-1], 12, empty=["12", "notes"])
    assert read(NUMBERS_TO_12[:-1], 12, empty=["11", "notes"]) == {str(n): n for n in range(11)}
    assert read(ONE_TO_12[:-1], 12, empty=["12"], order="numbers") == {str(n): n for n in range(1, 12)}


@pytest.mark.parametrize(
    "folders",
    [
        ["train", "val"],
        ["Training", "Validation", "TEST"],
        ["test"],
        ["dev", "eval"],
        ["train2017", "val2017"],
        ["train_set", "test-set"],
        ["calibration", "heldout"],
        ["holdout", "trainval"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("names", [None, ["cat", "dog"]], ids=["no names", "names"])
def test_splits_are_no_classes_unless_the_user_says_so(folders: list[str], names: list[str] | None) -> None:
    names = names and WORDS[: len(folders)]
    with pytest.raises(ConfigError, match=r"look like the splits of a data set.* --data photos/") as err:
        read(folders, names=names)
    assert not re.search(r"--data photos/[tT]rain", str(err.value))
    assert read(folders, order="letters") == numbered(sorted(folders))
    assert read(folders, names=folders[::-1]) == numbered(folders[::-1])


# --- beside class names ----------------------------------------------------------------------------------------------


def test_class_names_go_before_every_order() -> None:
    assert read(NATURAL_TO_12, names=NATURAL_TO_12) == numbered(NATURAL_TO_12)
    assert read(NUMBERS_TO_12, names=sorted(NUMBERS_TO_12)) == numbered(sorted(NUMBERS_TO_12))
    assert read(["1", "2"], 3, ["2", "1", "0"]) == {"1": 1, "2": 0}
    assert read(["dog"], 12, WORDS) == {"dog": 3}


def test_synsets_are_classes_beside_other_names_only_if_they_are_all() -> None:
    assert read(SYNSETS, names=["tench", "red fox", "container ship"]) == numbered(sorted(SYNSETS))
    with pytest.raises(ConfigError, match=r"have no class's name; .* got n01440764, n02119789, n03075370"):
        read(SYNSETS, 4, WORDS[:4])
    with pytest.raises(ConfigError, match=r"have no class's name"):
        read([*SYNSETS[:2], "n123"], names=WORDS[:3])


@pytest.mark.parametrize("folders", [["x", "y", "z"], ["Ant", "Bee", "Cat"], [*"123"], ["train", "x", "y"]])
def test_folders_without_a_class_name_are_refused_where_names_are_known(folders: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"have no class's name; expected names such as ant, bee, cat; got"):
        read(folders, names=WORDS[:3])
    assert read(folders, names=WORDS[:3], order="letters") == numbered(folders)


@pytest.mark.parametrize("folders", [["ant", "bee", "wolf"], ["ant", "1", "2"], ["ant", "wolf"]])
def test_folders_of_which_some_have_a_class_name_are_refused(folders: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"of \d sub-folders of photos have no class's name; .* got (wolf|1, 2)"):
        read(folders, 3, WORDS[:3])


def test_numbers_are_no_class_numbers_beside_names_that_are_other_numbers() -> None:
    assert read(["00", "01"], names=["0", "1"]) == {"00": 0, "01": 1}
    for folders, count in ((["00", "02"], 3), (["00", "01", "02"], 3)):
        with pytest.raises(ConfigError, match="have no class's name"):
            read(folders, count, ["2", "1", "0"])
    assert read(["00", "02"], 3, ["2", "1", "0"], order="numbers") == {"00": 0, "02": 2}


def test_an_ambiguous_class_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"have 'crane', the name of 2 classes"):
        read(["crane", "kite"], 3, ["crane", "kite", "crane"])
    assert read(["kite"], 3, ["crane", "kite", "crane"]) == {"kite": 1}


# --- as the user says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, WORDS], ids=["no names", "other names"])
def test_the_order_asked_for_is_taken(names: list[str] | None) -> None:
    for folders in (NATURAL_TO_12, ONE_TO_12, NUMBERS_TO_12):
        assert read(folders, names=names, order="natural") == numbered(folders)
        assert read(folders, names=names, order="letters") == numbered(sorted(folders))
    assert read(NUMBERS_TO_12, names=names, order="numbers") == numbered(NUMBERS_TO_12)


@pytest.mark.parametrize(
    ("folders", "count", "names", "order", "message"),
    [
        (ONE_TO_12, 12, None, "numbers", r"class order numbers; expected numbers from 0 to 11; got 12"),
        (["0", "x"], 2, None, "numbers", r"expected numbers from 0 to 1; got x"),
        (["a", "b"], 3, None, "letters", r"class order letters; expected one for each of 3 classes; got 2: a, b"),
        (["a", "b"], 1, None, "natural", r"expected one for each of 1 classes; got 2: a, b"),
        (["a", "b"], 2, None, "names", r"class order names; expected a model with class names, or --class-names FILE"),
        (["a", "b"], 2, ["a", "c"], "names", r"expected names such as a, c; got b"),
    ],
)
def test_an_order_that_does_not_fit_is_refused(
    folders: list[str], count: int, names: list[str] | None, order: ClassOrder, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(folders, count, names, order)
    with pytest.raises(ConfigError, match=message):
        table_classes(folders, Classes(count, names, order), ROOT / "labels.csv")


# --- labels.csv ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "names", "classes"),
    [
        (["2", "0", "10"], None, {"0": 0, "2": 2, "10": 10}),
        (["2", "0", "10"], WORDS, {"0": 0, "2": 2, "10": 10}),
        (["cat", "ant"], WORDS, {"ant": 0, "cat": 2}),
        (["2", "0"], ["0", "1", "2"], {"0": 0, "2": 2}),
        (["2", "0"], ["0", "one", "2"], {"0": 0, "2": 2}),
        (["cat", "wolf"], WORDS, None),
        (["cat", "1"], WORDS, None),
        (["cat"], None, None),
    ],
)
def test_a_tables_labels_are_names_or_numbers(
    texts: list[str], names: list[str] | None, classes: dict[str, int] | None
) -> None:
    assert table_classes(texts, Classes(12, names), ROOT / "labels.csv") == classes


@pytest.mark.parametrize(
    ("texts", "names", "told"),
    [
        (NUMBERS_TO_12, sorted(NUMBERS_TO_12), "10, which is a number and the name of class 2"),
        (["1", "2"], ["1", "2", "3"], "1, which is a number and the name of class 0"),
        (["01", "2"], ["1", "5", "2"], "01, which is a number and the name of class 0"),
        (["0", "1"], ["1", "2", "3"], "1, which is a number and the name of class 0"),
    ],
    ids=["torchvision's order", "from 1", "with zeros", "names in part"],
)
def test_numbers_that_are_names_of_other_classes_are_refused(texts: list[str], names: list[str], told: str) -> None:
    table = ROOT / "labels.csv"
    with pytest.raises(ConfigError, match=rf"may be class numbers or class names; .* got {told}.*--class-order names"):
        table_classes(texts, Classes(12, names), table)
    assert table_classes(texts, Classes(12, names, "numbers"), table) == {text: int(text) for text in texts}
    if set(texts) <= set(names):
        by_name = {text: names.index(text) for text in texts}
        assert table_classes(texts, Classes(12, names, "names"), table) == by_name


def test_a_tables_labels_are_put_in_order_when_asked() -> None:
    assert table_classes(ONE_TO_12, Classes(12, None, "natural"), ROOT) == numbered(ONE_TO_12)
    assert table_classes(ONE_TO_12, Classes(12, None, "letters"), ROOT) == numbered(sorted(ONE_TO_12))
