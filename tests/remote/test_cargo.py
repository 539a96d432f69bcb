from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import onnx
import pytest
from engine_models import make_frozen_model
from split_models import split, three_files

from eamdeploy.artifacts.files import digest_file
from eamdeploy.artifacts.onnx_files import digest_model
from eamdeploy.engines.manifest import manifest_path
from eamdeploy.errors import ConfigError
from eamdeploy.remote.cargo import pack_cargo


def test_the_archive_holds_every_file_and_is_as_long_as_it_says(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "x.onnx", tmp_path / "b" / "x.onnx", tmp_path / f"{'long ü' * 30}.onnx"]
    for size, path in zip((0, 70_000, 512), paths, strict=True):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * size)
    cargo = pack_cargo(paths)
    data = b"".join(cargo.archive())
    assert len(data) == cargo.archive_bytes
    assert cargo.engine_bytes == 70_512
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {info.name: info for info in archive if info.isfile()}
        assert list(files) == ["0/x.onnx", "1/x.onnx", f"2/{paths[2].name}"]
        for info, path in zip(files.values(), paths, strict=True):
            content = archive.extractfile(info)
            assert content is not None and content.read() == path.read_bytes()


def test_a_model_takes_the_files_along_that_its_data_is_in(tmp_path: Path) -> None:
    one = tmp_path / "one" / "x.onnx"
    one.parent.mkdir()
    onnx.save(make_frozen_model().to_onnx(), one)
    path = split(onnx.load(one), tmp_path / "x.onnx", three_files, at_least=10)
    cargo = pack_cargo([one, path])
    names = ["0/x.onnx", "1/x.onnx", "1/a.bin", "1/sub/b.bin", "1/sub/deeper/c.bin"]
    assert [file.name for file in cargo.files] == names
    assert cargo.engine_bytes == sum(file.size_bytes for file in cargo.files)
    assert cargo.digests == (digest_file(one), digest_model(path)) and len(cargo.engines) == 2
    data = b"".join(cargo.archive())
    assert len(data) == cargo.archive_bytes
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        folders = [info.name for info in archive if info.isdir()]
        assert folders == ["0", "1", "1/sub", "1/sub/deeper"]
        assert {archive.getmember(name).mode for name in folders} == {0o700}
        archive.extractall(tmp_path / "there", filter="data")
    assert digest_model(tmp_path / "there" / "1" / "x.onnx") == digest_model(path)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ConfigError, match=r"x\.onnx keeps its weights in a\.bin, which is not beside it"):
        pack_cargo([one, path])


def test_the_reference_set_that_an_engine_was_proved_with_travels_along(eam_engine: Path, tmp_path: Path) -> None:
    for file in (eam_engine, manifest_path(eam_engine)):
        shutil.copy(file, tmp_path)
    engine = tmp_path / eam_engine.name
    assert [file.name for file in pack_cargo([engine]).files] == ["0/tiny.ort.onnx", "0/tiny.ort.onnx.json"]
    (tmp_path / "tiny.reference.npz").write_bytes(b"images and logits")
    cargo = pack_cargo([engine, engine])
    assert [file.name for file in cargo.files if "reference" in file.name] == [
        "0/tiny.reference.npz",
        "1/tiny.reference.npz",
    ]
    assert len(b"".join(cargo.archive())) == cargo.archive_bytes


def test_a_file_that_shrinks_or_goes_while_it_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(bytes(1000))
    cargo = pack_cargo([path])
    path.write_bytes(bytes(10))
    with pytest.raises(ConfigError, match="became shorter"):
        list(cargo.archive())
    path.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*x\.onnx"):
        list(cargo.archive())
