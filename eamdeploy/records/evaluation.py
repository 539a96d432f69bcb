"""What `evaluate` found."""

from __future__ import annotations

from eamdeploy.artifacts.records import Record
from eamdeploy.parity.accuracy import Evaluation
from eamdeploy.vocabulary import ClassOrder, Split


class EvaluatedImages(Record):
    """Which images were evaluated, as the user named them.

    Attributes:
        folder: the folder's name; where the folder lies is not recorded.
        split, limit, exif_transpose: as for `images.source.ImageSource`.
    """

    folder: str
    split: Split
    limit: int | None
    exif_transpose: bool

    @property
    def in_words(self) -> str:
        """Such as `photos (odd, at most 500, turned by EXIF)`."""
        parts = [
            self.split,
            *([] if self.limit is None else [f"at most {self.limit}"]),
            *(["turned by EXIF"] if self.exif_transpose else []),
        ]
        return f"{self.folder} ({', '.join(parts)})"


class EvaluationReport(Evaluation):
    """An `Evaluation` and what it is about.

    Attributes:
        weights: where the model's weights came from; `random` makes every figure here meaningless.
        model, reference: the files, or what stands for the reference.
        model_digest, reference_digest: their SHA-256 (`onnx_files.digest_model`).
        images: folder, split, limit and use of the EXIF orientation in words, for people.
        image_source: the same as fields; None in an older report.
        reference_is_live: the reference is the checkpoint's own model with all attention live,
            and `reference` names no other file; None in an older report.
        reference_all_live: the reference is the model of the checkpoint in `reference`, with all attention live.
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
    image_source: EvaluatedImages | None = None
    reference_is_live: bool | None = None
    reference_all_live: bool = False
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
