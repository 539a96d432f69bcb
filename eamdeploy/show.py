"""Tables for people, made of the records that the stages return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eamdeploy.artifact import RANDOM_WARNING, Freezing
from eamdeploy.eam.records import AttentionShape, CheckpointHeader
from eamdeploy.eam.selection import PLURALS
from eamdeploy.engines.base import DeviceBuild, Manifest
from eamdeploy.evaluation import EvaluationReport
from eamdeploy.inspection import Inspection
from eamdeploy.pipeline import RunReport
from eamdeploy.profiling.profile import EngineProfile, Profile

if TYPE_CHECKING:
    from eamdeploy.eam.analysis import Analysis
    from eamdeploy.engines.trt_request import BuilderRequest
    from eamdeploy.host.export_record import Export
    from eamdeploy.host.gain import Gain
    from eamdeploy.lint.linter import LintReport
    from eamdeploy.reporting.report import Report

_SLOWEST = 10


def fields(title: str, rows: Mapping[str, object]) -> RenderableType:
    """Names and values, one pair a line; a list becomes several lines."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        text = "\n".join(str(item) for item in value) if isinstance(value, list) else str(value)
        table.add_row(Text(name, style="dim"), Text(text))
    return table


def frozen_heads(freezing: Freezing, attention: Mapping[str, AttentionShape]) -> RenderableType:
    """Which heads of which module are frozen, or have frozen rows or entries, and the sparsity reached."""
    whole, pieces = freezing.granularity == "head", PLURALS[freezing.granularity]
    table = Table(title=f"Frozen {pieces}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("module")
    table.add_column("heads (* frozen)" if whole else f"heads (* with frozen {pieces})")
    for path, shape in attention.items():
        frozen = freezing.heads.get(path, [])
        table.add_row(path, " ".join(f"{head}*" if head in frozen else f"{head} " for head in range(shape.heads)))
    count, total = sum(map(len, freezing.heads.values())), sum(shape.heads for shape in attention.values())
    asked = "" if freezing.sparsity_asked is None else f" (asked for {freezing.sparsity_asked:.1%})"
    what = f"{'' if whole else f'{pieces} in '}{count} of {total} heads"
    stored = f"{freezing.bits} bits {freezing.quantizer}"
    windows = "" if freezing.window_maps is None else f"; window maps: {freezing.window_maps}"
    return Group(
        table, Text(f"sparsity {freezing.sparsity:.1%}{asked}: {what}, by {freezing.score}; {stored}{windows}")
    )


def checkpoint(header: CheckpointHeader) -> RenderableType:
    """What was frozen, and a warning where the weights mean nothing."""
    return _with_warning(frozen_heads(header.freezing, header.attention), header.weights)


def analysis(result: Analysis) -> RenderableType:
    """The score of every head, and which would be frozen, or how much of them."""
    whole, pieces = result.granularity == "head", PLURALS[result.granularity]
    table = Table(title=f"{result.score} of {result.timm_model}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("module")
    table.add_column(f"heads ({'* would be frozen' if whole else f'share of {pieces} that would be frozen'})")
    for path, values in result.scores[result.score].items():
        shares = dict(zip(result.frozen.get(path, []), result.shares.get(path, []), strict=True))
        marks = [_mark(shares.get(head, 0), whole) for head in range(len(values))]
        table.add_row(path, "  ".join(f"{value:.4g}{mark}" for value, mark in zip(values, marks, strict=True)))
    source = f"{result.calibration.n_images} images of {result.calibration.source}"
    summary = Text(f"{source}; sparsity {result.sparsity:.1%} of {result.sparsity_asked:.1%} asked for")
    return _with_warning(Group(table, summary), result.weights)


def _mark(share: float, whole: bool) -> str:
    """What stands after the score of a head of which `share` would be frozen."""
    if whole:
        return "*" if share else " "
    return f" ({share:.0%})"


def export(result: Export) -> RenderableType:
    """What was written, how the graph changed, and how well it agrees with the reference forward."""
    rows: dict[str, object] = {}
    for name, written in (("model", result.frozen), ("baseline", result.baseline)):
        if written is None:
            continue
        rows[name] = [
            f"{written.file} ({written.bytes:,} bytes)",
            f"{written.nodes_stock} nodes by torch's {written.exporter} exporter, {written.nodes} after "
            + ", ".join(written.rewrites),
            f"max |Δ logit| {written.parity.max_abs:.1e} to the reference forward, every top-1 equal "
            f"({written.parity.n} images in {written.reference})",
        ]
    if result.gain is not None:
        rows["gain"] = _gain(result.gain)
    return fields("Exported", rows)


def _gain(gain: Gain) -> str:
    """What freezing gained, in the words of the measurement."""
    speed, threads = gain.speed_up, f"{gain.threads} thread" + "s" * (gain.threads > 1)
    verdict = ("faster" if speed.median > 1 else "slower") if gain.steady else "no difference beyond the noise"
    return (
        f"{speed.median:.2f}× the speed of the unfrozen twin on ONNX Runtime CPU here, {threads}: {verdict} "
        f"(p25–p75 {speed.p25:.2f}–{speed.p75:.2f}, {speed.rounds} rounds taking turns)"
    )


def lint(report: LintReport) -> RenderableType:
    """Every finding under its rule, with the remedy; errors first."""
    warnings = len(report.findings) - report.errors
    lines = [Text(f"{report.file} for TensorRT {report.trt}: {report.errors} errors, {warnings} warnings")]
    by_rule = {finding.rule: finding for finding in reversed(report.findings)}
    for rule in dict.fromkeys(finding.rule for finding in report.findings):
        first = by_rule[rule]
        lines.append(
            Text(f"{first.severity} {rule}: {first.remedy}", style={"error": "red"}.get(first.severity, "yellow"))
        )
        lines += [Text(f"  {item.node}: {item.message}") for item in report.findings if item.rule == rule]
    return Group(*lines)


def run(report: RunReport) -> RenderableType:
    """What was frozen, what it cost and gained, which stages ran, and where the files are."""
    ran, unchanged = ", ".join(report.ran) or "nothing", ", ".join(report.reused) or "nothing"
    page = report.files["report.html"]
    rows = {"ran": ran, "unchanged": unchanged, "files": list(report.files.values()), "open this": page}
    stages = fields("Stages", rows)
    parts = [checkpoint(report.freezing), profile(report.profile), stages]
    if report.evaluation is not None:
        parts.insert(1, evaluation(report.evaluation))
    return Group(*(line for part in parts for line in (part, Text())))


def manifest(built: Manifest) -> RenderableType:
    """What was built, and whether it was checked."""
    parity = "NOT CHECKED"
    if built.parity is not None:
        agreement = built.parity.top1_agreement
        equal = "every top-1 equal" if agreement == 100 else f"top-1 equal for {agreement:.4g} %"
        parity = f"max |Δ logit| {built.parity.max_abs:.1e} on {built.parity.n} images, {equal}"
    shown = fields(
        f"Engine {built.engine}",
        {
            "bytes": f"{built.engine_bytes:,}",
            "batch": built.batch or "dynamic",
            "settings": [f"{key}={value}" for key, value in built.settings.items()],
            "parity": parity,
            **({} if built.device is None else _device(built.device)),
        },
    )
    return _with_warning(shown, built.card.weights if built.card else None)


def _device(built: DeviceBuild) -> dict[str, object]:
    """What a manifest says about an engine that is tied to a GPU."""
    rows: dict[str, object] = {
        "TensorRT": f"{built.runtime} on {built.gpu} (compute capability {built.compute_capability})",
        "changed for it": built.model_changes or "nothing",
        "device memory": f"{built.device_memory_bytes:,} bytes",
        "log": built.log,
    }
    if built.engine_layers is not None:
        layers = built.engine_layers
        rows["layers"] = f"{layers.layers}, of which fused attention: {len(layers.fused_attention)}"
        rows["frozen maps"] = [item.in_words for item in layers.frozen_maps]
    if built.baseline is not None:
        twin = built.baseline
        rows["baseline"] = f"{twin.engine}: {twin.engine_bytes:,} bytes, {twin.layers} layers"
    if built.layer_ms is not None:
        slowest = sorted(built.layer_ms.items(), key=lambda item: -item[1])[:_SLOWEST]
        rows["slowest layers"] = [f"{ms:.4f} ms {name}" for name, ms in slowest]
    return rows


def builder_request(request: BuilderRequest) -> RenderableType:
    """What TensorRT's builder would be asked."""
    rows = {
        "model": request.model_changes or "as it is",
        "types": "those of the model" if request.strongly_typed else f"{request.precision} allowed",
        "network flags": ", ".join(request.network_flags) or "none",
        "builder flags": ", ".join(request.set_flags) or "none",
        "cleared flags": ", ".join(request.cleared_flags) or "none",
        "kept FP32": ", ".join(request.fp32_layers) or "nothing by layer",
        "shapes": [f"{name}: min {low}, opt {best}, max {high}" for name, (low, best, high) in request.shapes.items()],
        "memory": [f"{name} {size:,} bytes" for name, size in request.memory_pools.items()] or "TensorRT's default",
        "optimization level": request.builder_optimization_level,
        "hardware": request.hardware_compatibility_level or "this GPU",
        "timing cache": request.timing_cache or "none",
    }
    return fields(f"TensorRT {request.tensorrt} would be asked", {key: value for key, value in rows.items() if value})


def evaluation(report: EvaluationReport) -> RenderableType:
    """Accuracy beside the reference's."""
    title = Text(f"{report.n_images} images of {report.images}", style="italic")
    table = Table(box=None, padding=(0, 2, 0, 0))  # without the title, which may be wider
    for name in ("", "model", "reference"):
        table.add_column(name, justify="left" if not name else "right")
    rows = (("top-1", report.top1, report.reference_top1), ("top-5", report.top5, report.reference_top5))
    for name, model, reference in rows:
        if model is not None:
            table.add_row(name, f"{model:.1f} %", "" if reference is None else f"{reference:.1f} %")
    if report.agreement is not None and report.kl is not None:
        table.add_row("agreement", f"{report.agreement:.1f} %", "")
        table.add_row("KL", f"{report.kl:.2g} nats", "")
    if report.top1 is None and report.agreement is None:
        return Group(title, table, Text("Neither labels nor a reference: nothing to compare with. See --reference."))
    return _with_warning(Group(title, table), report.weights)


def profile(measured: Profile) -> RenderableType:
    """Latency, memory and size of every engine, with the caveats that belong to them."""
    everyone = [*([measured.baseline] if measured.baseline else []), *measured.engines]
    machine = measured.machine
    title = f"{machine.cpu}, {measured.threads} threads, batch {measured.batch}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns = ("engine", "p50 ms", "mean", "p90", "p99", "images/s", "speed-up (p25–p75)", "memory MB", "file MB")
    for name in columns:
        table.add_column(name, justify="left" if name == "engine" else "right")
    for item in everyone:
        table.add_row(*_profile_row(item, item is measured.baseline))
    return Group(table, *(Text(line, style="yellow") for line in _caveats(everyone)))


def report(written: Report) -> RenderableType:
    """Where the report is, what it is about, and the caveats that it carries."""
    page = fields("Report", {"page": written.page, **({"Markdown": written.markdown} if written.markdown else {})})
    return Group(page, *(Text(line, style="yellow") for line in written.caveats))


def inspection(found: Inspection) -> RenderableType:
    """Everything that `inspect` found."""
    return fields(f"{found.file}: {found.kind}", {"bytes": f"{found.bytes:,}", "digest": found.digest, **found.details})


def _with_warning(shown: RenderableType, weights: str | None) -> RenderableType:
    return Group(shown, Text(RANDOM_WARNING, style="yellow")) if weights == "random" else shown


def _profile_row(item: EngineProfile, is_baseline: bool) -> list[str]:
    latency, memory = item.latency, item.memory
    figures = (latency.p50_ms, latency.mean_ms, latency.p90_ms, latency.p99_ms)
    ratio = "baseline" if is_baseline else ""
    if item.speed_up is not None:
        ratio = f"{item.speed_up.median:.3f}× ({item.speed_up.p25:.3f}–{item.speed_up.p75:.3f})"
    return [
        item.engine,
        *(f"{figure:.2f}" for figure in figures),
        f"{latency.throughput_images_per_s:.1f}",
        ratio,
        "" if memory is None else f"{memory.peak_rss_bytes / 1e6:.0f}",
        "" if memory is None else f"{memory.engine_bytes / 1e6:.2f}",
    ]


def _caveats(everyone: list[EngineProfile]) -> list[str]:
    lines = [f"{item.engine}: {item.latency.warning}" for item in everyone if item.latency.warning]
    lines += [f"{item.engine}: its parity was not checked" for item in everyone if item.parity is None]
    if any(item.model is not None and item.model.weights == "random" for item in everyone):
        lines.append(RANDOM_WARNING)
    return lines
