"""What the campaign of hurt inputs found, each in its smallest form."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from command_line import RunCli, only_error
from engine_models import make_frozen_model
from onnx import numpy_helper

from eamdeploy.convert.ort_form import OrtForm
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import CheckpointError, EamDeployError, EngineError
from eamdeploy.host.maps_file import read_maps
from eamdeploy.stages.build_ort import build_ort
from eamdeploy.stages.build_trt import plan_trt_build


@pytest.mark.parametrize("label", ["9" * 5000, "-" + "1" * 4301, "9" * 19])
def test_label_of_thousands_of_digits(
    run_cli: RunCli, eam_engine: Path, pictures: Path, tmp_path: Path, label: str
) -> None:
    """Python refuses to make a number of it."""
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    rows = [f"{file.name},{label if index == 2 else 1}" for index, file in enumerate(sorted(pictures.iterdir()))]
    (data / "labels.csv").write_text("\n".join(["file,label", *rows]))
    assert "002.png" in only_error(run_cli("evaluate", eam_engine, "--data", data), 2)


def png_header(width: int, height: int) -> bytes:
    """A picture in 8-bit RGBA of which only the beginning is there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, body))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.filterwarnings("ignore:Image size")
def test_picture_that_would_take_more_than_a_gigabyte(
    run_cli: RunCli, eam_engine: Path, pictures: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "huge.png").write_bytes(png_header(12_000, 12_000))
    line = only_error(run_cli("evaluate", eam_engine, "--data", data), 2)
    assert "huge.png: 12000 × 12000 are more than 120000000 pixels. Leave such images out with --skip-bad" in line
    assert run_cli("evaluate", eam_engine, "--data", data, "--skip-bad").code == 0


def other_width(model: onnx.ModelProto) -> None:
    """The classifier's weights don't fit what comes into it."""
    (head,) = (item for item in model.graph.initializer if item.name == "head")
    head.CopyFrom(numpy_helper.from_array(np.zeros((3, 5), np.float32), "head"))


def other_attribute(model: onnx.ModelProto) -> None:
    """An axis is a text."""
    (node,) = (node for node in model.graph.node if node.op_type == "DequantizeLinear")
    node.attribute[0].CopyFrom(onnx.helper.make_attribute("axis", "x"))


def short_weights(model: onnx.ModelProto) -> None:
    (head,) = (item for item in model.graph.initializer if item.name == "head")
    head.raw_data = head.raw_data[:-4]


def no_such_operator(model: onnx.ModelProto) -> None:
    model.graph.node[-1].op_type = "NoSuch"


@pytest.mark.parametrize("hurt", [other_width, other_attribute, short_weights, no_such_operator])
def test_model_that_contradicts_itself_is_no_model_to_convert(
    hurt: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    """ONNX's shape inference, graphsurgeon and the quantizer each end in errors of their own."""
    proto = make_frozen_model().to_onnx()
    hurt(proto)
    model = tmp_path / "x.onnx"
    model.write_bytes(proto.SerializeToString())
    with pytest.raises(EngineError, match=r"x\.onnx: it is damaged or no valid ONNX model"):
        build_ort(model, tmp_path / "y.ort.onnx", threads=1, check=False, forms=[OrtForm(int8="dynamic")])
    with pytest.raises(EngineError, match=r"x\.onnx: it is damaged or no valid ONNX model"):
        plan_trt_build(model, TrtOptions(), TrtVersion.parse("10.3"))


def test_archive_that_zipfile_quotes_as_a_whole(tmp_path: Path) -> None:
    """The length of a member's name says that it goes on to the end of the file."""
    path = tmp_path / "maps.npz"
    arrays: dict[str, Any] = {"blocks.0.attn.maps": np.zeros((4, 50, 50))}
    np.savez(path, **arrays)
    data = bytearray(path.read_bytes())
    data[26:28] = b"\xff\x7f"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"maps\.npz is damaged or no \.npz file") as caught:
        read_maps(path, 4, "squared")
    assert len(str(caught.value)) < 1500


LONG = "a" * 300  # no file system takes it, and Python's own `Path.exists` raises an error for it


@pytest.mark.parametrize(
    "words",
    [
        ["build-ort", "MODEL", "-o", f"{LONG}.onnx"],
        ["build-ort", f"{LONG}.onnx", "-o", "x.onnx"],
        ["build-ort", "MODEL", "-o", "x.onnx", "--reference", LONG],
        ["profile", f"{LONG}.onnx"],
        ["inspect", f"{LONG}.onnx"],
        ["evaluate", "MODEL", "--data", LONG],
        ["report", "x.json", "-o", f"{LONG}.html"],
        ["export", "x.eam.safetensors", "-o", f"{LONG}.onnx"],
        ["run", f"{LONG}.toml"],
    ],
    ids=lambda words: " ".join(words).replace(LONG, "LONG"),
)
def test_name_that_is_too_long(run_cli: RunCli, eam_model: Path, tmp_path: Path, words: list[str]) -> None:
    given = [str(tmp_path / word) if "." in word or word == LONG else word for word in words]
    line = only_error(run_cli(*(str(eam_model) if word == "MODEL" else word for word in given)), 2)
    assert "aaaaaaaa" in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [LONG, "a" * 100_000, "../" + "a" * 100_000], ids=["300", "100,000", "elsewhere"])
def test_model_whose_data_file_has_a_name_that_is_too_long(
    run_cli: RunCli, eam_model: Path, tmp_path: Path, name: str
) -> None:
    model = onnx.load(eam_model)
    onnx.save_model(model, tmp_path / "x.onnx", save_as_external_data=True, location="x.onnx.data", size_threshold=0)
    hurt = onnx.load(tmp_path / "x.onnx", load_external_data=False)
    for tensor in hurt.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    (tmp_path / "x.onnx").write_bytes(hurt.SerializeToString())
    line = only_error(run_cli("inspect", tmp_path / "x.onnx"), 2)
    assert "keeps its weights" in line and "aaaaaaa" in line and len(line) < 2000


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_cannot_be_quantized(value: float, tmp_path: Path) -> None:
    """ONNX Runtime's quantizer ends in an assertion of its own."""
    proto = make_frozen_model().to_onnx()
    multiplied = {name for node in proto.graph.node if node.op_type == "MatMul" for name in node.input}
    for item in proto.graph.initializer:
        if item.name in multiplied and len(item.dims) == 2:
            item.CopyFrom(numpy_helper.from_array(np.full(tuple(item.dims), value, np.float32), item.name))
    model = tmp_path / "x.onnx"
    model.write_bytes(proto.SerializeToString())
    with pytest.raises(EamDeployError, match=r"x\.onnx"):
        build_ort(model, tmp_path / "y.ort.onnx", threads=1, check=False, forms=[OrtForm(int8="dynamic")])
    assert not (tmp_path / "y.ort.onnx").exists()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "BF16"])
def test_maps_of_a_type_that_numpy_does_not_have(dtype: str, tmp_path: Path) -> None:
    size = 2 if dtype == "BF16" else 1
    header = json.dumps({"blocks.0.attn.maps": {"dtype": dtype, "shape": [1, 2, 2], "data_offsets": [0, 4 * size]}})
    path = tmp_path / "maps.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(4 * size))
    with pytest.raises(CheckpointError, match=r"maps\.safetensors"):
        read_maps(path, 4, "squared")
