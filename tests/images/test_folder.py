from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eamdeploy.errors import ConfigError
from eamdeploy.images.folder import ImageFolder, folder_digest, open_folder


def put(root: Path, *names: str) -> Path:
    """Files whose bytes are their names: `open_folder` must not decode anything."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def table(root: Path, *lines: str) -> None:
    (root / "labels.csv").write_text("".join(f"{line}\n" for line in lines))


def labels_by_name(folder: ImageFolder) -> dict[str, int]:
    assert folder.labels is not None
    return {folder.name_of(file): label for file, label in zip(folder.files, folder.labels, strict=True)}


def names(folder: ImageFolder) -> list[str]:
    return [folder.name_of(file) for file in folder.files]


def test_flat_images_are_sorted_and_unlabelled(tmp_path: Path) -> None:
    put(tmp_path, "b.PNG", "a.jpeg", "c.JPG", "d.bmp", "e.webp", "f.Ppm", ".hidden.png", "notes.txt", "g.gif", "png")
    folder = open_folder(tmp_path, 3)
    assert names(folder) == ["a.jpeg", "b.PNG", "c.JPG", "d.bmp", "e.webp", "f.Ppm"]
    assert folder.labels is None


def test_hidden_folders_and_empty_sub_folders_do_not_count(tmp_path: Path) -> None:
    put(tmp_path, "a.png", ".cache/b.png")
    (tmp_path / "empty").mkdir()
    folder = open_folder(tmp_path, 3)
    assert names(folder) == ["a.png"]
    assert folder.labels is None


def test_linked_class_folders_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "x.png")
    root = put(tmp_path / "root", "1/y.png")
    (root / "0").symlink_to(tmp_path / "elsewhere")
    (root / "1" / "back").symlink_to(root)
    assert labels_by_name(open_folder(root, 2)) == {"0/x.png": 0, "1/y.png": 1}


# class sub-folders


def test_sub_folders_by_class_name(tmp_path: Path) -> None:
    put(tmp_path, "dog/2.png", "cat/1.png", "cat/deep/0.png")
    folder = open_folder(tmp_path, 3, ["bird", "dog", "cat"])
    assert labels_by_name(folder) == {"cat/1.png": 2, "cat/deep/0.png": 2, "dog/2.png": 1}


def test_a_class_name_goes_before_the_number_it_looks_like(tmp_path: Path) -> None:
    put(tmp_path, "1/a.png", "2/b.png")
    assert labels_by_name(open_folder(tmp_path, 3, ["2", "1", "0"])) == {"1/a.png": 1, "2/b.png": 0}


def test_sub_folders_by_number(tmp_path: Path) -> None:
    put(tmp_path, "10/a.png", "2/b.png", "007/c.png")
    assert labels_by_name(open_folder(tmp_path, 11)) == {"007/c.png": 7, "10/a.png": 10, "2/b.png": 2}


def test_as_many_sub_folders_as_classes_count_in_sorted_order(tmp_path: Path) -> None:
    put(tmp_path, "n00000003/a.png", "n00000001/b.png", "n00000002/c.png")
    labels = {"n00000001/b.png": 0, "n00000002/c.png": 1, "n00000003/a.png": 2}
    assert labels_by_name(open_folder(tmp_path, 3)) == labels
    assert labels_by_name(open_folder(tmp_path, 3, ["x", "y", "z"])) == labels


def test_other_sub_folders_are_refused_with_what_was_found(tmp_path: Path) -> None:
    put(tmp_path, "n01/a.png", "n02/b.png", "n03/c.tif")
    with pytest.raises(
        ConfigError, match=r"exactly 3 .* got 2 with images: n01, n02; without images: n03\. .*labels\.csv"
    ):
        open_folder(tmp_path, 3)


def test_a_sub_folder_number_out_of_range_names_it(tmp_path: Path) -> None:
    put(tmp_path, "0/a.png", "3/b.png")
    with pytest.raises(ConfigError, match=r"/3 is out of range; expected 0 to 2.*got 3"):
        open_folder(tmp_path, 3)


@pytest.mark.parametrize("order", ["natural", "letters", "numbers"])
def test_the_order_asked_for_labels_folders_and_tables(tmp_path: Path, order: Any) -> None:
    numbers = [str(n) for n in range(12)]
    put(tmp_path, *(f"{n}/a.png" for n in numbers))
    with pytest.raises(ConfigError, match="can be read in several ways"):
        open_folder(tmp_path, 12)
    right = sorted(numbers) if order == "letters" else numbers
    labels = {f"{n}/a.png": right.index(n) for n in numbers}
    assert labels_by_name(open_folder(tmp_path, 12, class_order=order)) == labels
    table(tmp_path, "file,label", *(f"{n}/a.png,{n}" for n in numbers))
    assert labels_by_name(open_folder(tmp_path, 12, class_order=order)) == labels
    assert labels_by_name(open_folder(tmp_path, 12)) == {f"{n}/a.png": int(n) for n in numbers}


def test_an_order_of_labels_that_are_not_there_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    with pytest.raises(ConfigError, match=r"no labels to read in the class order letters; .* got a flat folder"):
        open_folder(tmp_path, 12, class_order="letters")
    assert open_folder(tmp_path, None, class_order="letters").labels is None


def test_a_folder_without_images_is_looked_at_beside_numbers(tmp_path: Path) -> None:
    put(tmp_path, "1/a.png", "2/a.png", "3/a.tif", ".9/a.png")
    with pytest.raises(ConfigError, match=r"got 2 with images: 1, 2; without images: 3\."):
        open_folder(tmp_path, 3)
    assert labels_by_name(open_folder(tmp_path, 4)) == {"1/a.png": 1, "2/a.png": 2}


def test_loose_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "0/a.png", "loose.png")
    with pytest.raises(ConfigError, match=r"mixes images.*loose\.png"):
        open_folder(tmp_path, 3)


# labels.csv


def test_labels_csv_with_numbers_in_any_row_order(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "sub/c.png")
    table(tmp_path, "file,label", "sub/c.png, 2", "", "./b.png,0", "a.png,1")
    assert labels_by_name(open_folder(tmp_path, 3)) == {"a.png": 1, "b.png": 0, "sub/c.png": 2}


def test_labels_csv_with_names_and_a_byte_order_mark(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "labels.csv").write_bytes(b'\xef\xbb\xbffile,label\r\na.png,"tench, the fish"\r\nb.png,dog\r\n')
    assert labels_by_name(open_folder(tmp_path, 2, ["dog", "tench, the fish"])) == {"a.png": 1, "b.png": 0}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.png,0", "b.png,1"], "has no header; expected file,label; got a.png,0"),
        ([], "has no header; expected file,label; got nothing"),
        (["file,label", "a.png,0", "b.png,1", "c.png,1"], "line 4 names 'c.png'"),
        (["file,label", "a.png,0", "b.png,1", "a.png,0"], "line 4 repeats 'a.png'"),
        (["file,label", "a.png,0"], "lacks 1 of 2 images; .* got none for b.png"),
        (["file,label", "a.png,0", "b.png"], "line 3 is no row"),
        (["file,label", "a.png,0", "b.png,1,x"], "line 3 is no row"),
        (["file,label", "a.png,0", "b.png,3"], r"b\.png is out of range; expected 0 to 2.*got 3"),
        (["file,label", "a.png,-1", "b.png,1"], r"a\.png is out of range; expected 0 to 2.*got -1"),
        (["file,label", "a.png,0", "b.png,1.0"], "expected only class numbers.*got '1.0' for b.png"),
        (["file,label", "a.png,dog", "b.png,wolf"], "got 'wolf' for b.png"),
        (["file,label", "a.png,dog", "b.png,1"], "got both"),
        (["file,label", "a.png,", "b.png,1"], "got '' for a.png"),
        (["file,label", "a.png,1", "b.png,Dog"], "got 'Dog' for b.png"),
    ],
)
def test_bad_labels_csv(tmp_path: Path, lines: list[str], message: str) -> None:
    put(tmp_path, "a.png", "b.png")
    table(tmp_path, *lines)
    with pytest.raises(ConfigError, match=message):
        open_folder(tmp_path, 3, ["cat", "dog", "bird"])


def test_class_names_in_labels_csv_need_known_classes(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    table(tmp_path, "file,label", "a.png,dog")
    with pytest.raises(ConfigError, match=r"expected class numbers; got 'dog' for a\.png"):
        open_folder(tmp_path, 3)


def test_labels_csv_that_is_no_text(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / "labels.csv").write_bytes(b"file,label\na.png,\xff\n")
    with pytest.raises(ConfigError, match=r"labels\.csv is no CSV file"):
        open_folder(tmp_path, 3)


# nothing to read


def test_missing_empty_and_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent; expected a folder with images \(\.bmp .*\); got nothing there"):
        open_folder(tmp_path / "absent", 3)
    put(tmp_path, "notes.txt")
    with pytest.raises(ConfigError, match=r"notes\.txt; .* got a file"):
        open_folder(tmp_path / "notes.txt", 3)
    with pytest.raises(ConfigError, match=r"no image in .* expected images \(\.bmp \.jpeg \.jpg"):
        open_folder(tmp_path, 3)


# files that are not read


def test_files_of_other_endings_are_counted(tmp_path: Path) -> None:
    put(tmp_path, "0/a.png", "0/b.TIF", "0/c.tif", "1/d.jpg", "1/e.avif", "1/f", "1/deep/g.tif", "1/h.png.gz", "i.ti f")
    beside = ["labels.csv", "README.md", "notes.txt", "meta.json", "x.xml", "Thumbs.db", "desktop.ini", ".hidden.tif"]
    put(tmp_path, *beside, ".hidden/a.tif")
    folder = open_folder(tmp_path, None)
    assert dict(folder.unread) == {".tif": 3, ".avif": 1, ".gz": 1, ".ti f": 1, "": 1}
    assert folder.unread_in_words == (
        f"7 files of {tmp_path} were not read because of their ending: .tif 3, none 1, .avif 1, .gz 1, .ti f 1"
    )


def test_one_file_of_another_ending_and_none(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.gif")
    one = open_folder(tmp_path, None, split="even").unread_in_words
    assert one == f"1 file of {tmp_path} was not read because of its ending: .gif 1"
    (tmp_path / "b.gif").unlink()
    assert open_folder(tmp_path, None).unread_in_words is None


def test_an_ending_that_is_no_text_can_be_told(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    (tmp_path / os.fsdecode(b"b.\xff")).write_bytes(b"")
    told = open_folder(tmp_path, None).unread_in_words
    assert told is not None and told.encode() and told.endswith(r"ending: .\xff 1")


def test_nothing_but_other_endings_is_no_folder_of_images(tmp_path: Path) -> None:
    put(tmp_path, "a.tif", "b.tif", "c")
    with pytest.raises(ConfigError, match=r"no image in .* got 3 files of .* because of their ending: \.tif 2, none 1"):
        open_folder(tmp_path, None)


# split and limit


def test_split_goes_by_position_among_all_images(tmp_path: Path) -> None:
    put(tmp_path, "0/a.png", "0/b.png", "1/c.png", "1/d.png", "1/e.png")
    assert labels_by_name(open_folder(tmp_path, 2, split="even")) == {"0/a.png": 0, "1/c.png": 1, "1/e.png": 1}
    assert labels_by_name(open_folder(tmp_path, 2, split="odd")) == {"0/b.png": 0, "1/d.png": 1}


def test_the_odd_half_of_one_image_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    assert len(open_folder(tmp_path, 2, split="even").files) == 1
    with pytest.raises(ConfigError, match="the odd half"):
        open_folder(tmp_path, 2, split="odd")


def test_a_limit_is_spread_evenly_over_the_split(tmp_path: Path) -> None:
    put(tmp_path, *(f"{i}.png" for i in range(8)))
    table(tmp_path, "file,label", *(f"{i}.png,{i}" for i in range(8)))
    assert labels_by_name(open_folder(tmp_path, 8, limit=4)) == {"0.png": 0, "2.png": 2, "4.png": 4, "6.png": 6}
    assert names(open_folder(tmp_path, 8, split="odd", limit=2)) == ["1.png", "5.png"]
    assert names(open_folder(tmp_path, 8, limit=100)) == names(open_folder(tmp_path, 8))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(tmp_path: Path, limit: int) -> None:
    put(tmp_path, "a.png")
    with pytest.raises(ConfigError, match=f"at least 1; got {limit}"):
        open_folder(tmp_path, 2, limit=limit)


@pytest.fixture(scope="module")
def thirteen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put(tmp_path_factory.mktemp("thirteen"), *(f"{i:02}.png" for i in range(13)))


@given(limit=st.integers(1, 13))
def test_a_limit_picks_distinct_images_with_no_gap_much_wider_than_another(thirteen: Path, limit: int) -> None:
    positions = [int(file.stem) for file in open_folder(thirteen, 2, limit=limit).files]
    gaps = [after - before for before, after in zip(positions, [*positions[1:], 13], strict=True)]
    assert len(positions) == limit
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


# digest


def test_the_digest_follows_names_and_bytes_but_not_the_place(tmp_path: Path) -> None:
    root = put(tmp_path / "here", "0/a.png", "1/b.png")
    digest = folder_digest(open_folder(root, 2))
    assert digest.startswith("sha256:")
    assert len(digest) == len("sha256:") + 64
    shutil.copytree(root, tmp_path / "there")
    assert folder_digest(open_folder(tmp_path / "there", 2)) == digest
    (tmp_path / "there" / "1" / "b.png").write_text("other")
    assert folder_digest(open_folder(tmp_path / "there", 2)) != digest
    (root / "1" / "b.png").rename(root / "1" / "c.png")
    assert folder_digest(open_folder(root, 2)) != digest


def test_the_digest_of_part_of_a_folder_is_another(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    assert folder_digest(open_folder(tmp_path, 2, limit=1)) != folder_digest(open_folder(tmp_path, 2))


def test_turning_by_exif_is_another_digest(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    upright = open_folder(tmp_path, 2, exif_transpose=True)
    assert upright.exif_transpose
    assert folder_digest(upright) != folder_digest(open_folder(tmp_path, 2))


def test_labels_count_in_the_digest_only_when_asked(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    table(tmp_path, "file,label", "a.png,0", "b.png,1")
    before = open_folder(tmp_path, 2)
    table(tmp_path, "file,label", "a.png,1", "b.png,1")
    after = open_folder(tmp_path, 2)
    assert folder_digest(before) == folder_digest(after)
    assert folder_digest(before, with_labels=True) != folder_digest(after, with_labels=True)


def test_the_shared_sample_is_read_as_its_readme_says(shared_data: Path) -> None:
    folder = open_folder(shared_data / "imagenet_sample", 1000, split="odd")
    assert len(folder.files) == 500
    assert folder.labels == tuple(range(1, 1000, 2))
    assert all(file.name.startswith(f"{label:04}_") for file, label in zip(folder.files, folder.labels, strict=True))
