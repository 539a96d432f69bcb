"""Engines as their manifests describe them, as the plain figures that a report shows."""

from __future__ import annotations

from dataclasses import dataclass

from eamdeploy.engines.manifest import DeviceBuild, Manifest
from eamdeploy.reporting import numbers
from eamdeploy.reporting.records.layers import LayerTimes, layer_times
from eamdeploy.reporting.records.machines import Facts
from eamdeploy.reporting.records.measurements import runtime_name
from eamdeploy.reporting.records.sources import Sources


@dataclass(frozen=True)
class Build:
    """An engine as its manifest describes it.

    Attributes:
        digest: SHA-256 of the engine.
        layers: None where they were not timed.
        frozen_maps: each map's constant, the layer that holds it and the type it has there; None where it has none.
    """

    file: str
    name: str
    digest: str
    runtime: str
    facts: Facts
    layers: LayerTimes | None
    frozen_maps: tuple[tuple[str, str | None, str | None], ...]


def builds(sources: Sources) -> list[Build]:
    """One for each manifest."""
    return [_build(item.file, item.record) for item in sources.of(Manifest)]


def _build(file: str, manifest: Manifest) -> Build:
    device, name, digest = manifest.device, manifest.engine, manifest.engine_digest
    maps = [] if device is None or device.engine_layers is None else device.engine_layers.frozen_maps
    return Build(
        file=file,
        name=name,
        digest=digest,
        runtime=runtime_name(manifest.backend, manifest.provider),
        facts=_build_facts(manifest),
        layers=None
        if device is None
        else layer_times(name, digest, f"when it was built, on {device.gpu}", device.layer_ms),
        frozen_maps=tuple((item.frozen_map, item.layer, item.type) for item in maps),
    )


def _build_facts(manifest: Manifest) -> Facts:
    parity, card = manifest.parity, manifest.card
    checked = "NOT CHECKED"
    if parity is not None:
        worst = "not finite" if parity.max_abs is None else f"max |Δ logit| {numbers.scientific(parity.max_abs)}"
        tied = f", tied for {parity.ties} more" if parity.ties else ""
        checked = (
            f"{worst}, first class equal for {parity.top1_agreement:.4g} % of {parity.n} images{tied} "
            f"(tolerance {parity.tolerance})"
        )
    facts = {
        "file": f"{numbers.size(manifest.engine_bytes)}, {numbers.digest(manifest.engine_digest)}",
        "made of": f"ONNX model {numbers.digest(manifest.model_digest)}",
        "batch": "dynamic" if manifest.batch is None else str(manifest.batch),
        "parity": checked,
        "rewrites": "" if card is None else ", ".join(card.rewrites),
        "settings": ", ".join(f"{key}={value}" for key, value in manifest.settings.items()),
        "built on": manifest.machine,
        "built": manifest.created,
        **({} if manifest.device is None else _device_facts(manifest.device)),
    }
    return tuple((name, value) for name, value in facts.items() if value)


def _device_facts(device: DeviceBuild) -> dict[str, str]:
    layers, twin = device.engine_layers, device.baseline
    compatible = [
        *(["newer TensorRT"] if device.version_compatible else []),
        *(["any GPU from Ampere"] if device.hardware_compatible else []),
    ]
    return {
        "TensorRT": device.runtime,
        "GPU": f"{device.gpu}, compute capability {device.compute_capability}",
        "precision": f"{device.precision.upper()}{', INT8' * device.int8}",
        "also runs on": ", ".join(compatible),
        "changed for it": "; ".join(device.model_changes) or "nothing",
        "device memory": numbers.size(device.device_memory_bytes),
        "layers": "" if layers is None else f"{layers.layers}, with fused attention: {len(layers.fused_attention)}",
        "fused attention": "" if layers is None else ", ".join(layers.fused_attention),
        "unfrozen twin": ""
        if twin is None
        else f"{twin.engine}: {numbers.size(twin.engine_bytes)}, {twin.layers or 'unknown'} layers",
        "log": device.log,
    }
