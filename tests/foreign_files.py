"""Small files of many kinds, that lie where a file of ours is expected; each as its kind begins, or a real one."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper
from safetensors.numpy import save as save_safetensors

ADVICE = ("weights_only", "allow_pickle", "enforce fail", ".cc", ".cpp", ".h:", "miniz", "site-packages", "trusted")
"""Parts of libraries' messages that tell a user nothing, or to run what is in the file."""


def spring(mark: str) -> None:
    Path(mark).write_text("sprung")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return spring, (str(self.mark),)


def zip_of(*names: str) -> bytes:
    """A ZIP archive of short texts."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "text")
    return file.getvalue()


def tar_of(name: str) -> bytes:
    """A tar archive of one empty file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def _numpy(*, archive: bool, objects: bool = False) -> bytes:
    file = io.BytesIO()
    array = np.array([{}], dtype=object) if objects else np.ones(3, np.float32)
    if archive:
        np.savez(file, a=array)
    else:
        np.save(file, array)
    return file.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 22889168\n"
HTML = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"
ONNX = helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString()

# By name: the contents, and what a message must call the file.
FOREIGN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "git-lfs": (LFS, "a Git LFS pointer"),
    "git-annex": (b"/annex/objects/SHA256E-s5--abc\n", "a git-annex pointer"),
    "html": (HTML, "a web page (HTML)"),
    "text": (b"hello\nworld\n", "a text file"),
    "text cut in a character": ("é".encode() * 600 + b"\xc3", "a text file"),
    "json": (b'{"weight_map": {}}', "JSON text"),
    "safetensors": (save_safetensors({"a": np.ones(2, np.float32)}), "a safetensors file"),
    "npy": (_numpy(archive=False), "one array, not an archive of arrays"),
    "npz": (_numpy(archive=True), "a NumPy archive (.npz)"),
    "npz of objects": (_numpy(archive=True, objects=True), "a NumPy archive (.npz)"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file (Keras .h5)"),
    "keras": (zip_of("metadata.json", "config.json", "model.weights.h5"), "a Keras model (.keras)"),
    "core-ml": (zip_of("m.mlpackage/Manifest.json", "m.mlpackage/Data/model.mlmodel"), "a Core ML package"),
    "onnx": (ONNX, "an ONNX model"),
    "tflite": (b"\x1c\0\0\0TFL3" + bytes(64), "a TensorFlow Lite model"),
    "ort": (b"\x14\0\0\0ORTM" + bytes(64), "a model in ONNX Runtime's own format (.ort)"),
    "plan": (b"ftrt" + bytes(64), "a TensorRT engine"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file"),
    "msgpack": (b"\x81\xa6params\x81\xa4head\x81\xa6kernel\xc7\x01\x01\0", "a MessagePack file (Flax .msgpack)"),
    "zip": (zip_of("readme.txt", "weights/model.bin"), "a ZIP archive of other files"),
    "empty zip": (zip_of(), "a ZIP archive of other files"),
    "cut zip": (zip_of("a.npy", "b.npy")[:40], "a ZIP archive that is damaged or was cut off"),
    "tar": (tar_of("weights.pth"), "a tar archive"),
    "gzip": (gzip.compress(tar_of("weights.pth")), "a compressed file (gzip)"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(64), "a compressed file (Zstandard)"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(64), "a 7-Zip archive"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(64), "an image (PNG)"),
    "pdf": (b"%PDF-1.7\n" + bytes(64), "a PDF file"),
    "elf": (b"\x7fELF" + bytes(64), "a program or library (ELF)"),
    "pickle": (pickle.dumps({"a": [1]}, protocol=2), "a pickle"),
}


def write_foreign(folder: Path, kind: str, name: str) -> tuple[Path, str]:
    """A file of that kind under that name, and what a message must call it."""
    content, words = FOREIGN[kind]
    path = folder / name
    path.write_bytes(content)
    return path, words


def assert_plain(message: str, *facts: str) -> None:
    """The message is one line for people with every one of the facts."""
    assert "\n" not in message and len(message) < 700, message
    assert [part for part in ADVICE if part in message] == [], message
    assert [fact for fact in facts if fact not in message] == [], message


assert onnx.load_model_from_string(ONNX).graph.name == "g"
