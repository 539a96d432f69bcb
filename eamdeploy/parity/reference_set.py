"""The reference set: images and logits that travel beside an ONNX model.

With the reference set, the machine that runs an engine can check the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.files import atomic_output
from eamdeploy.artifacts.npz import read_npz
from eamdeploy.artifacts.seal import SEAL, check_seal, seal_of
from eamdeploy.errors import CheckpointError

REFERENCE_IMAGES = 16
"""How many images a model's reference set has, unless its user wants another number."""

_REFERENCE_FORMAT = 2
_REFERENCE_KEYS: Mapping[int, tuple[str, ...]] = MappingProxyType(
    {
        1: ("format", "logits", "pixels", "source"),
        2: (SEAL, "format", "logits", "model_digest", "pixels", "source"),
    }
)
_TEXTS = (SEAL, "model_digest", "source")


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """Images and the logits that every engine of the model must give for them.

    Attributes:
        pixels: uint8 [n, H, W, 3], RGB, resized and cropped, not normalized.
        logits: float32 [n, classes], finite.
        source: where the images come from: "12 images of calibration folder …" or "synthetic".
        model_digest: SHA-256 of the ONNX file that it was written with; None where that is not known.

    Raises:
        CheckpointError: the arrays don't have these types and shapes.
    """

    pixels: NDArray[np.uint8]
    logits: NDArray[np.float32]
    source: str
    model_digest: str | None = None

    def __post_init__(self) -> None:
        _check_arrays(self.pixels, self.logits, "reference set")

    def save(self, path: Path) -> None:
        """`path` holds this set as compressed npz, the same bytes each time, or is unchanged if that fails.

        Raises:
            ConfigError: the file can't be written.
        """
        with atomic_output(path) as file:
            self.write(file)

    def write(self, file: IO[bytes]) -> None:
        """`file` has this set as compressed npz, sealed, the same bytes each time."""
        texts = {"source": self.source, "model_digest": self.model_digest or ""}
        arrays: dict[str, NDArray[Any]] = {"pixels": self.pixels, "logits": self.logits}
        np.savez_compressed(
            file,
            format=np.int64(_REFERENCE_FORMAT),
            pixels=self.pixels,
            logits=self.logits,
            source=self.source,
            model_digest=self.model_digest or "",
            content_digest=seal_of({"format": _REFERENCE_FORMAT, **texts}, arrays),
        )

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> ReferenceSet:
        """The reference set in the file, and if the file has a seal, as it was written; nothing in it is unpickled.

        Args:
            verify: False for a file that was changed on purpose: its seal is not looked at.

        Raises:
            ConfigError: the file can't be opened.
            CheckpointError: it is damaged, foreign, was altered after it was written, or an array is not what `save`
                writes; names the file and key.
        """
        arrays = _read_npz(path)
        pixels, logits = arrays["pixels"], arrays["logits"]
        texts = {key: _text(array, f"{path}: {key}") for key, array in arrays.items() if key in _TEXTS}
        _check_arrays(pixels, logits, str(path))
        if verify and SEAL in texts:
            seal = seal_of({**texts, "format": int(arrays["format"])}, {"pixels": pixels, "logits": logits})
            hint = "Copy or export it again; or, if you changed it on purpose, use --no-verify."
            check_seal(texts[SEAL], seal, str(path), hint)
        return cls(pixels, logits, texts["source"], texts.get("model_digest") or None)

    def require_model(self, model: Path, digest: str) -> None:
        """The set was written with the ONNX file `model`, as far as that is known.

        Args:
            digest: SHA-256 of the file.

        Raises:
            CheckpointError: it was not.
        """
        if self.model_digest not in (None, digest):
            raise CheckpointError(
                f"{model} is not the file that its reference set was written with",
                expected=self.model_digest,
                got=digest,
                hint="It was damaged or altered, or the set is another model's: copy both again, or export again."
                " If you changed the model on purpose, use --no-verify, or move the set elsewhere.",
            )


def reference_path(model: Path) -> Path:
    """Where the reference set of an ONNX model lies: `eam.reference.npz` beside `eam.onnx`."""
    return model.with_suffix(".reference.npz")


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a reference file of our format, by key."""
    hint = "Export the model again to make a new reference set."
    arrays = read_npz(path, "reference set", hint)
    keys = tuple(sorted(arrays))
    if keys not in _REFERENCE_KEYS.values():
        raise CheckpointError(
            f"{path} is not a reference set: its keys don't fit",
            expected=_REFERENCE_KEYS[_REFERENCE_FORMAT],
            got=keys,
            hint=hint,
        )
    number = next(number for number, known in _REFERENCE_KEYS.items() if known == keys)
    if arrays["format"].shape != () or arrays["format"].dtype.kind not in "iu" or arrays["format"] != number:
        raise CheckpointError(f"{path} has another format", expected=number, got=arrays["format"], hint=hint)
    return arrays


def _text(array: NDArray[Any], where: str) -> str:
    if array.ndim != 0 or array.dtype.kind != "U":
        raise _misfit(where, "one text", array)
    codec = {"<": "utf-32-le", ">": "utf-32-be"}[array.dtype.str[0]]
    try:  # numpy's own conversion ends in a SystemError where a number stands for no character
        return array.tobytes().decode(codec).rstrip("\0")
    except ValueError as err:
        raise CheckpointError(where, expected="one text", got=str(err)) from err


def _check_arrays(pixels: NDArray[Any], logits: NDArray[Any], where: str) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.size == 0:
        raise _misfit(f"{where}: pixels", "uint8 [images, height, width, 3]", pixels)
    if logits.dtype != np.float32 or logits.ndim != 2 or logits.size == 0:
        raise _misfit(f"{where}: logits", "float32 [images, classes]", logits)
    if len(logits) != len(pixels):
        raise _misfit(f"{where}: logits", f"{len(pixels)} rows, one for each image", logits)
    if not np.isfinite(logits).all():
        raise CheckpointError(f"{where}: logits has NaN or infinity", expected="finite values")


def _misfit(where: str, expected: str, array: NDArray[Any]) -> CheckpointError:
    return CheckpointError(where, expected=expected, got=f"{array.dtype} {list(array.shape)}")
