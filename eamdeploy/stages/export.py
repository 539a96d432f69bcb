"""The stage that turns an EAM checkpoint into ONNX with integer maps, and proves that nothing else changed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import ModelCard, Preprocessing
from eamdeploy.artifacts.files import atomic_output, digest_file, require_output
from eamdeploy.artifacts.onnx_files import ModelData, data_path
from eamdeploy.artifacts.onnx_output import model_output, staging
from eamdeploy.convert.trt_passes import plan_trt
from eamdeploy.devices.provenance import package_versions, usable_cores
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.checkpoint import AttentionShape, Checkpoint, FrozenMaps
from eamdeploy.eam.int8 import int8_checkpoint
from eamdeploy.eam.quantizers import integer_values
from eamdeploy.engines.gate import check_against_reference
from eamdeploy.engines.ort.runner import UNOPTIMIZED, OrtRunner
from eamdeploy.engines.trt.versions import TrtVersion, capabilities
from eamdeploy.errors import ConfigError
from eamdeploy.graph.frozen import IntegerMaps
from eamdeploy.graph.model import to_graph, to_model, with_card
from eamdeploy.graph.weights import serialize
from eamdeploy.host.attention import parts
from eamdeploy.host.calibrate import predict
from eamdeploy.host.gain import measure_gain
from eamdeploy.host.model import RANDOM
from eamdeploy.host.reference import LoadedModel, load_reference
from eamdeploy.host.stock_export import StockExport, export_stock
from eamdeploy.images.preprocess import normalize
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT, Observer
from eamdeploy.parity.gate import TOLERANCES, ParityReport
from eamdeploy.parity.reference_set import REFERENCE_IMAGES, ReferenceSet, reference_path
from eamdeploy.passes.base import run_passes
from eamdeploy.passes.class_token_only import ClassTokenOnly
from eamdeploy.passes.facts import Parts
from eamdeploy.passes.fold_preprocess import FoldPreprocess
from eamdeploy.passes.freeze_heads import AttentionModule, check_accounted
from eamdeploy.passes.order import plan_passes, with_dependents
from eamdeploy.passes.requantize_maps import RequantizeMaps
from eamdeploy.records.export import Export, ExportedModel
from eamdeploy.vocabulary import Exporter, Quantizer

DEFAULT_OPSET = 17
_OPSET_WITHOUT_LAYER_NORMALIZATION = 16
_SEED = 0
_UINT16_OPSET = 21


def export(
    checkpoint: Path,
    output: Path,
    *,
    baseline: Path | None = None,
    batch: int | None = None,
    opset: int | None = None,
    exporter: Exporter = "auto",
    fold_preprocess: bool = False,
    without: Iterable[str] = (),
    trt: TrtVersion | None = None,
    images: ImageSource | None = None,
    measure: bool = False,
    verify: bool = True,
    observer: Observer = SILENT,
) -> Export:
    """`output` is the checkpoint's model in ONNX, its frozen maps integer constants, with reference logits beside it.

    For TensorRT, rows of frozen maps that don't fit INT8 are quantized anew; the reference logits are then those of the
    maps that the graph holds, and `requantize_maps` stands among the rewrites.

    Args:
        baseline: write the unfrozen twin here, through the same passes but the freezing.
        batch: fixed batch size, or None for a dynamic one.
        opset: by default 17, and 16 where TensorRT does not know LayerNormalization.
        fold_preprocess: the input is pixels, uint8, and the patch embedding normalizes them; not for TensorRT.
        without: passes of `passes.order` that are left out, and with them those that depend on them.
        trt: the TensorRT that must take the graph; None for ONNX Runtime.
        images: where the reference images come from; seeded synthetic ones if None.
        measure: also time the model against its unfrozen twin on ONNX Runtime CPU, about 3 seconds.
        verify: the checkpoint must be as it was written; False for one that was changed on purpose.

    Raises:
        ConfigError, CheckpointError: the checkpoint or an option can't be used, or a file can't be written.
        UnsupportedGraph: the model can't be exported, or a frozen head could not be accounted for.
        ParityError: the graph does not compute what the checkpoint means; nothing is written.
    """
    paths = [output] if baseline is None else [output, baseline]
    if baseline is not None and baseline.resolve() == output.resolve():
        raise ConfigError(f"the baseline would replace the model {output}", hint="Give --baseline another file name.")
    for path in paths:
        for file in (path, data_path(path)):
            require_output(file, checkpoint)
    if fold_preprocess and trt is not None:
        raise ConfigError(
            "TensorRT is not given pixels", expected="a float32 input", got="uint8", hint="Leave --fold-preprocess out."
        )
    opset = _choose_opset(opset, trt)
    left_out = with_dependents(without)
    loaded = checkpoints.load(checkpoint, verify=verify)
    header, requantized = loaded.header, 0
    if trt is not None and capabilities(trt).integer_maps:
        loaded, requantized = int8_checkpoint(loaded)
    live = load_reference(loaded, frozen=False, where=str(checkpoint))
    modules = _attention_modules(loaded, live, opset)
    if ClassTokenOnly.name in left_out:  # then every row is computed, and of frozen maps every row must be there
        modules = [replace(module, read_tokens=None) for module in modules]
    pixels, source = _reference_pixels(loaded, images, observer)
    observer.note(f"exporting {header.timm_model}" + (" with random weights" if header.weights == RANDOM else ""))
    if left_out:
        observer.note(f"left out of the passes: {', '.join(sorted(left_out))}")
    stock = export_stock(live.model, header.preprocessing.size, batch=batch, opset=opset, exporter=exporter)
    card = ModelCard(
        timm_model=header.timm_model,
        weights=header.weights,
        num_classes=header.num_classes,
        class_names=header.class_names,
        preprocessing=header.preprocessing,
        checkpoint_digest=digest_file(checkpoint),
        takes_pixels=fold_preprocess,
        exporter=stock.exporter,
        versions=package_versions(),
    )
    frozen = load_reference(loaded, frozen=True, where=str(checkpoint))
    changes = {"freezing": header.freezing, "rewrites": [RequantizeMaps.name] if requantized else []}
    has = parts(live.model)
    model = _rewrite(stock, modules, has, card.model_copy(update=changes), trt, left_out)
    with staging(output) as stage:
        source_file = stage.source(model.data)
        drafts = [_prove(model, source_file, frozen, pixels, source)]
        unfrozen = [replace(module, frozen=None) for module in modules]
        twin = _rewrite(stock, unfrozen, has, card, trt, left_out) if baseline is not None or measure else None
        twin_file = None if twin is None else stage.source(twin.data)
        if twin is not None and twin_file is not None and baseline is not None:  # one that is only timed needs no proof
            drafts.append(_prove(twin, twin_file, live, pixels, source))
        gain = measure_gain(source_file, twin_file, usable_cores()) if twin_file is not None and measure else None
    if requantized:
        observer.note(f"{requantized} rows of frozen maps do not fit INT8 and are quantized anew")
    with ExitStack() as files:
        written = [_write(draft, path, files) for draft, path in zip(drafts, paths, strict=True)]
    return Export(frozen=written[0], baseline=written[1] if baseline is not None else None, gain=gain)


@dataclass(frozen=True)
class _Rewritten:
    """A rewritten model: its one file or two, the card in it, and its number of nodes before the passes and after."""

    data: ModelData
    card: ModelCard
    nodes_stock: int
    nodes: int


@dataclass(frozen=True)
class _Draft:
    """A rewritten and proved model, not yet written."""

    model: _Rewritten
    parity: ParityReport
    reference: ReferenceSet


def _choose_opset(opset: int | None, trt: TrtVersion | None) -> int:
    """`opset`, or the default for that TensorRT.

    Raises:
        ConfigError: TensorRT does not know that operator set, or is too old.
    """
    can = None if trt is None else capabilities(trt)
    if opset is None:
        return DEFAULT_OPSET if can is None or can.layer_normalization else _OPSET_WITHOUT_LAYER_NORMALIZATION
    if can is not None and opset > can.max_opset:
        raise ConfigError(f"TensorRT {trt} does not know that opset", expected=f"at most {can.max_opset}", got=opset)
    return opset


def _attention_modules(checkpoint: Checkpoint, live: LoadedModel, opset: int) -> list[AttentionModule]:
    """Every attention module with its value weights and, where it has some, its frozen maps as ONNX stores them."""
    modules = []
    for site in live.sites:
        weight = live.model.get_submodule(site.path).qkv.weight.detach().numpy()  # rows: q, k, v
        frozen = checkpoint.frozen.get(site.path)
        shape = checkpoint.header.attention[site.path]
        maps = None if frozen is None else _integer_maps(frozen, shape, checkpoint.header.freezing.quantizer, opset)
        modules.append(AttentionModule(site.path, weight[2 * len(weight) // 3 :], maps, site.read_tokens))
    return modules


def _integer_maps(frozen: FrozenMaps, shape: AttentionShape, quantizer: Quantizer, opset: int) -> IntegerMaps:
    integers = integer_values(frozen.codes, quantizer)
    if integers.dtype == np.uint16 and opset < _UINT16_OPSET:
        raise ConfigError(
            "squared 8-bit codes need UINT16 constants",
            expected=f"opset {_UINT16_OPSET} or higher",
            got=opset,
            hint="Freeze with --bits 4 or --quantizer uniform.",
        )
    rows = (len(frozen.heads), shape.n_maps, shape.tokens)
    return IntegerMaps(
        heads=tuple(frozen.heads.tolist()),
        integers=integers.reshape(*rows, shape.tokens),
        scales=frozen.scales.reshape(rows),
        windows=tuple(shape.windows or [0]),
        mask=frozen.mask,
    )


def _rewrite(
    stock: StockExport,
    modules: list[AttentionModule],
    has: Parts,
    card: ModelCard,
    trt: TrtVersion | None,
    without: frozenset[str],
) -> _Rewritten:
    """`stock` after all passes but those, its card in its metadata."""
    graph = to_graph(stock.model)
    nodes_stock = len(graph.nodes)
    how = card.preprocessing
    fold = FoldPreprocess(how.mean, how.std) if card.takes_pixels else None
    results = run_passes(graph, plan_passes(modules, has, fold, without))
    model = to_model(graph)
    check_accounted(model, modules)
    if trt is not None:
        plan = plan_trt(trt, modules)
        results += [result for result in run_passes(graph, plan) if result.rewritten]
        model = to_model(graph)
    card = card.model_copy(update={"rewrites": [*card.rewrites, *(result.name for result in results)]})
    return _Rewritten(serialize(with_card(model, card)), card, nodes_stock, len(model.graph.node))


def _prove(
    model: _Rewritten, file: bytes | Path, reference: LoadedModel, pixels: NDArray[np.uint8], source: str
) -> _Draft:
    """`model`, which a runtime opens as `file`, with the logits of `reference` on `pixels`, which it gives too."""
    images = normalize(pixels, model.card.preprocessing)
    logits = np.concatenate([predict(reference.model, images[i : i + 1]) for i in range(len(images))])
    references = ReferenceSet(pixels, logits, source)
    with OrtRunner(file, threads=usable_cores(), settings=UNOPTIMIZED, name="the exported graph") as runner:
        parity = check_against_reference(runner, references, TOLERANCES["f32-engine"])
    return _Draft(model, parity, references)


def _write(draft: _Draft, path: Path, files: ExitStack) -> ExportedModel:
    """The model and its reference set are written; they appear when `files` is closed."""
    digest = draft.model.data.digest_at(path)
    files.enter_context(model_output(path, draft.model.data))
    reference_file = files.enter_context(atomic_output(reference_path(path)))
    replace(draft.reference, model_digest=digest).write(reference_file)
    reference_file.flush()  # a full disk shows here, and not after another file was renamed
    os.fsync(reference_file.fileno())  # nor does a slow one keep old and new files side by side
    return ExportedModel(
        file=str(path),
        digest=digest,
        bytes=draft.model.data.bytes_at(path),
        nodes_stock=draft.model.nodes_stock,
        nodes=draft.model.nodes,
        rewrites=draft.model.card.rewrites,
        exporter=draft.model.card.exporter,
        parity=draft.parity,
        reference=str(reference_path(path)),
    )


def _reference_pixels(
    checkpoint: Checkpoint, images: ImageSource | None, observer: Observer
) -> tuple[NDArray[np.uint8], str]:
    """Images for the parity gate, uint8 `[n, H, W, 3]`, and where they come from."""
    header = checkpoint.header
    if images is None:
        return _synthetic_pixels(header.preprocessing), f"{REFERENCE_IMAGES} synthetic images"
    chosen = replace(images, limit=images.limit or REFERENCE_IMAGES)
    folder = chosen.open(observer)
    batches = chosen.batches(folder, header.preprocessing, REFERENCE_IMAGES, observer)
    pixels = np.concatenate([batch.pixels for batch in batches])
    return pixels, f"{len(pixels)} images of {folder.root.name}"


def _synthetic_pixels(how: Preprocessing) -> NDArray[np.uint8]:
    """Smooth coloured blobs with a little noise: unlike white noise, they move the logits as photographs do."""
    height, width = how.size
    rng = np.random.default_rng(_SEED)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = rng.uniform(-3, 3, (REFERENCE_IMAGES, 3, 4, 2))  # 4 plane waves in each channel of each image
    phases = rng.uniform(0, 2 * np.pi, (REFERENCE_IMAGES, 3, 4))
    angles = 2 * np.pi * np.einsum("ncwa,ahx->ncwhx", waves, np.stack([y, x])) + phases[..., None, None]
    smooth = np.sin(angles).sum(axis=2) / 4 + rng.normal(0, 0.1, (REFERENCE_IMAGES, 3, height, width))
    pixels: NDArray[np.uint8] = np.clip(127.5 * (1 + smooth), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels
