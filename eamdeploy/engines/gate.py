"""The parity gate: an engine gives the logits of the reference set."""

from __future__ import annotations

from eamdeploy.engines.runner import Runner
from eamdeploy.errors import ConfigError, ParityError
from eamdeploy.images.preprocess import network_input
from eamdeploy.parity.accuracy import with_fixed_batch
from eamdeploy.parity.gate import ParityReport, Tolerance, compare, require
from eamdeploy.parity.reference_set import ReferenceSet

_GATE_BATCH = 4  # more than one image at a time, so that an engine that mixes them up fails


def check_against_reference(
    runner: Runner, reference: ReferenceSet, tolerance: Tolerance, hint: str | None = None
) -> ParityReport:
    """The engine gives the reference's logits for the reference's images.

    Args:
        hint: as for `parity.require`.

    Raises:
        ConfigError: the images don't fit the engine, or the engine has no card to preprocess by.
        ParityError: the logits differ by more than the tolerance.
    """
    what = f"{runner.name} against its reference set ({reference.source})"
    if runner.card is None:
        raise ConfigError(
            f"{runner.name} carries no model card, so its reference images can't be preprocessed",
            hint="Build from a model that eamdeploy exported, or without a reference set.",
        )
    if runner.io.num_classes not in (None, reference.logits.shape[1]):
        raise ParityError(
            f"parity of {what} can't hold: it is another model's",
            expected=f"{runner.io.num_classes} classes",
            got=reference.logits.shape[1],
        )
    images = network_input(reference.pixels, runner.card.preprocessing, takes_pixels=runner.io.takes_pixels)
    predict = with_fixed_batch(runner.infer, runner.io.batch or min(_GATE_BATCH, len(images)))
    report = compare(reference.logits, predict(images), tolerance)
    require(report, what, hint)
    return report
