"""Ranges of a model's activations over calibration images, for INT8; kept in a file and measured only once.

The ranges are those of ONNX Runtime's own calibrators, fed a few images at a time, as they hold every tensor of what
they are given in memory.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.files import digest_bytes, is_there
from eamdeploy.artifacts.onnx_output import write_model
from eamdeploy.artifacts.records import Record
from eamdeploy.devices.provenance import package_versions
from eamdeploy.errors import CheckpointError, ConfigError, EngineError
from eamdeploy.images.folder import ImageFolder, folder_digest
from eamdeploy.images.preprocess import network_input
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import Observer
from eamdeploy.vocabulary import CalibrationMethod, Split

if TYPE_CHECKING:
    import onnx


CALIBRATION_IMAGES = 64
"""At most that many, unless another number is asked for."""

_AT_ONCE = 4  # images whose tensors are in memory together: about 50 MB each for DeiT-Tiny
_PERCENTILE = 99.999
_UINT8 = 2  # of onnx.TensorProto.DataType


@dataclass(frozen=True)
class Calibration:
    """Which images, and how ranges follow from them.

    Attributes:
        method: `percentile` leaves out the largest 0.001 % of values, `minmax` nothing; `entropy` loses least
            information by the KL divergence of histograms.
        cache: file that keeps the ranges; None for none.
    """

    images: ImageSource
    method: CalibrationMethod = "percentile"
    cache: Path | None = None


def calibration_with(
    folder: Path | None,
    limit: int,
    split: Split,
    method: CalibrationMethod,
    cache: Path | None,
    *,
    skip_bad: bool,
    exif_transpose: bool,
) -> Calibration | None:
    """Calibration with a folder's images, as the command line's options say it; None without a folder."""
    if folder is None:
        return None
    return Calibration(ImageSource(folder, split, limit, skip_bad, exif_transpose), method, cache)


class ActivationRanges(Record):
    """Ranges of tensors, and what they depend on.

    Attributes:
        key: digest of the model, the images, their preprocessing, the method and ONNX Runtime's version.
        images: how many; `source`: their folder's name.
        ranges: smallest and largest value by tensor.
    """

    format: Literal[1] = 1
    key: str
    method: CalibrationMethod
    images: int
    source: str
    ranges: dict[str, tuple[float, float]]

    @property
    def in_words(self) -> str:
        return f"{self.method} of {self.images} images of {self.source}"


def measure_ranges(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    how: Preprocessing,
    calibration: Calibration,
    observer: Observer,
) -> ActivationRanges:
    """Ranges of the float32 `tensors` of `model`; from the cache if it has those of the same model and images.

    Raises:
        ConfigError: there are no images, one can't be decoded, or the cache can't be written.
        EngineError: ONNX Runtime can't run the model, or a tensor has values that are not finite.
    """
    folder = calibration.images.open(observer)
    key = _key(model, folder, how, calibration.method)
    known = _cached(calibration.cache, key)
    if known is not None and set(tensors) <= known.ranges.keys():
        observer.note(f"INT8: ranges of {known.in_words} are taken from {calibration.cache}")
        return known
    measured = _measure(model, folder, how, calibration, observer)
    missing = [name for name in tensors if name not in measured or not np.isfinite(measured[name]).all()]
    if missing:
        raise EngineError(
            f"calibration gave no range of {len(missing)} tensors, the first {missing[0]}",
            expected="finite values",
            got=measured.get(missing[0], "nothing"),
        )
    result = ActivationRanges(
        key=key,
        method=calibration.method,
        images=len(folder.files),
        source=folder.root.name,
        ranges={name: measured[name] for name in tensors},
    )
    if calibration.cache is not None:
        result.write(calibration.cache)
    return result


def _key(model: onnx.ModelProto, folder: ImageFolder, how: Preprocessing, method: CalibrationMethod) -> str:
    from eamdeploy.graph.weights import serialize

    parts = (
        serialize(model).digest_at(Path("model.onnx")),
        folder_digest(folder),
        how.model_dump_json(),
        method,
        package_versions().get("onnxruntime", ""),
    )
    return digest_bytes("\n".join(parts).encode())


def _cached(cache: Path | None, key: str) -> ActivationRanges | None:
    """The ranges in the file, if they are these; a file that is something else is not overwritten silently.

    Raises:
        ConfigError: the file is no cache of ranges.
    """
    if cache is None or not is_there(cache):
        return None
    try:
        found = ActivationRanges.read(cache)
    except CheckpointError as err:
        raise ConfigError(f"{cache} is no file of activation ranges", hint="Name another, or delete it.") from err
    return found if found.key == key else None


def _measure(
    model: onnx.ModelProto, folder: ImageFolder, how: Preprocessing, calibration: Calibration, observer: Observer
) -> Mapping[str, tuple[float, float]]:
    from eamdeploy.convert.ort_tools import TOOL_FAILURES, import_tool
    from eamdeploy.engines.ort.runner import ORT_FAILURES
    from eamdeploy.graph.weights import fits_one_file, serialize

    calibrate = import_tool("quantization.calibrate")
    known = calibrate.CalibrationMethod
    methods = {
        "percentile": (known.Percentile, {"percentile": _PERCENTILE}),
        "minmax": (known.MinMax, {}),
        "entropy": (known.Entropy, {}),
    }
    method, options = methods[calibration.method]
    taken = model.graph.input[0].type.tensor_type
    fixed = taken.shape.dim[0].dim_value
    at_once = fixed or _AT_ONCE
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):  # it prints
        path = Path(scratch) / "model.onnx"
        write_model(path, serialize(model))
        try:
            calibrator = calibrate.create_calibrator(
                str(path),
                ["MatMul"],
                str(Path(scratch) / "augmented.onnx"),
                method,
                use_external_data_format=not fits_one_file(model),
                extra_options=options,
            )
            done = 0
            for batch in calibration.images.batches(folder, how, at_once, observer):
                images = network_input(batch.pixels, how, takes_pixels=taken.elem_type == _UINT8)
                done += len(images)
                calibrator.collect_data(_Reader(model.graph.input[0].name, _in_runs(images, fixed)))
                observer.progress("calibrating", done, len(folder.files))
            data = calibrator.compute_data()
        except (*ORT_FAILURES, *TOOL_FAILURES) as err:
            raise EngineError(f"ONNX Runtime can't calibrate the model: {str(err).partition(chr(10))[0]}") from err
    return {name: _bounds(item) for name, item in data.items()}


def _bounds(item: Any) -> tuple[float, float]:
    """Plain numbers, which releases of ONNX Runtime give as scalars or as arrays of one."""
    low, high = (float(np.asarray(bound).reshape(-1)[0]) for bound in item.range_value)
    return low, high


def _in_runs(images: NDArray[Any], fixed: int) -> Iterator[NDArray[Any]]:
    """One image at a time, or where the batch is fixed all of them, the last repeated until they fill it."""
    if not fixed:
        yield from (images[index : index + 1] for index in range(len(images)))
        return
    yield np.concatenate([images, np.repeat(images[-1:], fixed - len(images), axis=0)])


class _Reader:
    """What ONNX Runtime's calibrators read from: inputs one by one, then None."""

    def __init__(self, name: str, runs: Iterator[NDArray[Any]]) -> None:
        self._name, self._runs = name, runs

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        images = next(self._runs, None)
        return None if images is None else {self._name: images}
