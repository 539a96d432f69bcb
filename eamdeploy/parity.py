"""Do two models compute the same logits? One table of tolerances, one comparison, and the outputs to compare with.

A reference set travels beside the ONNX model, so that an engine can be checked on the machine that runs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifact import Record, atomic_output
from eamdeploy.errors import CheckpointError, ConfigError, ParityError
from eamdeploy.npz import read_npz
from eamdeploy.seal import SEAL, check_seal, seal_of

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


@dataclass(frozen=True)
class Tolerance:
    """How far logits may be apart; every limit must hold.

    Attributes:
        max_abs: largest |Δ| of any logit.
        span_fraction: largest |Δ| of any logit as a share of max − min of the reference's logits.
        top1_agreement: percent of images that need the same first class, in [0, 100].
        tie_fraction: classes whose logits the reference has no farther apart than this share of max − min are tied, and
            any of them may be first.
    """

    name: str
    max_abs: float
    span_fraction: float
    top1_agreement: float
    tie_fraction: float = 0.0


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        tolerance.name: tolerance
        for tolerance in (
            # the same float32 function with terms in another order: what a rewrite may change
            Tolerance("f32-reassoc", max_abs=1e-4, span_fraction=1e-4, top1_agreement=100.0),
            # another runtime's float32 kernels (erf, exp, blocked sums) through a dozen layers
            Tolerance("f32-engine", max_abs=2e-3, span_fraction=1e-3, top1_agreement=100.0),
            # FP16, BF16 or INT8 arithmetic, or maps requantized for it: only what the model decides is held to. FP16
            # alone moved logits of a DeiT-Tiny by 0.0024 of their span: a choice by less is no decision.
            Tolerance(
                "reduced-engine", max_abs=math.inf, span_fraction=math.inf, top1_agreement=99.0, tie_fraction=5e-3
            ),
        )
    }
)


def reduced_tolerance(min_agreement: float | None) -> Tolerance:
    """What an engine in fewer bits is held to.

    Args:
        min_agreement: percent of images that need the reference's first class; None for `reduced-engine`'s own.

    Raises:
        ConfigError: it is no percentage.
    """
    tolerance = TOLERANCES["reduced-engine"]
    if min_agreement is None:
        return tolerance
    if not 0 <= min_agreement <= 100:
        raise ConfigError("the agreement that the gate asks for", expected="0 to 100 %", got=f"{min_agreement:g} %")
    return replace(tolerance, name=f"{tolerance.name} at {min_agreement:g} %", top1_agreement=min_agreement)


def named_tolerance(name: str) -> Tolerance:
    """The tolerance that a report names.

    Raises:
        CheckpointError: there is none of that name.
    """
    base, _, percent = name.partition(" at ")
    try:
        return reduced_tolerance(float(percent.removesuffix(" %"))) if percent else TOLERANCES[base]
    except (ConfigError, KeyError, ValueError) as err:
        raise CheckpointError("an unknown tolerance", expected=f"one of {', '.join(TOLERANCES)}", got=name) from err


class ParityReport(Record):
    """What `compare` found.

    Attributes:
        tolerance: name of the tolerance it was judged by.
        n: images compared.
        max_abs: largest |Δ| of any logit; None when a side holds NaN or infinity.
        max_rel: `max_abs` ÷ (max − min of the reference's logits); None as above or when those are all equal.
        where: image and class index of that difference, or of the first logit that is not finite.
        top1_agreement: percent of images with the same first class.
        ties: images with another first class that the tolerance calls tied with the reference's.
        reason: what failed; None when it passed.
    """

    passed: bool
    tolerance: str
    n: int
    max_abs: float | None
    max_rel: float | None
    where: tuple[int, int]
    top1_agreement: float
    ties: int = 0
    reason: str | None


def compare(reference: NDArray[np.float32], got: NDArray[np.float32], tolerance: Tolerance) -> ParityReport:
    """Whether `got` equals `reference` within the tolerance, and by how much it does not.

    Args:
        reference: float32 [B, classes], B ≥ 1.
        got: float32 of the same shape.

    Raises:
        ParityError: shapes or dtypes differ, or there is nothing to compare.
    """
    _require_comparable(reference, got)
    same = reference.argmax(axis=1) == got.argmax(axis=1)
    agreement = 100.0 * float(np.mean(same))
    for name, logits in (("reference", reference), ("result", got)):
        finite = np.isfinite(logits)
        if not finite.all():
            where = _index(~finite)
            reason = f"the {name} has {np.count_nonzero(~finite)} logits that are not finite"
            return _report(tolerance, len(got), None, None, where, agreement, 0, [reason])
    difference = np.abs(got.astype(np.float64) - reference.astype(np.float64))
    where = _index(difference == difference.max())
    max_abs = float(difference[where])
    span = float(reference.max()) - float(reference.min())
    behind = reference.max(axis=1) - np.take_along_axis(reference, got.argmax(axis=1)[:, None], axis=1)[:, 0]
    tied = ~same & (behind <= tolerance.tie_fraction * span)
    reasons = []
    if max_abs > tolerance.max_abs:
        reasons.append(f"max |Δ logit| {max_abs:.3g} > {tolerance.max_abs:g}")
    if max_abs > tolerance.span_fraction * span:
        reasons.append(f"max |Δ logit| {max_abs:.3g} > {tolerance.span_fraction:g} of the logits' span {span:.3g}")
    accepted = 100.0 * float(np.mean(same | tied))
    if accepted < tolerance.top1_agreement:
        or_tied = " or tied" if tied.any() else ""
        reasons.append(
            f"first class equal{or_tied} for {accepted:.4g} % of the images < {tolerance.top1_agreement:g} %"
        )
    max_rel, ties = max_abs / span if span > 0 else None, int(np.count_nonzero(tied))
    return _report(tolerance, len(got), max_abs, max_rel, where, agreement, ties, reasons)


def require(report: ParityReport, what: str, hint: str | None = None) -> None:
    """The report passed.

    Args:
        what: what was compared, for the message: "x.ort.onnx against its reference set".
        hint: what to try when it did not pass, besides a look at the model; None for nothing.

    Raises:
        ParityError: it did not; the message has its numbers.
    """
    if report.passed:
        return
    image, klass = report.where
    raise ParityError(
        f"parity of {what} failed at tolerance {report.tolerance}: {report.reason}"
        f" (worst at image {image}, class {klass}; {report.n} images, first class equal for"
        f" {report.top1_agreement:.4g} %)",
        hint=f"Don't use it; {hint or ''}compare the ONNX model with its checkpoint to find where they part.",
    )


def _report(
    tolerance: Tolerance,
    n: int,
    max_abs: float | None,
    max_rel: float | None,
    where: tuple[int, int],
    agreement: float,
    ties: int,
    reasons: list[str],
) -> ParityReport:
    return ParityReport(
        passed=not reasons,
        tolerance=tolerance.name,
        n=n,
        max_abs=max_abs,
        max_rel=max_rel,
        where=where,
        top1_agreement=agreement,
        ties=ties,
        reason="; ".join(reasons) or None,
    )


def _require_comparable(reference: NDArray[np.float32], got: NDArray[np.float32]) -> None:
    wanted, found = (f"{array.dtype} {list(array.shape)}" for array in (reference, got))
    if reference.dtype != np.float32 or reference.ndim != 2 or reference.size == 0:
        raise ParityError(
            "the reference logits can't be compared with", expected="float32 [images, classes]", got=wanted
        )
    if wanted != found:
        raise ParityError("the logits have another shape or type than the reference's", expected=wanted, got=found)


def _index(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Row and column of the first True of a 2-D mask."""
    image, klass = np.unravel_index(int(mask.argmax()), mask.shape)
    return int(image), int(klass)


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
