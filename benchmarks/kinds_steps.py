"""The steps from a model to a measured engine for each kind of frozen head, each taken only once.

The steps are kept by `study.Study.once`: a run that was killed goes on, and a step that was cut
short starts anew. A step is taken again once weights, images, settings, versions or code change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import onnx
from floor import count_multiply_adds
from study import Study, code_digest, short_digest

import eamdeploy
from eamdeploy import build_ort, evaluate, export, freeze, recover
from eamdeploy.artifacts.card import Freezing
from eamdeploy.convert.ort_form import AS_EXPORTED, forms_for
from eamdeploy.convert.ranges import Calibration
from eamdeploy.devices.provenance import machine_summary
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.recovery import RecoverOptions
from eamdeploy.engines.manifest import read_manifest
from eamdeploy.host.attention import attention_sites
from eamdeploy.host.sites import head_size
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.vocabulary import Bits, RecoveryMethod

OPSET = 18  # the first that both of torch's exporters write for ViT and Swin
REFERENCE_IMAGES = 16
RANGE_IMAGES = 64  # that static INT8 is calibrated with

NOTHING: Final = "nothing"
PLAIN: Final = "plain"
RANKS: Final = {PLAIN: "none", "1": "1", "2": "2", "4": "4", "8": "8", "auto": "auto"}
"""What `FreezeOptions.rank` is called for each kind that a user may name."""


@dataclass(frozen=True)
class Variant:
    """A model with heads of one kind.

    Attributes:
        kind: a key of `RANKS`, or `NOTHING`.
        recovery: None for none.
    """

    kind: str
    recovery: RecoveryMethod | None = None

    @property
    def name(self) -> str:
        """The kind in words."""
        return f"rank {self.kind}" if self.kind.isdigit() else self.kind

    @property
    def frozen(self) -> Variant:
        """The same before recovery."""
        return replace(self, recovery=None)


UNFROZEN: Final = Variant(NOTHING)


@dataclass(frozen=True)
class Plan:
    """What all variants share.

    Attributes:
        batch: the one batch size that engines take; None for any.
        threads: of an engine, which decide the fastest form.
    """

    sparsity: float
    bits: Bits
    batch: int | None
    threads: int


class Steps:
    """What is made of each variant of a model, and where it lies.

    Args:
        note: is told of every step that is taken.
    """

    def __init__(self, study: Study, plan: Plan, note: Callable[[str], None]) -> None:
        self._study, self._plan, self._note = study, plan, note
        code = code_digest(Path(eamdeploy.__file__).parent, Path(__file__))
        self._stem = f"kinds-{code}-{plan.sparsity:g}-{plan.bits}bits"

    def checkpoint(self, variant: Variant) -> Path:
        """The frozen model, recovered where the variant is; even images say what, and how."""
        even, name = self._study.settings.even, "model.eam.safetensors"

        def recovered(folder: Path) -> None:
            assert variant.recovery is not None
            recover(self.checkpoint(variant.frozen), even, folder / name, RecoverOptions(method=variant.recovery))

        def frozen(folder: Path) -> None:
            options = FreezeOptions(sparsity=0.0, score="variance", bits=self._plan.bits)
            if variant.kind != NOTHING:
                options = FreezeOptions(
                    sparsity=self._plan.sparsity,
                    rank=RANKS[variant.kind],
                    bits=self._plan.bits,
                    score_images=self._study.settings.score_images,
                )
            freeze(self._study.spec, even, folder / name, options, overrides=self._study.overrides)

        make = frozen if variant.recovery is None else recovered
        return self._once(variant, "checkpoint", make, "frozen" if variant.recovery is None else "recovered") / name

    def freezing(self, variant: Variant) -> Freezing:
        """What is frozen in a variant."""
        return checkpoints.load(self.checkpoint(variant)).header.freezing

    def saved(self, freezing: Freezing) -> int:
        """Multiply-adds of an image that the frozen heads save."""
        model = self._study.model
        sizes = {site.path: head_size(model, site) for site in attention_sites(model)}
        return sum(
            sizes[path].saved(freezing.rank_of(path, head)) for path, heads in freezing.heads.items() for head in heads
        )

    @cached_property
    def multiply_adds(self) -> int:
        """Of an image, with nothing frozen."""
        return count_multiply_adds(onnx.load(self.graph(UNFROZEN)))

    @property
    def stock(self) -> Path:
        """The unfrozen model as torch exports it."""
        return self.graph(UNFROZEN).with_name("stock.onnx")

    def graph(self, variant: Variant) -> Path:
        """The exported model; beside the one with nothing frozen lies what torch exported."""
        reference = replace(self._study.settings.even, limit=REFERENCE_IMAGES)

        def write(folder: Path) -> None:
            export(
                self.checkpoint(variant),
                folder / "model.onnx",
                stock=folder / "stock.onnx" if variant == UNFROZEN else None,
                batch=self._plan.batch,
                opset=OPSET,
                images=reference,
            )

        return self._once(variant, f"graph-{self._plan.batch or 'dynamic'}", write, "exported") / "model.onnx"

    def engine(self, variant: Variant, *, tuned: bool) -> Path:
        """The engine as exported, or in the form that is fastest here; proved against the reference."""
        graph, threads = self.graph(variant), self._plan.threads
        forms, calibration = [AS_EXPORTED], None
        if tuned:
            forms = forms_for(None, fused_attention=False, int8=True, calibrated=True, tune=True)
            calibration = Calibration(replace(self._study.settings.even, limit=RANGE_IMAGES))

        def build(folder: Path) -> None:
            build_ort(graph, folder / "model.ort.onnx", threads=threads, forms=forms, calibration=calibration)

        step = f"{'tuned' if tuned else 'engine'}-{self._place}"
        return self._once(variant, step, build, "tuned" if tuned else "built") / "model.ort.onnx"

    def accuracy(self, variant: Variant, *, tuned: bool) -> EvaluationReport:
        """On the odd images, against the unfrozen model in torch: of the checkpoint, which the
        engine as exported is proved to equal, or of the engine in its fastest form.
        """
        odd = self._study.settings.odd
        model = self.engine(variant, tuned=True) if tuned else self.checkpoint(variant)
        step = f"{f'tuned-{self._place}' if tuned else 'checkpoint'}-accuracy-{odd.limit or 'all'}"
        teacher = self.checkpoint(variant.frozen)

        def measure(folder: Path) -> None:
            evaluate(model, odd, reference=teacher, live=True).write(folder / "evaluation.json")

        return EvaluationReport.read(self._once(variant, step, measure, "evaluated") / "evaluation.json")

    @property
    def _place(self) -> str:
        """What an engine is made for, besides the model."""
        return short_digest([machine_summary(), str(self._plan.threads), str(self._plan.batch)])

    def _once(self, variant: Variant, step: str, make: Callable[[Path], object], done: str) -> Path:
        def noted(folder: Path) -> None:
            make(folder)
            self._note(f"{variant.name}, recovery {variant.recovery or 'none'}: {done}")

        return self._study.once(f"{self._stem}-{variant.kind}-{variant.recovery or 'none'}-{step}", noted)


def form_of(engine: Path) -> str:
    """The form that an engine was built in, in words.

    Raises:
        CheckpointError, EngineError: as for `read_manifest`.
    """
    manifest = read_manifest(engine)
    chosen = [tried.form for tried in (manifest.tried if manifest else None) or () if tried.chosen]
    return chosen[0] if chosen else AS_EXPORTED.name
