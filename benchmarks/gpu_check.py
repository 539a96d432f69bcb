"""TensorRT engines of DeiT-Tiny and Swin-Tiny on this machine's GPU: built, checked, measured side by side, inspected.

    python benchmarks/gpu_check.py build/gpu-check -o result.json

Needs the packages of a board that builds (the base packages, tensorrt, onnx, onnx-graphsurgeon, cuda-python), neither
torch nor a network, and the models that `gpu_models.py` made: a folder, or its archive. Whatever fails is written down,
and the rest goes on unless nothing can be built; after `--seconds` nothing more is built. What was left out is named.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from rich.console import Console
from rich.table import Table

from eamdeploy import build_trt, profile
from eamdeploy.artifacts.records import Record
from eamdeploy.cli import show_profile
from eamdeploy.devices.clock import utc_now
from eamdeploy.devices.provenance import machine_summary, package_versions
from eamdeploy.engines.manifest import EngineLayers, Manifest
from eamdeploy.engines.trt.backend import require_device
from eamdeploy.engines.trt.request import KeepFp32, TrtOptions
from eamdeploy.errors import EamDeployError, ExitCode
from eamdeploy.parity.reference_set import reference_path
from eamdeploy.profiling.timing import Schedule
from eamdeploy.records.profile import Profile
from eamdeploy.stages.profile import Extras

Precision = Literal["fp32", "fp16", "int8", "int8-fp32"]


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        model: its file's name, without the end.
        precision: `int8` leaves to FP16 what is not quantized, `int8-fp32` to FP32.
        keep_fp32: what stays FP32 of it, as `build-trt --keep-fp32`.
    """

    model: str
    precision: Precision
    keep_fp32: KeepFp32 = "auto"

    @property
    def name(self) -> str:
        suffix = "" if self.keep_fp32 == "auto" else f"-keep-{self.keep_fp32}"
        return f"{self.model}-{self.precision}{suffix}"

    @property
    def int8(self) -> bool:
        return self.precision.startswith("int8")

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case of `MODEL:PRECISION` or `MODEL:PRECISION:KEEP`.

        Raises:
            ValueError: it is not of that form, or there is no such precision or thing to keep.
        """
        model, precision, *keep = text.split(":")
        if precision not in get_args(Precision) or any(each not in get_args(KeepFp32) for each in keep) or keep[1:]:
            raise ValueError(text)
        return cls(model, cast(Precision, precision), *cast(list[KeepFp32], keep))


# What is compared, in the order of how much each tells; the first of a group is its baseline.
GROUPS: tuple[tuple[Case, ...], ...] = (
    (
        Case("deit-base", "fp16"),
        Case("deit-stock", "fp16"),
        Case("deit-heads-20", "fp16"),
        Case("deit-base", "fp16", "norm-softmax"),
        Case("deit-base-int8", "int8"),
        Case("deit-heads-20-int8", "int8"),
        Case("deit-base-int8", "int8-fp32"),
        Case("deit-heads-50", "fp16"),
        Case("deit-heads-100", "fp16"),
        Case("deit-layers-25", "fp16"),
        Case("deit-heads-25", "fp16"),
        Case("deit-all-tokens", "fp16"),
        Case("deit-layers-50", "fp16"),
        Case("deit-base", "fp16", "norm"),
    ),
    (Case("deit-base", "fp32"), Case("deit-heads-20", "fp32"), Case("deit-heads-100", "fp32")),
    (Case("swin-base", "fp16"), Case("swin-heads-20", "fp16")),
)
# Images at once; the engines take up to 8. One image leaves most of a large GPU idle.
BATCHES = (1, 8)
_HOPELESS = 3  # cases; where that many fail and none is built, the others won't be either


class Built(Record):
    """What became of one case.

    Attributes:
        build_s: the builder, the gate and all.
        error: why there is no engine; None where there is one.
        layers: what the engine's inspector says.
    """

    name: str
    build_s: float
    error: str | None = None
    engine_bytes: int | None = None
    device_memory_bytes: int | None = None
    top1_agreement: float | None = None
    max_abs: float | None = None
    layers: EngineLayers | None = None
    model_changes: list[str] | None = None


class GpuCheck(Record):
    """Everything that was found.

    Attributes:
        left_out: cases for which there was no time.
    """

    machine: str
    gpu: str
    tensorrt: str
    versions: dict[str, str]
    measured_at: str
    built: list[Built]
    profiles: list[Profile]
    left_out: list[str]

    @property
    def failed(self) -> bool:
        return any(item.error for item in self.built)


def main() -> int:
    """Print the tables and write the JSON; exit code 3 if anything failed, 4 if there is nothing to run it on."""
    arguments = _parse()
    try:
        require_device()
    except EamDeployError as err:
        sys.stderr.write(f"error: {err}\n")
        return err.exit_code
    with tempfile.TemporaryDirectory() as scratch:
        models = _unpacked(arguments.models, Path(scratch) / "models")
        work = arguments.keep or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result = run(
            models,
            work,
            seconds=arguments.seconds,
            groups=arguments.group or GROUPS,
            sittings=arguments.sittings,
            batches=BATCHES,
        )
    console = Console(width=200)
    console.print(table(result))
    for measured in result.profiles:
        console.print(show_profile.profile(measured))
    if arguments.output:
        result.write(arguments.output)
    return ExitCode.GATE_FAILED if result.failed else ExitCode.DONE


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="folder or .tar.xz from gpu_models.py")
    parser.add_argument(
        "--group",
        type=Case.parse,
        nargs="+",
        action="append",
        metavar="MODEL:PRECISION[:KEEP]",
        help="engines that take turns, the baseline first, instead of those that are always compared; may be repeated",
    )
    parser.add_argument("--seconds", type=float, default=330.0, help="build nothing more after this long")
    parser.add_argument("--sittings", type=int, default=3, help="how often engines are loaded anew to time them")
    parser.add_argument("--keep", type=Path, help="folder in which engines and the builder's logs stay")
    parser.add_argument("-o", "--output", type=Path, help="also write everything as JSON")
    return parser.parse_args()


def _unpacked(models: Path, folder: Path) -> Path:
    if models.is_dir():
        return models
    with tarfile.open(models, "r:xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(
    models: Path,
    work: Path,
    *,
    seconds: float,
    groups: Sequence[Sequence[Case]],
    sittings: int,
    batches: Sequence[int],
) -> GpuCheck:
    """Builds and measures the cases, whose files are in `models`, at each batch size; engines go to `work`."""
    until = time.monotonic() + seconds
    built: list[Built] = []
    left_out: list[str] = []
    profiles: list[Profile] = []
    manifests: list[Manifest] = []
    for group in groups:
        engines = []
        for case in group:
            if time.monotonic() > until or (len(built) >= _HOPELESS and all(item.error for item in built)):
                left_out.append(case.name)
                continue
            item, manifest = _build(case, models, work)
            built.append(item)
            if manifest is not None:
                manifests.append(manifest)
                engines.append(work / f"{case.name}.plan")
        if engines:
            profiles.extend(_profile(engines, sittings, batch) for batch in batches)
    device = manifests[0].device if manifests else None
    return GpuCheck(
        machine=machine_summary(),
        gpu=f"{device.gpu} (compute capability {device.compute_capability})" if device else "unknown",
        tensorrt=device.runtime if device else "unknown",
        versions=package_versions(),
        measured_at=utc_now(),
        built=built,
        profiles=profiles,
        left_out=left_out,
    )


def _build(case: Case, models: Path, work: Path) -> tuple[Built, Manifest | None]:
    model, engine = models / f"{case.model}.onnx", work / f"{case.name}.plan"
    options = TrtOptions(
        precision="fp32" if case.precision.endswith("fp32") else "fp16",
        int8=case.int8,
        keep_fp32=case.keep_fp32,
        timing_cache=work / "timing.cache",
    )
    start = time.monotonic()
    sys.stderr.write(f"building {case.name}\n")
    try:
        manifest = build_trt(
            model,
            engine,
            options,
            check=reference_path(model).exists(),  # a stock export has none
            min_agreement=85.0 if case.int8 else None,
        )
    except EamDeployError as err:
        return Built(name=case.name, build_s=time.monotonic() - start, error=str(err)), None
    parity, device = manifest.parity, manifest.device
    return (
        Built(
            name=case.name,
            build_s=time.monotonic() - start,
            engine_bytes=manifest.engine_bytes,
            device_memory_bytes=device.device_memory_bytes if device else None,
            top1_agreement=parity.top1_agreement if parity else None,
            max_abs=parity.max_abs if parity else None,
            layers=device.engine_layers if device else None,
            model_changes=device.model_changes if device else None,
        ),
        manifest,
    )


def _profile(engines: Sequence[Path], sittings: int, batch: int) -> Profile:
    """All engines take turns; named by file, not by a temporary path."""
    measured = profile(
        engines[1:] or engines,
        engines[0] if len(engines) > 1 else None,
        threads=1,
        batch=batch,
        schedule=Schedule(min_seconds=1.5, sittings=sittings),
        extras=Extras(fresh=False, power_seconds=0.5),
    )
    return Profile.parse(measured.model_dump_json().replace(f"{engines[0].parent}/", ""), "the profile")


def table(result: GpuCheck) -> Table:
    """One row for each case."""
    shown = Table(title=f"TensorRT {result.tensorrt} on {result.gpu}, {result.measured_at}", title_justify="left")
    for name in ("engine", "build s", "plan MB", "top-1 equal", "max |Δ|", "layers", "fused attention", "frozen maps"):
        shown.add_column(name, justify="left" if name in ("engine", "frozen maps") else "right")
    for item in result.built:
        if item.error:
            shown.add_row(item.name, f"{item.build_s:.0f}", "", "", "", "", "", item.error)
            continue
        layers = item.layers
        shown.add_row(
            item.name,
            f"{item.build_s:.0f}",
            f"{(item.engine_bytes or 0) / 1e6:.1f}",
            "" if item.top1_agreement is None else f"{item.top1_agreement:.1f} %",
            "" if item.max_abs is None else f"{item.max_abs:.2g}",
            "" if layers is None else str(layers.layers),
            "" if layers is None else str(len(layers.fused_attention)),
            "" if layers is None else ", ".join(sorted({str(found.type) for found in layers.frozen_maps})),
        )
    for name in result.left_out:
        shown.add_row(name, "", "", "", "", "", "", "left out")
    return shown


if __name__ == "__main__":
    sys.exit(main())
