"""Engines with their manifests as one tar archive, for a board to unpack."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from eamdeploy.artifacts.files import is_file, read_chunks
from eamdeploy.artifacts.onnx_files import digest_model, model_files
from eamdeploy.engines.manifest import manifest_path, read_manifest
from eamdeploy.engines.registry import backend_of
from eamdeploy.errors import ConfigError

_BLOCK_BYTES = 512


@dataclass(frozen=True)
class CargoFile:
    """A file to be sent.

    Attributes:
        name: its path in the archive: the number of its engine, and its own name.
    """

    path: Path
    name: str
    size_bytes: int


@dataclass(frozen=True)
class Cargo:
    """What is sent to a board.

    Attributes:
        engines: in the order in which they were given; `digests` are theirs.
        engine_bytes: theirs, and those of the files that a model keeps its data in.
        files: engines, such files, manifests, and the reference sets that engines were proved with, where they lie
            beside them.
    """

    engines: tuple[CargoFile, ...]
    digests: tuple[str, ...]
    engine_bytes: int
    files: tuple[CargoFile, ...]

    @property
    def archive_bytes(self) -> int:
        blocks = sum(len(_header(file)) + _padded(file.size_bytes) for file in self.files)
        return blocks + len(_folders(self.files)) + 2 * _BLOCK_BYTES

    def archive(self) -> Iterator[bytes]:
        """The archive's bytes, `archive_bytes` altogether.

        Raises:
            ConfigError: a file can't be read any more, or is shorter now.
        """
        yield _folders(self.files)
        for file in self.files:
            yield _header(file)
            yield from read_chunks(file.path, file.size_bytes, doing="sent")
            yield bytes(_padded(file.size_bytes) - file.size_bytes)
        yield bytes(2 * _BLOCK_BYTES)


def pack_cargo(engines: Sequence[Path]) -> Cargo:
    """The engines with what lies beside them, each in a numbered folder of its own, as two may have one name.

    Raises:
        ConfigError: one can't be read, or is none by its name.
        CheckpointError, EngineError: its manifest is damaged or describes another file, or a file with its data is
            too short or not in its folder.
    """
    packed: list[CargoFile] = []
    files: list[CargoFile] = []
    engine_bytes = 0
    for index, path in enumerate(engines):
        backend_of(path)
        if not is_file(path):
            raise ConfigError(f"cannot read {path}", expected="an engine file", got="no such file")
        parts = [_file(file, path.parent, index) for file in model_files(path)]
        packed.append(parts[0])
        files += parts
        engine_bytes += sum(part.size_bytes for part in parts)
        if (manifest := read_manifest(path)) is not None:
            files.append(_file(manifest_path(path), path.parent, index))
            if manifest.reference is not None and is_file(reference := path.with_name(manifest.reference.name)):
                files.append(_file(reference, path.parent, index))
    digests = tuple(digest_model(file.path) for file in packed)
    return Cargo(tuple(packed), digests, engine_bytes, tuple(files))


def _file(path: Path, folder: Path, index: int) -> CargoFile:
    return CargoFile(path, f"{index}/{path.relative_to(folder).as_posix()}", path.stat().st_size)


def _header(file: CargoFile) -> bytes:
    info = tarfile.TarInfo(file.name)
    info.size, info.mode = file.size_bytes, 0o600
    return info.tobuf(tarfile.GNU_FORMAT)  # small systems' tar does not know the newer format


def _folders(files: Sequence[CargoFile]) -> bytes:
    headers = []
    above = (str(folder) for file in files for folder in list(PurePosixPath(file.name).parents)[-2::-1])
    for name in dict.fromkeys(above):
        info = tarfile.TarInfo(name)
        info.type, info.mode = tarfile.DIRTYPE, 0o700
        headers.append(info.tobuf(tarfile.GNU_FORMAT))
    return b"".join(headers)


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
