"""What an artifact is and what it holds, without running it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from eamdeploy.artifacts.card import Freezing, ModelCard
from eamdeploy.artifacts.documents import DocumentKind, read_document
from eamdeploy.artifacts.onnx_files import digest_model, model_bytes, model_files
from eamdeploy.artifacts.records import Record
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.packing import packed_size
from eamdeploy.eam.records import AttentionShape, Checkpoint
from eamdeploy.eam.selection import PLURALS
from eamdeploy.engines.manifest import Manifest, read_manifest
from eamdeploy.engines.registry import open_runner
from eamdeploy.errors import ConfigError
from eamdeploy.parity.reference_set import ReferenceSet
from eamdeploy.records.diagnosis import Diagnosis
from eamdeploy.records.profile import EngineProfile, Profile
from eamdeploy.remote.profile import RemoteProfiles


class Inspection(Record):
    """What `inspect` found.

    Attributes:
        kind: what the file is, in words.
        bytes, digest: of all its files, where an ONNX model has several.
        details: what it says, by topic; values are text, numbers or lists of them.
    """

    file: str
    kind: str
    bytes: int
    digest: str
    details: dict[str, JsonValue]


def inspect(path: Path, *, verify: bool = True) -> Inspection:
    """A description of any file that a stage writes, or of any ONNX model.

    Args:
        verify: checkpoints, reference sets and exported models must be as they were written; False for one that was
            changed on purpose.

    Raises:
        ConfigError: the file can't be read, or is of no known kind.
        CheckpointError, EngineError: it is damaged, or was altered after it was written.
    """
    digest = digest_model(path)
    describe = _BY_SUFFIX.get(path.suffix.lower())
    if describe is None:
        raise ConfigError(
            f"cannot tell what {path} is", expected=f"a file that ends in {', '.join(_BY_SUFFIX)}", got=path.suffix
        )
    kind, details = describe(path, verify)
    return Inspection(file=str(path), kind=kind, bytes=model_bytes(path), digest=digest, details=details)


def _checkpoint(path: Path, verify: bool) -> tuple[str, dict[str, JsonValue]]:
    loaded = checkpoints.load(path, verify=verify)
    header = loaded.header
    details: dict[str, JsonValue] = {
        "model": header.timm_model,
        "weights": header.weights,
        "classes": header.num_classes,
        "image size": list(header.preprocessing.size),
        "attention modules": len(header.attention),
        **_windows(header.attention),
        **_freezing(header.freezing),
        **_frozen_maps(loaded),
        "weight tensors": len(loaded.weights),
        "weight bytes": sum(int(weight.nbytes) for weight in loaded.weights.values()),
        "unaltered": _unaltered(sealed=header.content_digest is not None, verify=verify),
    }
    if header.calibration is not None:
        details["calibration"] = f"{header.calibration.n_images} images of {header.calibration.source}"
    if (recovery := header.recovery) is not None:
        details["recovery"] = (
            f"{recovery.method}: {recovery.what_changed}, "
            f"from {recovery.n_images} images of {recovery.source}; agreement with the unfrozen model "
            f"{recovery.before.agreement:.1f} → {recovery.after.agreement:.1f} %"
        )
    return "EAM checkpoint", details


def _unaltered(*, sealed: bool, verify: bool) -> str:
    """Whether a file that could be loaded is known to be as it was written."""
    if not sealed:
        return "not known: the file records no digest of its contents"
    return "yes, by the digest that it records" if verify else "not checked"


def _windows(attention: Mapping[str, AttentionShape]) -> dict[str, JsonValue]:
    """How many windows and window maps every module has; nothing for a model without windows."""
    lines: list[JsonValue] = [
        f"{path}: {shape.n_windows} of {shape.tokens} tokens, window maps: {shape.n_maps}"
        for path, shape in attention.items()
        if shape.windows is not None
    ]
    return {"windows": lines} if lines else {}


def _frozen_maps(loaded: Checkpoint) -> dict[str, JsonValue]:
    """How many pieces of every module are frozen, where they are not whole heads, and what their values take."""
    freezing, attention = loaded.header.freezing, loaded.header.attention
    codes = sum(
        packed_size(item.frozen_entries * attention[path].n_maps, freezing.bits) for path, item in loaded.frozen.items()
    )
    if freezing.granularity == "head":
        groups = [group for each in loaded.factors.values() for group in each]
        sizes = [part.size for group in groups for part in (group.mix_codes, group.pool_codes)]
        factors = sum(packed_size(size, freezing.bits) for size in sizes)
        return {"frozen map bytes": codes, **({"factor bytes": factors} if groups else {})}
    masks = {path: item.mask for path, item in loaded.frozen.items() if item.mask is not None}
    counts = {path: (np.count_nonzero(mask), attention[path].heads * mask[0].size) for path, mask in masks.items()}
    return {
        f"frozen {PLURALS[freezing.granularity]}{' of every window' if freezing.window_maps else ''}": [
            f"{path}: {frozen} of {total} ({frozen / total:.1%})" for path, (frozen, total) in counts.items()
        ],
        "frozen map bytes": codes,
        "mask bytes": sum(packed_size(mask.size, 1) for mask in masks.values()),
    }


def _onnx(path: Path, verify: bool) -> tuple[str, dict[str, JsonValue]]:
    with open_runner(path, threads=1, verify=verify) as runner:
        card, io = runner.card, runner.io
    details: dict[str, JsonValue] = {
        "input": f"{io.input_name} {'uint8 ' if io.takes_pixels else ''}{[size or 'batch' for size in io.input_shape]}",
        "output": io.output_name,
        "classes": io.num_classes,
    }
    details |= _data_files(path) | _card(card) | _nodes(path)
    manifest = read_manifest(path)
    if manifest is not None:
        return "ONNX Runtime engine", {**details, **_built(manifest)}
    return ("ONNX model" if card is None else "exported ONNX model"), details


def _data_files(path: Path) -> dict[str, JsonValue]:
    """The files that the weights are in, where that is not the model's own."""
    others = [str(file.relative_to(path.parent)) for file in model_files(path)[1:]]
    return {"weights in": list(others)} if others else {}


def _plan(path: Path, _: bool) -> tuple[str, dict[str, JsonValue]]:
    """What the manifest says; a plan itself can be read only by the TensorRT that built it, on a GPU."""
    manifest = read_manifest(path)
    if manifest is None:
        return "TensorRT engine without a manifest", {}
    details = _card(manifest.card) | _built(manifest)
    details["batch"] = manifest.batch or "dynamic"
    if manifest.device is not None:
        nested = {"engine_layers", "layer_ms", "baseline", "calibration"}
        details |= manifest.device.model_dump(mode="json", exclude_none=True, exclude=nested)
        layers = manifest.device.engine_layers
        if layers is not None:
            details["layers"] = layers.layers
            details["fused attention"] = list(layers.fused_attention)
            details["frozen maps"] = [item.in_words for item in layers.frozen_maps]
    return "TensorRT engine", details


def _card(card: ModelCard | None) -> dict[str, JsonValue]:
    if card is None:
        return {}
    return {
        "model": card.timm_model,
        "weights": card.weights,
        "rewrites": list(card.rewrites),
        "exporter": card.exporter,
        "checkpoint": card.checkpoint_digest,
        **({} if card.freezing is None else _freezing(card.freezing)),
    }


def _nodes(path: Path) -> dict[str, JsonValue]:
    """Operators and integer constants; nothing on a board, where the package onnx is not installed."""
    try:
        import onnx

        from eamdeploy.graph.operator_set import operator_set
    except ModuleNotFoundError:
        return {}
    model = onnx.load(str(path), load_external_data=False)
    counts = Counter(node.op_type for node in model.graph.node)
    integers = (onnx.TensorProto.UINT8, onnx.TensorProto.UINT16, onnx.TensorProto.INT8)
    maps = [item for item in model.graph.initializer if item.data_type in integers and len(item.dims) > 1]
    sizes = [math.prod(item.dims) * (2 if item.data_type == onnx.TensorProto.UINT16 else 1) for item in maps]
    return {
        "opset": operator_set(model),
        "nodes": sum(counts.values()),
        "operators": [f"{count} {name}" for name, count in counts.most_common()],
        "integer map constants": len(sizes),
        "integer map bytes": sum(sizes),
    }


def _built(manifest: Manifest) -> dict[str, JsonValue]:
    parity = "not checked" if manifest.parity is None else f"max |Δ logit| {manifest.parity.max_abs:.2e}"
    return {
        **({"provider": manifest.provider} if manifest.backend == "ort" else {}),
        "settings": [f"{key}={value}" for key, value in manifest.settings.items()],
        "threads": manifest.threads,
        "parity": parity,
        "built on": manifest.machine,
        "built": manifest.created,
    }


def _freezing(freezing: Freezing) -> dict[str, JsonValue]:
    whole = freezing.granularity == "head"
    heads = "frozen heads" if whole else f"heads with frozen {PLURALS[freezing.granularity]}"
    return {
        "sparsity": freezing.sparsity,
        heads: [f"{path}: {frozen}" for path, frozen in freezing.heads.items()],
        **({"heads of low rank": _low_rank(freezing)} if freezing.ranks else {}),
        "granularity": freezing.granularity,
        **({} if freezing.window_maps is None else {"window maps": freezing.window_maps}),
        "bits": freezing.bits,
        "quantizer": freezing.quantizer,
        "score": freezing.score,
    }


def _low_rank(freezing: Freezing) -> list[JsonValue]:
    """The heads of every module that are frozen with a rank."""
    lines: list[JsonValue] = []
    for path in freezing.ranks:
        ranks = [(head, freezing.rank_of(path, head)) for head in freezing.heads[path]]
        told = [f"{head} with rank {rank}" for head, rank in ranks if rank is not None]
        lines.append(f"{path}: {', '.join(told)}")
    return lines


def _reference(path: Path, verify: bool) -> tuple[str, dict[str, JsonValue]]:
    reference = ReferenceSet.load(path, verify=verify)
    return "reference set", {
        "images": list(reference.pixels.shape),
        "logits": list(reference.logits.shape),
        "source": reference.source,
        "model": reference.model_digest or "not known",
    }


def _json(path: Path, _: bool) -> tuple[str, dict[str, JsonValue]]:
    kind, document = read_document(path)
    if kind is None or kind not in _BY_KIND:
        shown = {key: value for key, value in document.items() if not isinstance(value, dict)}
        return kind or "JSON document", shown
    return kind, _BY_KIND[kind](path)


def _profile(path: Path) -> dict[str, JsonValue]:
    return _measured(Profile.read(path))


def _measured(profile: Profile) -> dict[str, JsonValue]:
    baseline = [] if profile.baseline is None else [f"{_engine(profile.baseline)}, the baseline"]
    return {
        "machine": f"{profile.device_before.name}, {profile.machine.system}",
        "measured": profile.machine.measured_at,
        "threads": profile.threads,
        "batch": profile.batch,
        "engines": [*baseline, *map(_engine, profile.engines)],
    }


def _engine(item: EngineProfile) -> str:
    ratio = item.speed_up
    against = "" if ratio is None else f", {ratio.median:.3f}× ({ratio.low:.3f}–{ratio.high:.3f}) {ratio.verdict}"
    return f"{item.engine}: p50 {item.latency.p50_ms:.2f} ms{against}"


def _profiles(path: Path) -> dict[str, JsonValue]:
    """Every machine's figures under its address."""
    found = RemoteProfiles.read(path)
    profiles: dict[str, JsonValue] = {
        f"{target} {name}": value
        for target, profile in found.profiles.items()
        for name, value in _measured(profile).items()
    }
    return profiles | {f"{target} failed": failure.message for target, failure in found.failures.items()}


def _diagnosis(path: Path) -> dict[str, JsonValue]:
    found = Diagnosis.read(path)
    return {
        "machine": f"{found.machine.cpu}, {found.machine.system}",
        "diagnosed": found.machine.measured_at,
        "can": [item.name for item in found.capabilities if not item.missing],
        **{f"lacks for {item.name}": list(item.missing) for item in found.capabilities if item.missing},
    }


_BY_KIND: dict[DocumentKind, Callable[[Path], dict[str, JsonValue]]] = {
    "profile": _profile,
    "profiles of machines": _profiles,
    "diagnosis": _diagnosis,
}

_BY_SUFFIX: dict[str, Callable[[Path, bool], tuple[str, dict[str, JsonValue]]]] = {
    ".safetensors": _checkpoint,
    ".onnx": _onnx,
    ".plan": _plan,
    ".engine": _plan,
    ".npz": _reference,
    ".json": _json,
}
