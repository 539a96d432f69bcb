"""What `evaluate` found."""

from __future__ import annotations

from eamdeploy.parity.accuracy import Evaluation
from eamdeploy.vocabulary import ClassOrder


class EvaluationReport(Evaluation):
    """An `Evaluation` and what it is about.

    Attributes:
        weights: where the model's weights came from; `random` makes every figure here meaningless.
        model, reference: the files, or what stands for the reference.
        model_digest, reference_digest: their SHA-256 (`onnx_files.digest_model`).
        images: folder, split, limit and use of the EXIF orientation in words.
        class_order: how the user said that labels are to be read; None if not.
        labels_in_doubt: the reference, or without one the model, is no better than guessing at the labels, so that they
            probably do not belong to the model. Never for random weights.
    """

    model: str
    model_digest: str
    weights: str | None
    reference: str | None
    reference_digest: str | None
    images: str
    class_order: ClassOrder | None = None
    labels_in_doubt: bool = False

    @property
    def doubt(self) -> str | None:
        """The doubt about the labels in words; None if there is none."""
        top1 = self.top1 if self.reference_top1 is None else self.reference_top1
        if not self.labels_in_doubt or top1 is None:
            return None
        whose = "the model's" if self.reference_top1 is None else "the reference's"
        return (
            f"{whose} top-1, {top1:.1f} % of {self.n_images} images, is no better than guessing among "
            f"{self.num_classes} classes: the labels probably do not belong to the model"
        )
