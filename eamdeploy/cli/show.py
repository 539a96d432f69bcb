"""Tables for people, made of the records that the stages return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eamdeploy.artifacts.card import RANDOM_WARNING, Freezing, Recovery, Training
from eamdeploy.cli import show_profile
from eamdeploy.cli.show_profile import SLOWEST
from eamdeploy.eam.records import AttentionShape, CheckpointHeader
from eamdeploy.eam.selection import PLURALS
from eamdeploy.engines.manifest import DeviceBuild, Manifest, TriedForm
from eamdeploy.engines.ort.providers import PROVIDERS
from eamdeploy.pipeline.run import RunReport
from eamdeploy.records.evaluation import EvaluationReport
from eamdeploy.stages.inspect import Inspection

if TYPE_CHECKING:
    from eamdeploy.eam.analysis import Analysis
    from eamdeploy.engines.trt.request import BuilderRequest
    from eamdeploy.lint.linter import LintReport
    from eamdeploy.records.diagnosis import Diagnosis, Finding
    from eamdeploy.records.export import Export
    from eamdeploy.records.gain import Gain
    from eamdeploy.stages.report import Report


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
        table.add_row(path, " ".join(_head(freezing, path, head) for head in range(shape.heads)))
    count, total = sum(map(len, freezing.heads.values())), sum(shape.heads for shape in attention.values())
    asked = "" if freezing.sparsity_asked is None else f" (asked for {freezing.sparsity_asked:.1%})"
    what = f"{'' if whole else f'{pieces} in '}{count} of {total} heads"
    stored = f"{freezing.bits} bits {freezing.quantizer}"
    windows = "" if freezing.window_maps is None else f"; window maps: {freezing.window_maps}"
    low_rank = [f"{number} with rank {rank}" for rank, number in freezing.low_rank.items()]
    what += f" ({', '.join(low_rank)})" if low_rank else ""
    lines = [f"sparsity {freezing.sparsity:.1%}{asked}: {what}, by {freezing.score}; {stored}{windows}"]
    if (cost := freezing.cost) is not None:
        lines.append(
            f"against the unfrozen model on {cost.n_images} calibration images: "
            f"agreement {cost.agreement:.1f} %, KL {cost.kl:.3g} nats"
        )
    return Group(table, Text("\n".join(lines)))


def _head(freezing: Freezing, path: str, head: int) -> str:
    """A head with a star where something of it is frozen, and its rank where it has one."""
    if head not in freezing.heads.get(path, []):
        return f"{head} "
    rank = freezing.rank_of(path, head)
    return f"{head}*" if rank is None else f"{head}*r{rank}"


def checkpoint(header: CheckpointHeader) -> RenderableType:
    """What was frozen, whether it recovered, and a warning where the weights mean nothing."""
    recovered = [] if header.recovery is None else [Text(_recovered(header.recovery))]
    return _with_warning(Group(frozen_heads(header.freezing, header.attention), *recovered), header.weights)


def recovery(header: CheckpointHeader) -> RenderableType:
    """What recovery changed, layer by layer, and what it gained."""
    found = header.recovery
    assert found is not None, "the stage records it"
    table = Table(title="Recovered", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("layer", "new weights", "KL afterwards"):
        table.add_column(name)
    for path, layer in found.layers.items():
        table.add_row(path, f"ridge {layer.strength:.2g}" if layer.changed else "kept its own", f"{layer.kl:.3g} nats")
    shown: list[RenderableType] = [table]
    if found.training is not None:
        shown.append(_training(found.training))
    return _with_warning(Group(*shown, Text(_recovered(found))), header.weights)


def _training(found: Training) -> Table:
    """Every epoch of a training."""
    table = Table(title="Trained", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("epoch", "loss", "KL", "agreement"):
        table.add_column(name)
    for number, epoch in enumerate(found.epochs, start=1):
        table.add_row(str(number), f"{epoch.loss:.4g}", f"{epoch.kl:.3g} nats", f"{epoch.agreement:.1f} %")
    return table


def _recovered(found: Recovery) -> str:
    before, after = found.before, found.after
    return (
        f"recovered by {found.method} from {found.n_images - found.n_held_back} images: "
        f"{found.what_changed}\n"
        f"against the unfrozen model on {found.n_held_back} other images: agreement {before.agreement:.1f} → "
        f"{after.agreement:.1f} %, KL {before.kl:.3g} → {after.kl:.3g} nats"
    )


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
    for name, written in (("model", result.frozen), ("baseline", result.baseline), ("stock", result.stock)):
        if written is None:
            continue
        rows[name] = [
            f"{written.file} ({written.bytes:,} bytes)",
            f"{written.nodes_stock} nodes by torch's {written.exporter} exporter, "
            + (f"{written.nodes} after {', '.join(written.rewrites)}" if written.rewrites else "without any pass"),
            f"max |Δ logit| {written.parity.max_abs:.1e} to the reference forward, every top-1 equal "
            f"({written.parity.n} images in {written.reference})",
        ]
    if result.gain is not None:
        rows["gain"] = _gain(result.gain)
    return fields("Exported", rows)


def _gain(gain: Gain) -> str:
    """What freezing gained, in the words of the measurement."""
    speed, threads = gain.speed_up, f"{gain.threads} thread" + "s" * (gain.threads > 1)
    verdict = {"no difference": "no difference beyond the noise"}.get(speed.verdict, speed.verdict)
    return (
        f"{speed.median:.2f}× the speed of the unfrozen twin on ONNX Runtime CPU here, {threads}: {verdict} "
        f"(95 % interval {speed.low:.2f}–{speed.high:.2f}, {speed.rounds} rounds taking turns)"
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
    parts = [checkpoint(report.freezing), show_profile.profile(report.profile), stages]
    if report.evaluation is not None:
        parts.insert(1, evaluation(report.evaluation))
    return Group(*(line for part in parts for line in (part, Text())))


def manifest(built: Manifest) -> RenderableType:
    """What was built, and whether it was checked."""
    parity = "NOT CHECKED"
    if built.parity is not None:
        agreement = built.parity.top1_agreement
        equal = "every top-1 equal" if agreement == 100 else f"top-1 equal for {agreement:.4g} %"
        equal += f", tied for {built.parity.ties} more" if built.parity.ties else ""
        parity = f"max |Δ logit| {built.parity.max_abs:.1e} on {built.parity.n} images, {equal}"
    shown = fields(
        f"Engine {built.engine}",
        {
            "bytes": f"{built.engine_bytes:,}",
            "batch": built.batch or "dynamic",
            **({"provider": built.provider} if built.backend == "ort" else {}),
            "settings": [f"{key}={value}" for key, value in built.settings.items()],
            "parity": parity,
            **({} if built.device is None else _device(built.device)),
            **({} if built.tried is None else {"tried here": [_tried(form) for form in built.tried]}),
        },
    )
    return _with_warning(shown, built.card.weights if built.card else None)


def _tried(form: TriedForm) -> str:
    if form.refused is not None:
        return f"{form.form}: refused: {form.refused}"
    text = f"{form.form}: {form.p50_ms:.2f} ms"
    if form.speed_up is not None:
        text += f", {form.speed_up:.3f}x ({form.low:.3f} to {form.high:.3f})"
    return f"{text}, chosen" if form.chosen else text


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
        slowest = sorted(built.layer_ms.items(), key=lambda item: -item[1])[:SLOWEST]
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
    doubt = [] if report.doubt is None else [Text(f"Note: {report.doubt}.", style="yellow")]
    return _with_warning(Group(title, table, *doubt), report.weights)


def report(written: Report) -> RenderableType:
    """Where the report is, what it is about, and the caveats that it carries."""
    page = fields("Report", {"page": written.page, **({"Markdown": written.markdown} if written.markdown else {})})
    return Group(page, *(Text(line, style="yellow") for line in written.caveats))


def inspection(found: Inspection) -> RenderableType:
    """Everything that `inspect` found."""
    return fields(f"{found.file}: {found.kind}", {"bytes": f"{found.bytes:,}", "digest": found.digest, **found.details})


def doctor(found: Diagnosis) -> RenderableType:
    """What the machine has, and for each command what is missing here."""
    machine = found.machine
    clock = "" if machine.frequency_mhz is None else f", {machine.frequency_mhz:.0f} MHz now"
    most = "" if machine.max_frequency_mhz is None else f", {machine.max_frequency_mhz:.0f} MHz at most"
    governor = "" if machine.governor is None else f", governor {machine.governor}"
    rows: dict[str, object] = {
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "system": f"{machine.system}, {machine.architecture}",
        "CPU": f"{machine.cpu}, {machine.usable_cores} of {machine.cores} cores usable{clock}{most}{governor}",
        "instructions": _instructions(found),
        "memory": f"{found.memory_free_bytes / 1e9:.1f} of {machine.memory_bytes / 1e9:.1f} GB free",
        "ONNX Runtime": _finding(found.onnxruntime),
        "providers": ", ".join(map(_provider, found.providers)) or "none",
        "TensorRT": _finding(found.tensorrt),
        "GPU": _finding(found.gpu),
        **_device_rows(found),
    }
    table = Table(title="What can be done here", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("what")
    table.add_column("missing")
    told = {item.missing for item in (found.onnxruntime, found.tensorrt, found.gpu)}
    for item in found.capabilities:
        lines = [f"{line.partition('. ')[0]} (see above)" if line in told else line for line in item.missing]
        told.update(item.missing)
        table.add_row(Text(item.name), Text("\n".join(lines) or "nothing", style="yellow" if lines else "green"))
    return Group(fields("This machine", rows), Text(), table)


def _provider(ort_name: str) -> str:
    """ONNX Runtime's name for an execution provider, with ours for one that `build-ort --provider` knows."""
    ours = [name for name, provider in PROVIDERS.items() if provider.ort_name == ort_name]
    return f"{ours[0]} ({ort_name})" if ours else ort_name


def _instructions(found: Diagnosis) -> list[str]:
    """The processor's instruction sets, and what follows for INT8 where something does."""
    lines = [found.machine.instructions or "not known"]
    if found.int8_saturates:
        lines.append(
            "no VNNI: products of INT8 saturate here. Engines of build-ort are made so that theirs don't; "
            "what was quantized elsewhere may be wrong"
        )
    return lines


def _finding(item: Finding) -> str:
    return item.found or f"none: {item.missing}"


def _device_rows(found: Diagnosis) -> dict[str, object]:
    device = found.device
    if device is None:
        return {} if found.device_missing is None else {"device": f"none: {found.device_missing}"}
    locked = {None: "", True: ", locked", False: ", not locked"}[device.clocks_locked]
    rows: dict[str, object] = {
        "device": ", ".join([f"{device.name} ({device.kind})", *map(" ".join, device.software.items())]),
        "power mode": device.power_mode or "",
        "clocks": ", ".join(f"{name} {mhz:.0f} MHz" for name, mhz in device.clocks_mhz.items()) + locked,
        "temperatures": ", ".join(f"{name} {value:.0f} °C" for name, value in device.temperatures_c.items()),
        "throttling": ", ".join(device.throttling),
        "warnings": device.warnings,
    }
    return {name: value for name, value in rows.items() if value}


def _with_warning(shown: RenderableType, weights: str | None) -> RenderableType:
    return Group(shown, Text(RANDOM_WARNING, style="yellow")) if weights == "random" else shown
