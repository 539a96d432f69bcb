"""The steps behind the plan of an export, each for one variant: the graph is rewritten, proved and written."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import ModelCard
from eamdeploy.artifacts.files import atomic_output
from eamdeploy.artifacts.onnx_files import ModelData
from eamdeploy.artifacts.onnx_output import model_output
from eamdeploy.convert.trt_passes import plan_trt
from eamdeploy.devices.provenance import usable_cores
from eamdeploy.engines.gate import check_against_reference
from eamdeploy.engines.ort.runner import UNOPTIMIZED, OrtRunner
from eamdeploy.graph.model import Graph, copy_of, to_graph, to_model, with_card
from eamdeploy.graph.weights import serialize
from eamdeploy.host.calibrate import predict
from eamdeploy.host.export_plan import ExportPlan, Variant
from eamdeploy.host.stock_export import StockExport
from eamdeploy.images.preprocess import normalize
from eamdeploy.parity.gate import TOLERANCES, ParityReport
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.passes.base import run_passes
from eamdeploy.passes.fold_preprocess import FoldPreprocess
from eamdeploy.passes.freeze_heads import check_accounted
from eamdeploy.passes.order import plan_passes
from eamdeploy.records.export import ExportedModel


@dataclass(frozen=True)
class StockGraph:
    """A stock export, ready to be rewritten; read, never changed.

    Attributes:
        exporter: which of torch's exporters wrote it.
    """

    graph: Graph
    exporter: str


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph.

    Attributes:
        data: the model's one file or two.
        card: as it stands in the model's metadata.
        nodes_stock, nodes: number of nodes before the passes and after.
    """

    data: ModelData
    card: ModelCard
    nodes_stock: int
    nodes: int


@dataclass(frozen=True)
class Proved:
    """A rewritten graph that agrees with its reference, not yet written."""

    model: Rewritten
    parity: ParityReport
    reference: ReferenceSet


def editable(stock: StockExport) -> StockGraph:
    """The stock export as the graph that every variant starts from: parsing and measuring it is done once.

    Raises:
        UnsupportedGraph: it can't be run.
    """
    return StockGraph(to_graph(stock.model), stock.exporter)


def as_torch_wrote_it(stock: StockExport, twin: Variant) -> Rewritten:
    """The stock export with a card and nothing else changed."""
    card = twin.card.model_copy(update={"exporter": stock.exporter, "takes_pixels": False})
    nodes = len(stock.model.graph.node)
    return Rewritten(serialize(with_card(stock.model, card)), card, nodes, nodes)


def rewrite(plan: ExportPlan, stock: StockGraph, variant: Variant) -> Rewritten:
    """The stock graph after all passes, with the variant's frozen maps and card.

    Raises:
        UnsupportedGraph: a pass found another structure than the model has, or a frozen head is not accounted for.
    """
    card = variant.card.model_copy(update={"exporter": stock.exporter})
    graph = copy_of(stock.graph)
    nodes_stock = len(graph.nodes)
    how = card.preprocessing
    fold = FoldPreprocess(how.mean, how.std) if card.takes_pixels else None
    results = run_passes(graph, plan_passes(variant.modules, plan.parts, fold, plan.left_out))
    model = to_model(graph)
    check_accounted(model, variant.modules)
    if plan.options.trt is not None:
        for_trt = run_passes(graph, plan_trt(plan.options.trt, variant.modules))
        results += [result for result in for_trt if result.rewritten]
        model = to_model(graph)
    card = card.model_copy(update={"rewrites": [*card.rewrites, *(result.name for result in results)]})
    return Rewritten(serialize(with_card(model, card)), card, nodes_stock, len(model.graph.node))


def prove(model: Rewritten, file: bytes | Path, variant: Variant, pixels: NDArray[np.uint8], source: str) -> Proved:
    """`model` gives the logits of the variant's reference forward, with the runtime's optimizer off.

    Args:
        file: the model as a runtime opens it.
        pixels: uint8 `[n, H, W, 3]`, the images of the comparison.
        source: in words where the images come from.

    Raises:
        ParityError: the logits differ by more than another runtime's rounding.
    """
    images = normalize(pixels, model.card.preprocessing)
    logits = np.concatenate([predict(variant.reference.model, images[i : i + 1]) for i in range(len(images))])
    references = ReferenceSet(pixels, logits, source)
    with OrtRunner(file, threads=usable_cores(), settings=UNOPTIMIZED, name="the exported graph") as runner:
        parity = check_against_reference(runner, references, TOLERANCES["f32-engine"])
    return Proved(model, parity, references)


def write(proved: Proved, path: Path, files: ExitStack) -> ExportedModel:
    """The model and its reference set are on the disk in full; they appear at their places when `files` is closed.

    Raises:
        ConfigError: one can't be written; whatever was there stays.
    """
    digest = proved.model.data.digest_at(path)
    files.enter_context(model_output(path, proved.model.data))
    reference_file = files.enter_context(atomic_output(reference_path(path)))
    replace(proved.reference, model_digest=digest).write(reference_file)
    reference_file.flush()  # a full disk shows here, and not after another file was renamed
    os.fsync(reference_file.fileno())  # nor does a slow one keep old and new files side by side
    return ExportedModel(
        file=str(path),
        digest=digest,
        bytes=proved.model.data.bytes_at(path),
        nodes_stock=proved.model.nodes_stock,
        nodes=proved.model.nodes,
        rewrites=proved.model.card.rewrites,
        exporter=proved.model.card.exporter,
        parity=proved.parity,
        reference=str(reference_path(path)),
    )
