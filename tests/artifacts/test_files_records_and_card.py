from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from foreign_files import FOREIGN, assert_plain, write_foreign

from eamdeploy.artifacts.card import CARD_KEY, Freezing, ModelCard, Preprocessing
from eamdeploy.artifacts.files import atomic_output, digest_bytes, digest_file, require_output, write_bytes, write_json
from eamdeploy.artifacts.records import Record
from eamdeploy.errors import CheckpointError, ConfigError

HOW = Preprocessing(size=(2, 3), mean=(0.1, 0.2, 0.3), std=(1, 2, 3))


class Point(Record):
    """For tests."""

    x: int
    label: str = "none"


def test_digest_is_sha256_of_all_bytes(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) * 2 + 3)
    (tmp_path / "big").write_bytes(data)
    assert digest_file(tmp_path / "big") == digest_bytes(data) == f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize("name", ["missing", ""], ids=["missing file", "folder"])
def test_digest_of_what_cannot_be_read_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        digest_file(tmp_path / name)


# --- atomic output ---------------------------------------------------------------------------------------------------


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")
    return path


def assert_only_old(target: Path) -> None:
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def test_file_appears_when_the_block_ends_and_not_before(target: Path) -> None:
    with atomic_output(target) as file:
        file.write(b"new " * 9)
        file.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new " * 9
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()], ids=repr)
def test_any_way_out_of_the_block_leaves_the_old_file_and_nothing_else(target: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_output(target) as file:
        file.write(b"half")
        raise error
    assert_only_old(target)


def test_full_disk_is_an_error_with_its_reason_and_changes_nothing(target: Path) -> None:
    with (
        pytest.raises(
            ConfigError, match=r"cannot write \S*out\.bin: No space left on device.*nothing there was changed"
        ),
        atomic_output(target) as file,
    ):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert_only_old(target)


def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_the_file(target: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from eamdeploy.artifacts.files import atomic_output\n"
        "with atomic_output(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for path in (target, target.with_name("[x].bin")):
        killed = subprocess.run([sys.executable, "-c", program, path], check=False)
        assert killed.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"
    mine = target.with_name(f".{target.name}.my_notes_2.partial")  # not named by us
    mine.write_text("mine")
    assert len(list(target.parent.iterdir())) == 4
    write_bytes(target, b"new")
    write_bytes(target.with_name("[x].bin"), b"new")
    assert sorted(target.parent.iterdir()) == sorted([target, target.with_name("[x].bin"), mine])


def test_files_that_are_being_written_are_no_leftovers(target: Path) -> None:
    with atomic_output(target) as first:
        with atomic_output(target) as second:
            second.write(b"second")
        first.write(b"first")
    assert target.read_bytes() == b"first"
    assert list(target.parent.iterdir()) == [target]


def test_a_temporary_file_that_is_taken_for_a_leftover_is_made_anew(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its locking another process may come."""
    made: list[str] = []
    make = tempfile.mkstemp

    def make_and_lose(**how: Any) -> tuple[int, str]:
        descriptor, name = make(**how)
        if not made:
            Path(name).unlink()
        made.append(name)
        return descriptor, name

    monkeypatch.setattr(tempfile, "mkstemp", make_and_lose)
    write_bytes(target, b"new")
    assert len(made) == 2 and target.read_bytes() == b"new"
    assert list(target.parent.iterdir()) == [target]


def test_a_file_system_without_locks_does_too(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    leftover = target.with_name(f".{target.name}.abcdefgh.partial")
    leftover.write_bytes(b"half")
    monkeypatch.setattr(fcntl, "flock", refuse)
    write_bytes(target, b"new")
    assert target.read_bytes() == b"new" and sorted(target.parent.iterdir()) == [leftover, target]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_full_disk_at_the_very_end_changes_nothing(target: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if step == "fsync" else Path, step, fail)
    with pytest.raises(ConfigError, match="No space left"):
        write_bytes(target, b"new")
    assert_only_old(target)


def test_bytes_are_on_the_disk_before_the_rename(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def record(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*arguments: Any) -> Any:
            steps.append(name)
            return call(*arguments)

        return recorded

    monkeypatch.setattr(os, "fsync", record("fsync", os.fsync))
    monkeypatch.setattr(Path, "replace", record("replace", Path.replace))
    write_bytes(target, b"new")
    assert steps == ["fsync", "replace"]


def test_a_new_file_has_the_users_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "new", b"x")
        assert os.umask(0o027) == 0o027, "the mask was changed"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.parametrize("write", [write_bytes, lambda path, _: require_output(path)], ids=["write", "require"])
def test_targets_that_are_no_file_are_refused(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    with pytest.raises(ConfigError, match="expected a file name; got an existing folder"):
        write(tmp_path, b"x")
    with pytest.raises(ConfigError, match=rf"expected an existing folder {tmp_path}/no; got no such folder"):
        write(tmp_path / "no" / "x", b"x")
    os.mkfifo(tmp_path / "pipe")
    for device in (Path(os.devnull), tmp_path / "pipe"):  # a rename would replace the device itself
        with pytest.raises(ConfigError, match="expected a file name; got an existing device"):
            write(device, b"x")
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode) and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_input_is_no_output_under_any_name(target: Path) -> None:
    (target.parent / "link").symlink_to(target)
    require_output(target, target.parent / "missing", target.parent)
    require_output(target.with_name("new"), target)
    for output, source in ((target, target), (target.parent / "link", target), (target, target.parent / "link")):
        with pytest.raises(ConfigError, match="would replace the input"):
            require_output(output, source)


def test_json_is_indented_utf8_with_a_final_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, "é"]})
    assert (tmp_path / "x.json").read_bytes() == '{\n  "a": [\n    1,\n    "é"\n  ]\n}\n'.encode()


# --- records ---------------------------------------------------------------------------------------------------------


def test_record_comes_back_as_it_was(tmp_path: Path) -> None:
    Point(x=3, label="é").write(tmp_path / "p.json")
    assert Point.read(tmp_path / "p.json") == Point(x=3, label="é")
    assert (tmp_path / "p.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"x": "a"}', r"p\.json is not a valid Point: x: Input should be a valid integer"),
        ('{"x": 1, "y": 2}', "y: Extra inputs are not permitted"),
        ('{"label": "a"}', "x: Field required"),
        ("[]", "document: "),
        ('{"x": 1', "document: Invalid JSON"),
        ("", "document: Invalid JSON"),
    ],
)
def test_what_does_not_fit_names_the_file_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as err:
        Point.read(tmp_path / "p.json")
    assert str(tmp_path / "p.json") in str(err.value)


def test_missing_record_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read \S*p\.json: No such file"):
        Point.read(tmp_path / "p.json")


def test_records_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Point(x=1).x = 2


@pytest.mark.parametrize(
    "change",
    [
        {"size": (0, 3)},
        {"std": (1, 0, 1)},
        {"std": (1, -1, 1)},
        {"std": (1, float("nan"), 1)},
        {"mean": (0, float("nan"), 0)},
        {"mean": (float("inf"), 0, 0)},
        {"crop_pct": 0},
        {"crop_pct": 1.1},
        {"interpolation": "magic"},
        {"crop_mode": "border"},
        {"gamma": 1},
    ],
    ids=str,
)
def test_preprocessing_that_cannot_be_done_is_refused(change: dict[str, object]) -> None:
    assert Preprocessing.model_validate(HOW.model_dump()) == HOW
    with pytest.raises(ValueError, match=next(iter(change))):
        Preprocessing.model_validate({**HOW.model_dump(), **change})


def test_card_key_and_card_survive_json() -> None:
    card = ModelCard(timm_model="é", weights="random", num_classes=2, preprocessing=HOW, class_names=["a", "b"])
    assert ModelCard.parse(card.model_dump_json(), "card") == card
    assert CARD_KEY == "eamdeploy"


def test_freezing_of_before_windows_still_parses() -> None:
    freezing = {"bits": 4, "quantizer": "squared", "score": "variance", "sparsity_asked": 0.5, "sparsity": 0.5}
    old = Freezing.model_validate({**freezing, "heads": {"blocks.0.attn": [1]}})
    assert (old.granularity, old.window_maps) == ("head", None)
    for change in ({"window_maps": "mask"}, {"granularity": "cell"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Freezing.model_validate({**old.model_dump(), **change})


@pytest.mark.parametrize("kind", FOREIGN)
def test_file_of_another_kind_in_place_of_a_document_is_named(tmp_path: Path, kind: str) -> None:
    path, words = write_foreign(tmp_path, kind, "x.json")
    with pytest.raises(CheckpointError) as caught:
        Preprocessing.read(path)
    assert_plain(str(caught.value), "x.json is not a valid Preprocessing: ")
    if not kind.startswith(("text", "json")):
        assert_plain(str(caught.value), f"got {words}")
