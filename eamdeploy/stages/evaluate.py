"""The stage that measures a checkpoint's or an engine's accuracy, and how far it is from a reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.onnx_files import digest_model
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.engines.proof import prove_here
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import ConfigError, host_packages
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT, Observer
from eamdeploy.parity.accuracy import Evaluation, Predict, is_no_better_than_guessing, measure_accuracy
from eamdeploy.records.evaluation import EvaluatedImages, EvaluationReport

_BATCH = 16


@dataclass(frozen=True)
class _Model:
    """Something that can be evaluated."""

    predict: Predict
    batch: int | None
    how: Preprocessing | None
    num_classes: int | None
    class_names: list[str] | None
    weights: str | None
    takes_pixels: bool = False
    is_changed: bool = False  # weights of a recovered model, and nothing frozen


def evaluate(
    model: Path,
    images: ImageSource,
    *,
    reference: Path | None = None,
    live: bool = False,
    threads: int | None = None,
    verify: bool = True,
    check: bool = True,
    observer: Observer = SILENT,
) -> EvaluationReport:
    """Accuracy where the images have labels, and agreement with a reference.

    Args:
        model: an EAM checkpoint (needs the host packages) or an engine.
        reference: another checkpoint or engine; for a checkpoint by default its own model with all attention live,
            unless that has recovered: its weights with all attention live are no model that anybody trained.
        live: the reference is a checkpoint, and its model with all attention live is meant, not its frozen one.
        verify: checkpoints and exported models must be as they were written; False for one that was changed on
            purpose.
        check: prove an engine anew that was proved on another kind of processor, see `engines.proof`.

    Raises:
        ConfigError: a file or the images can't be used, the two models don't go together, or the reference has the
            weights of a recovered model and nothing frozen.
        CheckpointError, EngineError: a model is damaged or can't be run.
        ParityError: a model returns NaN, or an engine from another kind of processor is not what it was there.
        MissingDependency: a checkpoint is given and torch is not installed.
    """
    if live and (reference is None or not _is_checkpoint(reference)):
        raise ConfigError(
            "--live is about a checkpoint as the reference",
            expected="--reference x.eam.safetensors",
            got=reference or "no --reference",
        )
    for path in (model, reference):
        if path is not None and not _is_checkpoint(path):
            prove_here(path, threads, check=check, note=observer.note)
    with ExitStack() as stack:
        candidate = stack.enter_context(_open(model, threads, frozen=True, verify=verify))
        model_digest = digest_model(model)
        other, other_name, other_digest = None, None, None
        if reference is not None:
            other = stack.enter_context(_open(reference, threads, frozen=not live, verify=verify))
            other_name, other_digest = str(reference), digest_model(reference)
        elif _is_checkpoint(model):
            other = stack.enter_context(_open(model, threads, frozen=False, verify=verify))
            other_name, other_digest = f"{model} with all attention live", model_digest
        if other is not None and other.is_changed:
            raise _no_teacher(reference or model)
        how = _preprocessing(model, candidate, other)
        class_names = candidate.class_names or (other.class_names if other else None)
        num_classes = candidate.num_classes or (other.num_classes if other else None)
        folder = images.open_labelled(num_classes, class_names, observer)
        result = measure_accuracy(
            candidate.predict,
            folder,
            how,
            batch_size=_BATCH,
            reference=None if other is None else other.predict,
            fixed_batch=candidate.batch,
            reference_fixed_batch=None if other is None else other.batch,
            takes_pixels=candidate.takes_pixels,
            reference_takes_pixels=other is not None and other.takes_pixels,
            skip_bad=images.skip_bad,
            on_progress=lambda done, total: observer.progress("images", done, total),
        )
    for name in result.skipped:
        observer.note(f"skipped {name}")
    used = EvaluatedImages(
        folder=images.root.name,
        split=images.split,
        limit=images.limit,
        exif_transpose=images.exif_transpose,
    )
    random = "random" in (candidate.weights, None if other is None else other.weights)
    return EvaluationReport(
        **result.model_dump(),
        model=str(model),
        model_digest=model_digest,
        weights=candidate.weights,
        reference=other_name,
        reference_digest=other_digest,
        images=used.in_words,
        image_source=used,
        reference_is_live=other is not None and reference is None,
        reference_all_live=live,
        class_order=images.class_order,
        labels_in_doubt=not random and _labels_in_doubt(result),
    )


def _labels_in_doubt(found: Evaluation) -> bool:
    top1 = found.top1 if found.reference_top1 is None else found.reference_top1
    if top1 is None:
        return False
    return is_no_better_than_guessing(round(top1 * found.n_images / 100), found.n_images, found.num_classes)


def _no_teacher(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} has recovered: its weights with all attention live are not the unfrozen model, and no reference",
        hint="Compare with the checkpoint that it was made of: --reference x.eam.safetensors --live, or with an engine "
        "of the unfrozen twin of that checkpoint.",
    )


def _is_checkpoint(path: Path) -> bool:
    return path.suffix == ".safetensors"


@contextmanager
def _open(path: Path, threads: int | None, *, frozen: bool, verify: bool) -> Iterator[_Model]:
    if _is_checkpoint(path):
        yield _open_checkpoint(path, frozen=frozen, verify=verify)
        return
    with open_runner(path, threads, verify=verify) as runner:
        card = runner.card
        yield _Model(
            runner.infer,
            runner.io.batch,
            None if card is None else card.preprocessing,
            runner.io.num_classes,
            None if card is None else card.class_names,
            None if card is None else card.weights,
            runner.io.takes_pixels,
            card is not None and card.recovery is not None and card.freezing is None,
        )


def _open_checkpoint(path: Path, *, frozen: bool, verify: bool) -> _Model:
    with host_packages("evaluating a checkpoint"):
        from eamdeploy.host.calibrate import predict
        from eamdeploy.host.reference import load_reference
    loaded = checkpoints.load(path, verify=verify)
    reference = load_reference(loaded, frozen=frozen, where=str(path))
    return _Model(
        lambda images: predict(reference.model, images),
        None,
        loaded.header.preprocessing,
        loaded.header.num_classes,
        loaded.header.class_names,
        loaded.header.weights,
        is_changed=loaded.header.recovery is not None and not frozen,
    )


def _preprocessing(path: Path, candidate: _Model, other: _Model | None) -> Preprocessing:
    """The one way in which both models want their images."""
    known = [model.how for model in (candidate, other) if model is not None and model.how is not None]
    if not known:
        raise ConfigError(
            f"{path} carries no model card, so its images can't be preprocessed",
            hint="Give a --reference that was exported by eamdeploy: its preprocessing is then used for both.",
        )
    if any(how != known[0] for how in known):
        raise ConfigError("the model and the reference preprocess images differently", expected=known[0], got=known[-1])
    return known[0]
