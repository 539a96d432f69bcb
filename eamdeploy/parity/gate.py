"""Do two models compute the same logits? One table of tolerances, and one comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.records import Record
from eamdeploy.errors import CheckpointError, ConfigError, ParityError


@dataclass(frozen=True)
class Tolerance:
    """How far logits may be apart; every limit must hold.

    Attributes:
        max_abs: largest |Δ| of any logit.
        span_fraction: largest |Δ| of any logit as a share of max − min of the reference's logits.
        top1_agreement: percent of images that need the same first class, in [0, 100].
        tie_fraction: classes whose logits the reference has no farther apart than this share of max − min are tied, and
            any of them may be first.
        min_agreement: what the user asked for in place of `reduced-engine`'s own `top1_agreement`;
            None where the user asked for nothing.
    """

    name: str
    max_abs: float
    span_fraction: float
    top1_agreement: float
    tie_fraction: float = 0.0
    min_agreement: float | None = None


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
    return replace(
        tolerance,
        name=f"{tolerance.name} at {min_agreement:g} %",
        top1_agreement=min_agreement,
        min_agreement=min_agreement,
    )


class ParityReport(Record):
    """What `compare` found.

    Attributes:
        tolerance: name of the tolerance it was judged by.
        min_agreement: percent of first classes that the user asked for in place of that of
            `reduced-engine`; None where the user asked for nothing, and in an older report.
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
    min_agreement: float | None = None
    n: int
    max_abs: float | None
    max_rel: float | None
    where: tuple[int, int]
    top1_agreement: float
    ties: int = 0
    reason: str | None


def tolerance_of(report: ParityReport, where: str) -> Tolerance:
    """The tolerance that a report was judged by.

    Args:
        where: the engine that the report is about, for the message.

    Raises:
        CheckpointError: the tolerance is none of ours, or the agreement is no percentage, or an
            older report has the agreement that the user asked for in words only.
    """
    try:
        if report.min_agreement is not None:
            return reduced_tolerance(report.min_agreement)
        return TOLERANCES[report.tolerance]
    except (ConfigError, KeyError) as err:
        raise CheckpointError(
            f"the tolerance that {where} was held to is not known",
            expected=f"one of {', '.join(TOLERANCES)}",
            got=report.tolerance,
            hint="Build the engine again with this version of eamdeploy.",
        ) from err


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
        min_agreement=tolerance.min_agreement,
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
