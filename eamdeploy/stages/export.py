"""The stage that turns an EAM checkpoint into ONNX with integer maps, and proves that nothing else changed.

make_plan ─▶ export_stock ─▶ rewrite ─▶ prove ─▶ write
checkpoint   torch's own     passes     gate     both files
and options  exporter
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from eamdeploy.artifacts.files import require_output
from eamdeploy.artifacts.onnx_files import data_path
from eamdeploy.artifacts.onnx_output import staging
from eamdeploy.devices.provenance import usable_cores
from eamdeploy.eam.records import CheckpointHeader
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import ConfigError
from eamdeploy.host.export_plan import ExportOptions, ExportPlan, make_plan
from eamdeploy.host.export_steps import as_torch_wrote_it, editable, prove, rewrite, write
from eamdeploy.host.gain import measure_gain
from eamdeploy.host.model import RANDOM
from eamdeploy.host.reference_images import reference_pixels
from eamdeploy.host.stock_export import StockExport, export_stock
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT, Observer
from eamdeploy.records.export import Export
from eamdeploy.vocabulary import Exporter


def export(
    checkpoint: Path,
    output: Path,
    *,
    baseline: Path | None = None,
    stock: Path | None = None,
    teacher: Path | None = None,
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
        stock: write the unfrozen model here as torch exports it, without any pass.
        teacher: of a recovered checkpoint, the one that it was made of: baseline and stock are the unfrozen model
            itself. Without it they have the recovered weights: right to time with, but no reference for accuracy.
        batch, opset, exporter, fold_preprocess, without, trt: see `ExportOptions`.
        images: where the reference images come from; seeded synthetic ones if None.
        measure: also time the model against its unfrozen twin on ONNX Runtime CPU, about 3 seconds.
        verify: the checkpoint must be as it was written; False for one that was changed on purpose.

    Raises:
        ConfigError, CheckpointError: the checkpoint or an option can't be used, or a file can't be written.
        UnsupportedGraph: the model can't be exported, or a frozen head could not be accounted for.
        ParityError: the graph does not compute what the checkpoint means; nothing is written.
    """
    inputs = [checkpoint, *([] if teacher is None else [teacher])]
    _require_outputs(inputs, output, baseline, stock)
    options = ExportOptions(batch, opset, exporter, fold_preprocess, tuple(without), trt)
    plan = make_plan(checkpoint, options, verify=verify)
    unfrozen = plan if teacher is None else make_plan(teacher, options, verify=verify)
    if teacher is not None:
        _require_teacher(plan.header, unfrozen.header, checkpoint, teacher)
    pixels, source = reference_pixels(plan.header.preprocessing, images, observer)
    _tell(plan, unfrozen, observer, has_twin=baseline is not None or stock is not None)
    twin_exported = exported = _stock(plan)
    twin_graph = graph = editable(exported)
    if unfrozen is not plan:
        twin_exported = _stock(unfrozen)
        twin_graph = editable(twin_exported)
    with staging(output) as stage:
        frozen = rewrite(plan, graph, plan.frozen)
        frozen_file = stage.source(frozen.data)
        proved = {output: prove(frozen, frozen_file, plan.frozen, pixels, source)}
        gain = None
        if baseline is not None or measure:
            twin = rewrite(unfrozen, twin_graph, unfrozen.twin)
            twin_file = stage.source(twin.data)
            if baseline is not None:  # a twin that is only timed needs no proof
                proved[baseline] = prove(twin, twin_file, unfrozen.twin, pixels, source)
            gain = measure_gain(frozen_file, twin_file, usable_cores()) if measure else None
        if stock is not None:
            plain = as_torch_wrote_it(twin_exported, unfrozen.twin)
            proved[stock] = prove(plain, stage.source(plain.data), unfrozen.twin, pixels, source)
    if plan.requantized:
        observer.note(f"{plan.requantized} rows of frozen maps do not fit INT8 and are quantized anew")
    with ExitStack() as files:
        written = {path: write(model, path, files) for path, model in proved.items()}
    return Export(
        frozen=written[output],
        baseline=None if baseline is None else written[baseline],
        gain=gain,
        stock=None if stock is None else written[stock],
    )


def _stock(plan: ExportPlan) -> StockExport:
    options = plan.options
    return export_stock(
        plan.twin.reference.model,
        plan.header.preprocessing.size,
        batch=options.batch,
        opset=plan.opset,
        exporter=options.exporter,
    )


def _require_teacher(header: CheckpointHeader, other: CheckpointHeader, path: Path, teacher: Path) -> None:
    """`other`, at `teacher`, is what the recovered checkpoint at `path` was made of."""
    if header.recovery is None:
        raise ConfigError(f"{path} has not recovered: it is its own teacher", hint="Leave --teacher out.")
    if other.content_digest != header.recovery.teacher:
        raise ConfigError(
            f"{path} was not made of {teacher}", expected=header.recovery.teacher, got=other.content_digest
        )


def _require_outputs(inputs: list[Path], output: Path, baseline: Path | None, stock: Path | None) -> None:
    """All models can be written, and none replaces the checkpoint or another."""
    asked = {"model": output, "baseline": baseline, "stock export": stock}
    names: dict[Path, str] = {}
    for name, path in asked.items():
        if path is None:
            continue
        other = names.setdefault(path.resolve(), name)
        if other != name:
            option = f"--{name.split()[0]}"
            raise ConfigError(f"the {name} would replace the {other} {path}", hint=f"Give {option} another file name.")
        for file in (path, data_path(path)):
            require_output(file, *inputs)


def _tell(plan: ExportPlan, unfrozen: ExportPlan, observer: Observer, *, has_twin: bool) -> None:
    """What is about to be exported."""
    random = " with random weights" if plan.header.weights == RANDOM else ""
    observer.note(f"exporting {plan.header.timm_model}{random}")
    if unfrozen is plan and plan.header.recovery is not None and has_twin:
        observer.note(
            "the unfrozen twin has the recovered weights: good to time with, not to compare answers with; "
            "give --teacher for the unfrozen model itself"
        )
    if plan.left_out:
        observer.note(f"left out of the passes: {', '.join(sorted(plan.left_out))}")
