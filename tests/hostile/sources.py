"""What the campaign hurts: for every kind of file, how it is read, and what may come of a hurt one.

A sealed file is right or refused: what comes out of it is what came out of the good one. Of a foreign file anything may
come out that the file can mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.records import Record
from eamdeploy.convert.ort_form import OrtForm
from eamdeploy.convert.ranges import ActivationRanges
from eamdeploy.devices.tegrastats import parse_line
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.records import FrozenFactors
from eamdeploy.engines.manifest import Manifest, read_manifest
from eamdeploy.engines.registry import open_runner
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.host.maps_file import read_maps
from eamdeploy.host.model import read_weights
from eamdeploy.images.source import ImageSource, read_class_names
from eamdeploy.lint.linter import lint_file
from eamdeploy.observer import SILENT
from eamdeploy.parity.reference_set import ReferenceSet
from eamdeploy.pipeline.config import load_config
from eamdeploy.reporting.records.sources import read_sources
from eamdeploy.stages.build_ort import build_ort
from eamdeploy.stages.build_trt import plan_trt_build
from eamdeploy.stages.inspect import inspect
from hostile.byte_mutations import BYTE_MUTATIONS, Mutation, unhurt
from hostile.format_mutations import (
    CHECKPOINT_MUTATIONS,
    IMAGE_MUTATIONS,
    NPZ_MUTATIONS,
    ONNX_MUTATIONS,
    SAFETENSORS_MUTATIONS,
    SEALED_AGAIN,
    ZIP_MUTATIONS,
)
from hostile.text_mutations import CSV_MUTATIONS, JSON_MUTATIONS, LINE_MUTATIONS, TOML_MUTATIONS

HOW = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
OUT = "out"
"""The folder for outputs beside the hurt file; `x` in it, with any suffix, was there before."""

Reader = Callable[[Path], str]
Command = Callable[[Path], list[object]]


@dataclass(frozen=True)
class Source:
    """A kind of file that is hurt.

    Attributes:
        file: the file in the folder of good ones.
        beside: what else is copied, unhurt.
        read: reads the file at a path and says what came out, equal where and only where that is equal.
        sealed: a hurt file is right or refused, by a seal inside it or by a digest in a file beside it.
        special: mutations by what the format says; none of the bytes' own where `only_special`.
        strangely_named: the file is what it was, but in front of its endings it has a name of `STRANGE_NAMES`.
        share: how many of 10,000 inputs are of this kind.
        command: the words of a command that reads the file too; run for one input in `command_every`.
    """

    name: str
    file: str
    read: Reader
    share: int
    sealed: Literal["no", "inside", "beside"] = "no"
    beside: tuple[str, ...] = ()
    special: Mapping[str, Mutation] = field(default_factory=dict)
    only_special: bool = False
    strangely_named: bool = False
    command: Command | None = None
    command_every: int = 5

    @property
    def mutations(self) -> list[Mutation]:
        """All that apply; the format's own as often as the bytes' together."""
        if self.strangely_named:
            return [unhurt]
        plain = [] if self.only_special else list(BYTE_MUTATIONS.values())
        repeat = max(1, len(plain) // max(1, len(self.special)))
        return plain + list(self.special.values()) * repeat


# --- what comes out --------------------------------------------------------------------------------------------------


def fingerprint(*values: object) -> str:
    """A digest of arrays, bytes and texts."""
    sha = hashlib.sha256()
    for value in values:
        if isinstance(value, np.ndarray):
            sha.update(repr((value.dtype.str, value.shape)).encode() + np.ascontiguousarray(value).tobytes())
        else:
            sha.update(value if isinstance(value, bytes) else repr(value).encode(errors="surrogatepass"))
        sha.update(b"\n")
    return sha.hexdigest()


def _checkpoint(path: Path) -> str:
    loaded = checkpoints.load(path)
    frozen = [
        part
        for module, maps in sorted(loaded.frozen.items())
        for part in (module, maps.heads, maps.codes, maps.scales, maps.mask)
    ]
    weights = (part for item in sorted(loaded.weights.items()) for part in item)
    return fingerprint(loaded.header, *weights, *frozen, *_parts_of(loaded.factors))


def _reference(path: Path) -> str:
    loaded = ReferenceSet.load(path)
    return fingerprint(loaded.pixels, loaded.logits, loaded.source, loaded.model_digest)


def _weights(path: Path) -> str:
    state = sorted(read_weights(path).items())
    raw = {key: value.reshape(-1).contiguous().view(torch.uint8).numpy() for key, value in state}
    return fingerprint(*(part for key, value in state for part in (key, value.shape, value.dtype, raw[key])))


def _parts_of(factors: Mapping[str, tuple[FrozenFactors, ...]]) -> list[object]:
    return [
        part
        for module, groups in sorted(factors.items())
        for group in groups
        for part in (
            *(module, group.heads, group.mix_codes, group.mix_scales),
            *(group.pool_codes, group.pool_scales),
        )
    ]


def _maps(path: Path) -> str:
    given = read_maps(path, 4, "squared")
    maps = (part for key, item in given.maps.items() for part in (key, item.heads, item.codes))
    return fingerprint(*maps, *_parts_of(given.factors))


def _run(path: Path) -> str:
    """Logits of an engine or a model for a fixed input, and how it was opened."""
    with open_runner(path) as runner:
        batch, *shape = runner.io.input_shape
        if np.prod(shape, dtype=object) * (batch or 1) > 1 << 22:
            return "too large to run here"
        images = (np.arange((batch or 1) * int(np.prod(shape))) % 7).astype(runner.io.dtype)
        return fingerprint(
            runner.infer(images.reshape(batch or 1, *shape)), runner.card, sorted(runner.settings.items())
        )


def _run_engine_of_manifest(path: Path) -> str:
    """The engine that a manifest stands beside."""
    return _run(path.with_suffix(""))


def _build(path: Path) -> str:
    build_ort(path, path.parent / OUT / "x.ort.onnx", threads=1)
    return _run(path.parent / OUT / "x.ort.onnx")


def _build_of_reference(path: Path) -> str:
    return _build(path.with_name("x.onnx"))


def _convert(path: Path) -> str:
    engine = path.parent / OUT / "x.ort.onnx"
    build_ort(path, engine, threads=1, check=False, forms=[OrtForm(int8="dynamic")])
    return fingerprint(engine.read_bytes())


def _for_trt(path: Path) -> str:
    return fingerprint(plan_trt_build(path, TrtOptions(precision="fp16"), TrtVersion.parse("10.3")))


def _lint(path: Path) -> str:
    return fingerprint(lint_file(path, TrtVersion.parse("8.6")).findings)


def _plan(path: Path) -> str:
    return fingerprint(inspect(path).details)


def _plan_of_manifest(path: Path) -> str:
    manifest = read_manifest(path.with_suffix(""))
    return fingerprint(manifest, inspect(path.with_suffix("")).details)


def _record(kind: type[Record]) -> Reader:
    return lambda path: fingerprint(kind.read(path))


def _sources(path: Path) -> str:
    return fingerprint(*(item.record for item in read_sources([path]).items))


def _pictures(path: Path) -> str:
    source = ImageSource(path.parent)
    batches = source.batches(source.open(), HOW, 4, SILENT)
    return fingerprint(*(batch.pixels for batch in batches))


def _labels(path: Path) -> str:
    folder = ImageSource(path.parent).open_labelled(10, [f"class {index}" for index in range(10)])
    return fingerprint([file.name for file in folder.files], folder.labels)


def _lines(path: Path) -> str:
    text = path.read_bytes().decode(errors="replace")
    return fingerprint([parse_line(line) for line in text.split("\n")])


# --- commands --------------------------------------------------------------------------------------------------------


def _inspect(path: Path) -> list[object]:
    return ["inspect", path, "--json"]


def _evaluate(path: Path) -> list[object]:
    data, out = path.with_name("pictures"), path.parent / OUT / "x.json"
    return ["evaluate", path, "--data", data, "--images", 2, "-o", out, "--json"]


def _export(path: Path) -> list[object]:
    more = ["--exporter", "torchscript", "--no-measure", "--json"]
    return ["export", path, "-o", path.parent / OUT / "x.onnx", *more]


def _report(path: Path) -> list[object]:
    out = path.parent / OUT
    return ["report", path, "-o", out / "x.html", "--markdown", out / "x.md", "--json"]


def _pack(path: Path) -> list[object]:
    from tiny_models import NAME

    from hostile.good_files import KWARGS_HERE

    kwargs = [f"{key}={value}" for key, value in KWARGS_HERE.items()]
    weights = path.with_name("weights.safetensors")
    out = path.parent / OUT / "x.eam.safetensors"
    return ["pack", "--model", NAME, "--weights", weights, "--maps", path, "-o", out, "--model-kwargs", *kwargs]


def _analyze(path: Path) -> list[object]:
    from tiny_models import NAME

    from hostile.good_files import KWARGS_HERE

    kwargs = [f"{key}={value}" for key, value in KWARGS_HERE.items()]
    data, out = path.with_name("pictures"), path.parent / OUT / "x.json"
    return ["analyze", "--model", NAME, "--weights", path, "--data", data, "-o", out, "--model-kwargs", *kwargs]


def _evaluate_on(path: Path) -> list[object]:
    """The good engine on hurt images or labels."""
    return ["evaluate", path.parents[1] / "x.ort.onnx", "--data", path.parent, "--json"]


def _run_all(path: Path) -> list[object]:
    return ["run", path, "--json"]


def _build_command(path: Path) -> list[object]:
    return ["build-ort", path, "-o", path.parent / OUT / "x.ort.onnx", "--threads", 1, "--no-check", "--json"]


# --- the table -------------------------------------------------------------------------------------------------------

_ENGINE = ("x.ort.onnx", "x.ort.onnx.json")
_MODEL = ("x.onnx", "x.reference.npz")

# fmt: off
SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        source.name: source
        for source in (
            Source(
                *("checkpoint", "x.eam.safetensors", _checkpoint, 1200),
                sealed="inside", special=CHECKPOINT_MUTATIONS, command=_inspect,
            ),
            Source(
                *("checkpoint to evaluate", "x.eam.safetensors", _checkpoint, 100),
                sealed="inside", special=CHECKPOINT_MUTATIONS, command=_evaluate, command_every=1, beside=("pictures",),
            ),
            Source(
                *("checkpoint to export", "x.eam.safetensors", _checkpoint, 30),
                sealed="inside", special=CHECKPOINT_MUTATIONS, command=_export, command_every=1,
            ),
            Source(
                *("checkpoint of rows", "row.eam.safetensors", _checkpoint, 250),
                sealed="inside", special=CHECKPOINT_MUTATIONS, command=_report,
            ),
            Source(
                *("checkpoint of entries", "entry.eam.safetensors", _checkpoint, 250),
                sealed="inside", special=CHECKPOINT_MUTATIONS, command=_inspect,
            ),
            Source(
                *("checkpoint of ranks", "rank.eam.safetensors", _checkpoint, 250),
                sealed="inside", special=CHECKPOINT_MUTATIONS, command=_inspect,
            ),
            Source(
                *("checkpoint, sealed again", "x.eam.safetensors", _checkpoint, 500),
                special=SEALED_AGAIN, only_special=True, command=_evaluate, beside=("pictures",),
            ),
            Source(
                *("checkpoint without a seal", "old.eam.safetensors", _checkpoint, 400),
                special=CHECKPOINT_MUTATIONS, command=_evaluate, beside=("pictures",),
            ),
            Source(
                *("weights", "weights.safetensors", _weights, 500),
                special=SAFETENSORS_MUTATIONS, command=_analyze, command_every=10, beside=("pictures",),
            ),
            Source(
                *("weights, .pth", "weights.pth", _weights, 500),
                special=ZIP_MUTATIONS, command=_analyze, command_every=10, beside=("pictures",),
            ),
            Source(
                *("weights, older .pth", "legacy.pth", _weights, 300),
                command=_analyze, command_every=10, beside=("pictures",),
            ),
            Source(
                *("maps, .npz", "maps.npz", _maps, 400),
                special=NPZ_MUTATIONS, command=_pack, beside=("weights.safetensors",), command_every=10,
            ),
            Source(
                *("maps and factors", "factors.npz", _maps, 200),
                special=NPZ_MUTATIONS, command=_pack, beside=("weights.safetensors",), command_every=10,
            ),
            Source(
                *("maps, .safetensors", "maps.safetensors", _maps, 200),
                special=SAFETENSORS_MUTATIONS, command=_pack, beside=("weights.safetensors",), command_every=10,
            ),
            Source(
                *("reference set", "x.reference.npz", _reference, 700),
                sealed="inside", special=NPZ_MUTATIONS, command=_inspect,
            ),
            Source(
                *("reference set to build with", "x.reference.npz", _build_of_reference, 100),
                sealed="inside", special=NPZ_MUTATIONS, beside=_MODEL,
            ),
            Source(
                *("exported model", "x.onnx", _run, 250),
                sealed="beside", special=ONNX_MUTATIONS, beside=("x.reference.npz",), command=_inspect,
            ),
            Source(
                *("exported model to build from", "x.onnx", _build, 100),
                sealed="beside", special=ONNX_MUTATIONS, beside=("x.reference.npz",),
            ),
            Source(
                *("exported model alone", "alone.onnx", _run, 300),
                special=ONNX_MUTATIONS, command=_build_command,
            ),
            Source(
                *("foreign ONNX model", "foreign.onnx", _run, 500),
                special=ONNX_MUTATIONS, command=_inspect,
            ),
            Source(*("ONNX model to lint", "alone.onnx", _lint, 300), special=ONNX_MUTATIONS),
            Source(*("ONNX model for INT8", "alone.onnx", _convert, 80), special=ONNX_MUTATIONS),
            Source(*("ONNX model for TensorRT", "alone.onnx", _for_trt, 80), special=ONNX_MUTATIONS),
            Source(
                *("engine", "x.ort.onnx", _run, 200),
                sealed="beside", special=ONNX_MUTATIONS, beside=("x.ort.onnx.json", "pictures"), command=_evaluate,
            ),
            Source(
                *("engine's manifest", "x.ort.onnx.json", _run_engine_of_manifest, 300),
                sealed="inside", special=JSON_MUTATIONS, beside=("x.ort.onnx",), command=_report,
            ),
            Source(
                *("plan", "x.plan", _plan, 100),
                sealed="beside", beside=("x.plan.json",), command=_inspect,
            ),
            Source(
                *("plan's manifest", "x.plan.json", _plan_of_manifest, 200),
                sealed="inside", special=JSON_MUTATIONS, beside=("x.plan",), command=_inspect,
            ),
            Source(
                *("manifest of a TensorRT engine", "model.plan.json", _record(Manifest), 200),
                sealed="inside", special=JSON_MUTATIONS, command=_report,
            ),
            Source(
                *("run.json", "run.json", _sources, 250),
                sealed="inside", special=JSON_MUTATIONS, command=_report,
                beside=("evaluation.json", "model.ort.onnx.json", "pc.json"),
            ),
            Source(
                *("evaluation", "evaluation.json", _sources, 200),
                sealed="inside", special=JSON_MUTATIONS, command=_report,
            ),
            Source(
                *("profile", "board.json", _sources, 200),
                sealed="inside", special=JSON_MUTATIONS, command=_report,
            ),
            Source(
                *("profiles of machines", "machines.json", _sources, 150),
                sealed="inside", special=JSON_MUTATIONS, command=_report,
            ),
            Source(
                *("analysis", "analysis.json", _sources, 150),
                sealed="inside", special=JSON_MUTATIONS, command=_report,
            ),
            Source(
                *("export's JSON", "export.json", _sources, 200),
                special=JSON_MUTATIONS, command=_report,
            ),
            Source(
                *("doctor's JSON", "doctor.json", _plan, 60),
                sealed="inside", special=JSON_MUTATIONS, command=_inspect,
            ),
            Source(
                *("ranges", "x.ranges.json", _record(ActivationRanges), 100),
                sealed="inside", special=JSON_MUTATIONS, command=_inspect,
            ),
            *(
                Source(
                    *(f"image, .{suffix}", f"one_{suffix}/a.{suffix}", _pictures, share),
                    special=IMAGE_MUTATIONS, command=_evaluate_on, command_every=10, beside=_ENGINE,
                )
                for suffix, share in (("png", 250), ("jpg", 250), ("bmp", 100), ("ppm", 100), ("webp", 150))
            ),
            Source(
                *("labels.csv", "pictures/labels.csv", _labels, 300),
                special=CSV_MUTATIONS, command=_evaluate_on, beside=(*_ENGINE, "pictures"),
            ),
            Source(
                *("class names, JSON", "classes.json", lambda path: fingerprint(read_class_names(path)), 100),
                special=JSON_MUTATIONS,
            ),
            Source(
                *("class names, text", "classes.txt", lambda path: fingerprint(read_class_names(path)), 50),
            ),
            Source(
                *("configuration", "run.toml", lambda path: fingerprint(load_config(path)), 400),
                special=TOML_MUTATIONS, command=_run_all, beside=("pictures", "classes.txt"),
            ),
            Source(
                *("tegrastats", "tegrastats.txt", _lines, 250),
                special=LINE_MUTATIONS,
            ),
            *(
                Source(
                    *(f"{kind} of a strange name", file, read, 50),
                    strangely_named=True, sealed="beside", command=command, command_every=1, beside=beside,
                )
                for kind, file, read, command, beside in (
                    ("checkpoint", "x.eam.safetensors", _checkpoint, _report, ()),
                    ("checkpoint to evaluate,", "x.eam.safetensors", _checkpoint, _evaluate, ("pictures",)),
                    ("maps", "maps.npz", _maps, _pack, ("weights.safetensors",)),
                    ("weights", "weights.safetensors", _weights, _analyze, ("pictures",)),
                    ("reference set", "x.reference.npz", _reference, _inspect, ()),
                    ("ONNX model", "foreign.onnx", _run, _inspect, ()),
                    ("ONNX model to build from,", "alone.onnx", _lint, _build_command, ()),
                    ("evaluation", "evaluation.json", _sources, _report, ()),
                    ("image", "one_png/a.png", _pictures, _evaluate_on, _ENGINE),
                )
            ),
        )
    }
)
# fmt: on
