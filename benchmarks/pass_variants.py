"""Engines of one model that differ in the passes behind them, each proved against the reference forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from floor import count_multiply_adds
from peers import noise_images

from eamdeploy import build_ort, export, freeze
from eamdeploy.artifacts.files import digest_bytes
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.errors import UnsupportedGraph
from eamdeploy.host.model import ModelSpec, load_model, preprocessing_of
from eamdeploy.host.stock_export import export_stock
from eamdeploy.images.options import TIMM_PREPROCESSING
from eamdeploy.images.source import ImageSource
from eamdeploy.passes.order import SWITCHABLE, with_dependents
from eamdeploy.vocabulary import Exporter

_IMAGES = 16


@dataclass(frozen=True)
class Subject:
    """What is exported.

    Attributes:
        data: folder of images that calibrate and prove; None for noise, and synthetic images as proof.
        batch: fixed batch size, or None for a dynamic one.
    """

    spec: ModelSpec
    data: Path | None
    sparsity: float
    exporter: Exporter
    opset: int
    batch: int | None


@dataclass(frozen=True)
class Setup:
    """Which passes run.

    Attributes:
        without: those left out, as `with_dependents` gives them; None for torch's own export.
        fold: whether `fold_preprocess` runs.
    """

    without: frozenset[str] | None = frozenset()
    fold: bool = False


ALL, NONE, STOCK = Setup(), Setup(frozenset(SWITCHABLE)), Setup(None)


@dataclass(frozen=True)
class Pair:
    """Two setups that differ in what the row is about: `before` is without it, `after` with it."""

    name: str
    before: Setup
    after: Setup

    @property
    def absent(self) -> list[str]:
        """Passes that neither of the two has, because they depend on what the row is about."""
        return sorted(self.after.without or ())


def pairs(passes: Sequence[str]) -> list[Pair]:
    """One for all passes together, from torch's own export and from none, and one for each of `passes`."""
    each = [Pair(name, Setup(with_dependents([name])), Setup(with_dependents([name]) - {name})) for name in passes]
    return [
        Pair("all, against torch's export", STOCK, ALL),  # with what is frozen, if anything
        Pair("all", NONE, ALL),
        *each,
        Pair("fold_preprocess (if asked for)", ALL, Setup(fold=True)),
    ]


@dataclass(frozen=True)
class Variant:
    """An engine that was made.

    Attributes:
        graph: digest of the nodes and constants alone; of the same graph there is one engine.
        multiply_adds: for one image; None where onnx can't infer the shapes.
        exporter: which of torch's exporters wrote the graph.
    """

    engine: Path
    graph: str
    nodes: int
    multiply_adds: int | None
    exporter: str


def make_variants(
    subject: Subject, setups: Sequence[Setup], threads: int, work: Path, note: Callable[[str], None]
) -> dict[Setup, Variant]:
    """An engine for each setup, in the folder `work`.

    Raises:
        EamDeployError: one can't be made.
        ParityError: one does not compute what the model does.
    """
    checkpoint = work / "model.eam.safetensors"
    source = ImageSource(subject.data or noise_images(work / "noise"), limit=_IMAGES)
    freeze(subject.spec, source, checkpoint, FreezeOptions(sparsity=subject.sparsity, score="variance"))
    made: dict[Setup, Variant] = {}
    engines: dict[str, Path] = {}
    for number, setup in enumerate(dict.fromkeys(setups), start=1):
        note(f"{subject.spec.name}: export {number}, {_in_words(setup)}")
        model, engine = work / f"{number}.onnx", work / f"{number}.ort.onnx"
        if setup.without is None:
            exporter = _stock(subject, model)
        else:
            exporter = export(
                checkpoint,
                model,
                batch=subject.batch,
                opset=subject.opset,
                exporter=subject.exporter,
                fold_preprocess=setup.fold,
                without=setup.without,
                images=source if subject.data else None,
            ).frozen.exporter
        loaded = onnx.load(model)
        graph = digest_bytes(loaded.graph.SerializeToString(deterministic=True))
        if setup.without is None:
            engines[graph] = model
        else:
            if graph not in engines:
                build_ort(model, engine, threads=threads)
                engines[graph] = engine
            model.unlink()  # a Swin-Tiny is 115 MB, and the engine holds all of it
        made[setup] = Variant(engines[graph], graph, len(loaded.graph.node), _multiply_adds(loaded), exporter)
    return made


def _in_words(setup: Setup) -> str:
    if setup.without is None:
        return "torch's own"
    if setup == NONE:
        return "no pass"
    left_out = f"without {', '.join(sorted(setup.without))}" if setup.without else "all passes"
    return left_out + (" and fold_preprocess" if setup.fold else "")


def _stock(subject: Subject, path: Path) -> str:
    """The model as torch exports it is at `path`; returns which exporter wrote it."""
    model = load_model(subject.spec)
    size = preprocessing_of(model, TIMM_PREPROCESSING).size
    stock = export_stock(model, size, batch=subject.batch, opset=subject.opset, exporter=subject.exporter)
    onnx.save(stock.model, path)
    return stock.exporter


def _multiply_adds(model: onnx.ModelProto) -> int | None:
    try:
        return count_multiply_adds(model)
    except UnsupportedGraph:
        return None
