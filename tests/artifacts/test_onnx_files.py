"""Models with their data in other files: which files, their size and digest, read as one, and written as one or two."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from engine_models import make_frozen_model
from onnx import numpy_helper
from split_models import LAYOUTS, Place, constants, data_files, one_file, split, three_files

from eamdeploy.artifacts import onnx_files
from eamdeploy.artifacts.files import digest_file
from eamdeploy.artifacts.onnx_files import ModelData, data_path, digest_model, model_bytes, model_files, read_model
from eamdeploy.artifacts.onnx_output import Staging, move_model, require_model_output, staging, write_model
from eamdeploy.errors import CheckpointError, ConfigError

MODEL = make_frozen_model().to_onnx()
DAMAGED: tuple[bytes, ...] = (b"", b"no model", bytes(1000), MODEL.SerializeToString()[:-100])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return split(MODEL, tmp_path / "x.onnx")


@pytest.fixture
def two_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of more than 600 bytes are written as two files, with tensors of at least 100 in the second."""
    monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", 600)
    monkeypatch.setattr(onnx_files, "OUTSIDE_BYTES", 100)


def values(model: onnx.ModelProto) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What every constant holds."""
    arrays = ((item.name, numpy_helper.to_array(item)) for item in constants(model))
    return {name: (str(array.dtype), array.shape, array.tobytes()) for name, array in arrays}


def edit_entry(path: Path, key: str, value: str | None) -> None:
    """The first tensor outside has that entry, or none of that key."""
    model = onnx.load(path, load_external_data=False)
    tensor = next(item for item in constants(model) if item.external_data)
    kept = [(entry.key, entry.value) for entry in tensor.external_data if entry.key != key]
    del tensor.external_data[:]
    for name, text in [*kept, *([] if value is None else [(key, value)])]:
        tensor.external_data.add(key=name, value=text)
    path.write_bytes(model.SerializeToString())


# --- which, how large, what digest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_model_of_several_files(place: Place, tmp_path: Path) -> None:
    path = split(MODEL, tmp_path / "x.onnx", place, gap=3)
    files = [path, *data_files(path)]
    assert model_files(path) == tuple(files)
    assert model_bytes(path) == sum(len(file.read_bytes()) for file in files)
    lines = "\n".join(f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files)
    assert digest_model(path) == f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def test_every_byte_of_every_file_counts(tmp_path: Path) -> None:
    path = split(MODEL, tmp_path / "x.onnx", three_files)
    digest = digest_model(path)
    for file in data_files(path):
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert digest_model(path) != digest
        file.write_bytes(data)
    assert digest_model(path) == digest


@pytest.mark.parametrize("suffix", [".onnx", ".plan", ".json", ".npz", ""])
@pytest.mark.parametrize("data", [MODEL.SerializeToString(), *DAMAGED], ids=["model", "empty", "text", "zeros", "cut"])
def test_anything_else_is_one_file_with_its_own_digest(data: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data)
    assert model_files(path) == (path,) and model_bytes(path) == len(data)
    assert digest_model(path) == digest_file(path) == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert read_model(path) == ModelData(data)
    assert (ModelData(data).digest_at(path), ModelData(data).bytes_at(path)) == (digest_file(path), len(data))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for function in (model_files, model_bytes, digest_model, read_model):
        with pytest.raises(ConfigError, match=r"cannot read .*x\.onnx: No such file"):
            function(tmp_path / "x.onnx")


READERS: list[Callable[[Path], object]] = [model_files, model_bytes, digest_model, read_model]
each_reader = pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)


@each_reader
def test_data_that_is_missing(read: Callable[[Path], object], tmp_path: Path) -> None:
    path = split(MODEL, tmp_path / "x.onnx", three_files)
    (tmp_path / "sub" / "b.bin").unlink()
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} keeps its weights in sub/b.bin, which is not beside it")
    assert "Copy sub/b.bin together with x.onnx." in str(caught.value)


@each_reader
@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "no lengths"])
def test_data_that_is_too_short(read: Callable[[Path], object], lengths: bool, tmp_path: Path) -> None:
    path = split(MODEL, tmp_path / "x.onnx", lengths=lengths)
    (file,) = data_files(path)
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 1)
    with pytest.raises(
        CheckpointError, match=rf"weights\.bin is too short .*at least {size:,} bytes; got {size - 1:,}"
    ):
        read(path)


@each_reader
@pytest.mark.parametrize(
    "location",
    [
        *("/etc/passwd", "//host/w.bin", "../w.bin", "sub/../../w.bin", "sub/../weights.bin", "..", "", "."),
        *("w\0.bin", "..\\w.bin", "C:\\w.bin", "C:w.bin", "\\\\host\\w.bin", "\\w.bin"),
    ],
)
def test_data_outside_the_folder(read: Callable[[Path], object], location: str, path: Path) -> None:
    (path.parent / "sub").mkdir()
    (path.parent.parent / "w.bin").write_bytes(bytes(1 << 16))
    edit_entry(path, "location", location)
    with pytest.raises(CheckpointError, match=r"x\.onnx keeps its weights where a model may not; expected a file in"):
        read(path)


@each_reader
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_out_of_the_folder(read: Callable[[Path], object], kind: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = split(MODEL, tmp_path / "model" / "x.onnx", lambda *_: "sub/w.bin")
    if kind == "file":
        (path.parent / "sub" / "w.bin").rename(tmp_path / "w.bin")
        (path.parent / "sub" / "w.bin").symlink_to(tmp_path / "w.bin")
    else:
        (path.parent / "sub").rename(tmp_path / "elsewhere")
        (path.parent / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"may not; .*got sub/w\.bin, a link to .*w\.bin"):
        read(path)


def test_links_inside_the_folder_and_a_folder_that_is_a_link(path: Path) -> None:
    link = path.parent.with_name("link")
    link.symlink_to(path.parent)
    (path.parent / "weights.bin").rename(path.parent / "real.bin")
    (path.parent / "weights.bin").symlink_to("real.bin")
    assert values(onnx.load_model_from_string(read_model(link / "x.onnx").model)) == values(MODEL)


@each_reader
def test_data_that_is_no_file(read: Callable[[Path], object], path: Path) -> None:
    (path.parent / "weights.bin").unlink()
    (path.parent / "weights.bin").mkdir()
    with pytest.raises(ConfigError, match=r"keeps its weights in weights\.bin, which is no file"):
        read(path)


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("value", ["-1", "1_0", " 1", "ten", "", "1e3", "٣", "9" * 30])
def test_numbers_that_are_none(key: str, value: str, path: Path) -> None:
    edit_entry(path, key, value)
    with pytest.raises(CheckpointError, match=f"says wrongly where it keeps tensor .*a number as its {key}"):
        model_files(path)


@each_reader
@pytest.mark.parametrize("more", [-4, 4])
def test_a_length_that_is_not_the_shapes(read: Callable[[Path], object], more: int, path: Path) -> None:
    tensor = next(item for item in onnx.load(path, load_external_data=False).graph.initializer if item.external_data)
    length = next(int(entry.value) for entry in tensor.external_data if entry.key == "length")
    edit_entry(path, "length", str(length + more))
    with pytest.raises(CheckpointError, match=rf"contradicts itself about tensor {tensor.name}, which is in weights"):
        read(path)


# --- read as one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "no lengths"])
@pytest.mark.parametrize("gap", [0, 5])
@pytest.mark.parametrize("place", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_it_is_the_model_of_one_file(place: Place, gap: int, lengths: bool, tmp_path: Path) -> None:
    path = split(MODEL, tmp_path / "x.onnx", place, gap=gap, lengths=lengths)
    read = read_model(path)
    assert read.is_one_file
    model = onnx.load_model_from_string(read.model)
    assert values(model) == values(MODEL)
    assert not any(item.external_data or item.HasField("data_location") for item in constants(model))
    assert model == MODEL
    if lengths:  # without them, onnx reads on to the file's end, and ONNX Runtime as much as the shape says
        stock = onnx.load(path)
        for item in constants(stock):
            item.ClearField("data_location")
        assert model == stock


def test_what_onnx_saves_is_read(tmp_path: Path) -> None:
    for name, all_in_one in (("one", True), ("many", False)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "x.onnx"
        copy = onnx.ModelProto.FromString(MODEL.SerializeToString())
        onnx.save(copy, path, save_as_external_data=True, all_tensors_to_one_file=all_in_one, size_threshold=64)
        assert (len(model_files(path)) == 2) is all_in_one
        assert values(onnx.load_model_from_string(read_model(path).model)) == values(MODEL)


# --- one file or two --------------------------------------------------------------------------------------------------


def test_up_to_the_limit_it_is_one_file_and_above_two(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = data_files(path)
    both = path.stat().st_size + file.stat().st_size
    monkeypatch.setattr(onnx_files, "OUTSIDE_BYTES", 100)
    for limit, one in ((both, True), (both - 1, False)):
        monkeypatch.setattr(onnx_files, "ONE_FILE_BYTES", limit)
        assert read_model(path).is_one_file is one


@pytest.mark.parametrize("place", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_two_files_that_onnx_and_we_read(place: Place, two_files: None, tmp_path: Path) -> None:
    path = split(MODEL, tmp_path / "x.onnx", place, gap=7)
    read = read_model(path)
    assert not read.is_one_file and len(read.model) < 4000 < read.bytes_at(path)
    output = tmp_path / "there" / "y.onnx"
    output.parent.mkdir()
    write_model(output, read)
    assert sorted(file.name for file in output.parent.iterdir()) == ["y.onnx", "y.onnx.data"]
    assert model_files(output) == (output, data_path(output))
    stock = onnx.load(output)
    assert values(stock) == values(MODEL)
    assert digest_model(output) == read.digest_at(output)
    assert model_bytes(output) == read.bytes_at(output)
    written = onnx.load(output, load_external_data=False)
    offsets = [int(e.value) for item in written.graph.initializer for e in item.external_data if e.key == "offset"]
    assert offsets and all(offset % 4096 == 0 for offset in offsets)
    again = read_model(output)
    assert {offset: again.tensor_data(offset) for offset in again.data} == {
        offset: read.tensor_data(offset) for offset in read.data
    }


def test_data_that_tensors_share_is_written_once(two_files: None, tmp_path: Path) -> None:
    model = onnx.ModelProto.FromString(MODEL.SerializeToString())
    twin = model.graph.initializer.add()
    twin.CopyFrom(next(item for item in model.graph.initializer if item.name == "patch"))
    twin.name = "twin"
    path = split(model, tmp_path / "x.onnx")
    loaded = onnx.load(path, load_external_data=False)
    tensors = {item.name: item for item in loaded.graph.initializer}
    del tensors["twin"].external_data[:]
    tensors["twin"].external_data.extend(tensors["patch"].external_data)
    path.write_bytes(loaded.SerializeToString())
    write_model(tmp_path / "y.onnx", read_model(path))
    assert data_path(tmp_path / "y.onnx").stat().st_size < path.with_name("weights.bin").stat().st_size + 2 * 4096
    assert values(onnx.load(tmp_path / "y.onnx"))["twin"] == values(MODEL)["patch"]
    assert len(read_model(path).data) == 2


@pytest.mark.parametrize("failing", [1, 2], ids=["the first", "the second"])
def test_both_files_or_none(two_files: None, path: Path, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    output = path.with_name("y.onnx")
    output.write_bytes(b"before")
    data_path(output).write_bytes(b"data before")
    read, real, left = read_model(path), os.fsync, [0] * failing
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def full(descriptor: int) -> None:
        left.pop()
        if not left:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_model(output, read)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


def test_staged_files_are_gone_or_moved(two_files: None, path: Path) -> None:
    output = path.with_name("y.onnx")
    read, before = read_model(path), sorted(path.parent.iterdir())
    with staging(output) as stage:
        assert stage.source(ModelData(b"one")) == b"one"
        assert sorted(path.parent.iterdir()) == before, "one file touches no disk"
        first, second = stage.source(read), stage.source(read)
        assert isinstance(first, Path) and isinstance(second, Path) and first != second
        assert digest_model(first) == digest_model(second) == read.digest_at(output)
        move_model(second, output)
    assert sorted(path.parent.iterdir()) == sorted([*before, output, data_path(output)])
    assert values(onnx.load(output)) == values(MODEL)
    with pytest.raises(RuntimeError), staging(output) as stage:
        stage.source(read)
        raise RuntimeError
    assert sorted(path.parent.iterdir()) == sorted([*before, output, data_path(output)])


def test_a_folder_that_is_not_there_can_not_be_staged_in(two_files: None, path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write beside"):
        Staging(path.parent / "absent" / "y.onnx").source(read_model(path))


def test_an_output_replaces_no_file_of_its_model(tmp_path: Path) -> None:
    path = split(MODEL, tmp_path / "x.onnx", lambda number, _: ("y.onnx", "z.onnx.data")[number % 2])
    require_model_output(tmp_path / "w.onnx", path)
    for output, replaced in (("x.onnx", "x.onnx"), ("y.onnx", "y.onnx"), ("z.onnx", "z.onnx.data")):
        with pytest.raises(ConfigError, match=rf"{replaced} would replace the input .*{replaced}"):
            require_model_output(tmp_path / output, path)


def test_a_file_that_shrinks_while_it_is_written(two_files: None, path: Path) -> None:
    read = read_model(path)
    (file,) = data_files(path)
    file.write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"weights\.bin became shorter"):
        write_model(path.with_name("y.onnx"), read)
    assert not path.with_name("y.onnx").exists() and not path.with_name("y.onnx.data").exists()


def test_a_huge_model_is_looked_at_without_reading_it(tmp_path: Path) -> None:
    """64 GB of data that take no room on the disk."""
    path = tmp_path / "x.onnx"
    tensor = onnx.TensorProto(
        name="w", data_type=onnx.TensorProto.FLOAT, dims=[1 << 34], data_location=onnx.TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value="w.bin")
    model = onnx.ModelProto.FromString(MODEL.SerializeToString())
    model.graph.initializer.append(tensor)
    path.write_bytes(model.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as stream:
        stream.truncate(1 << 36)
    assert model_bytes(path) == (1 << 36) + path.stat().st_size
    read = read_model(path)
    assert not read.is_one_file and read.data_bytes == 1 << 36 and len(read.model) < 1 << 16


def test_the_tests_model_has_something_to_split(path: Path) -> None:
    assert [file.name for file in data_files(path)] == ["weights.bin"] and one_file(0, onnx.TensorProto())
    assert np.prod(make_frozen_model().patch.shape) * 4 > 1024
