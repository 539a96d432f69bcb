"""Options that several commands share, and how the command line spells values that Typer does not know."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from eamdeploy import vocabulary
from eamdeploy.artifacts.files import require_output
from eamdeploy.cli.spread import description
from eamdeploy.convert.ranges import CALIBRATION_IMAGES, Calibration, calibration_with
from eamdeploy.devices.base import Device
from eamdeploy.devices.registry import open_device
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import ConfigError
from eamdeploy.images.options import ExifTranspose, ImageOptions, MostImages, SkipBad, WhichFiles
from eamdeploy.images.source import ImageSource

_DEFAULT_TRT = "8.6"  # its graphs suit 10.x and 11.x too
_SIZE = re.compile(r"(\d{1,12})([KMG]?)(?:i?B)?", re.ASCII | re.IGNORECASE)
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30}
_LOCAL_OPTIONS = {"engines", "baseline", "output", "device", "remote_command", "ssh_config", "as_json"}
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")

Output = Annotated[Path, typer.Option("--output", "-o", help="File to write; it appears whole or not at all.")]
Model = Annotated[str, typer.Option("--model", help="timm architecture, e.g. deit_tiny_patch16_224.")]
Weights = Annotated[
    str,
    typer.Option(help="'pretrained' (timm's own), 'random' (seeded, for latency only), .safetensors or .pth."),
]
ModelKwargs = Annotated[
    list[str], typer.Option("--model-kwargs", help="timm.create_model arguments: img_size=112 num_classes=10 …")
]
ClassNames = Annotated[Path | None, typer.Option(help="Class names in order: a JSON list, or a text file, one a line.")]
LabelOrder = Annotated[
    vocabulary.ClassOrder | None,
    typer.Option(
        "--class-order",
        help="What labels mean: class names, class numbers, or one for each class, sorted as timm (natural) or as "
        "torchvision (letters) does.",
        show_default="found out if there is but one way",
    ),
]
LabelNames = Annotated[
    Path | None,
    typer.Option("--class-names", help="The model's class names, in place of those it carries: as for freeze."),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify", help="Refuse files that were altered after they were written; not those made before."
    ),
]
Bits = Annotated[int, typer.Option(help=description(FreezeOptions, "bits"))]
Quantizer = Annotated[vocabulary.Quantizer, typer.Option(help=description(FreezeOptions, "quantizer"))]
Seed = Annotated[int, typer.Option(help="For --weights random.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads inside one inference; every usable core by default.")]
Workspace = Annotated[
    str | None,
    typer.Option(help="Most memory that a layer may use: bytes, or like 512M or 2G.", show_default="all of it"),
]
MinBatch = Annotated[int | None, typer.Option(min=1, help="Dynamic batch: the smallest.", show_default="1")]
OptBatch = Annotated[int | None, typer.Option(min=1, help="… the one that kernels are chosen for.", show_default="1")]
MaxBatch = Annotated[int | None, typer.Option(min=1, help="… the largest at once.", show_default="8")]
MinAgreement = Annotated[
    float | None,
    typer.Option(help="Percent of first classes that must be the reference's; not for FP32.", show_default="99"),
]
Reference = Annotated[
    Path | None, typer.Option(help="Reference set of the parity gate; by default the one beside the model.")
]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Run the parity gate.")]
CheckHere = Annotated[
    bool,
    typer.Option(
        "--check/--no-check", help="Prove engines anew that were proved on another kind of processor than this one."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; text for people goes to stderr.")]


@dataclass(frozen=True)
class ReferenceImages:
    """Images that may be left out."""

    data: Annotated[
        Path | None, typer.Option(help="Folder of images for the parity reference; synthetic ones by default.")
    ] = None
    images: MostImages = ImageOptions.images
    split: WhichFiles = ImageOptions.split
    skip_bad: SkipBad = ImageOptions.skip_bad
    exif_transpose: ExifTranspose = ImageOptions.exif_transpose

    @property
    def source(self) -> ImageSource | None:
        """The images; None where no folder was named."""
        if self.data is None:
            return None
        return ImageSource(self.data, self.split, self.images, self.skip_bad, self.exif_transpose)


@dataclass(frozen=True)
class CalibrationArguments:
    """Images that tell the ranges of activations, for static INT8."""

    calib_data: Annotated[
        Path | None, typer.Option(help="With --int8: folder of images that tell the ranges of activations.")
    ] = None
    calib_images: Annotated[int, typer.Option(min=1, help="… at most that many of them.")] = CALIBRATION_IMAGES
    calib_split: WhichFiles = ImageOptions.split
    calib_method: Annotated[
        vocabulary.CalibrationMethod, typer.Option(help="… and how ranges follow from their values.")
    ] = "percentile"
    calib_cache: Annotated[
        Path | None,
        typer.Option(help="File that keeps the ranges for the next build.", show_default="ENGINE.ranges.json"),
    ] = None
    skip_bad: SkipBad = ImageOptions.skip_bad
    exif_transpose: ExifTranspose = ImageOptions.exif_transpose

    @property
    def calibration(self) -> Calibration | None:
        """The images and how they are used; None where no folder was named.

        Raises:
            ConfigError: another option makes no sense without the folder.
        """
        return calibration_with(
            self.calib_data,
            self.calib_images,
            self.calib_split,
            self.calib_method,
            self.calib_cache,
            skip_bad=self.skip_bad,
            exif_transpose=self.exif_transpose,
        )


def require_outputs(outputs: Sequence[Path | None], inputs: Sequence[Path]) -> None:
    """Every output that was asked for can be written; checked before minutes of work.

    Raises:
        ConfigError: one can't, or would replace an input.
    """
    for output in outputs:
        if output is not None:
            require_output(output, *inputs)


def split_model_kwargs(arguments: list[str]) -> list[str]:
    """`arguments` with `--model-kwargs a=1 b=2` spelled as one option per value, as Typer wants it."""
    result: list[str] = []
    collecting = False
    for argument in arguments:
        if argument == "--model-kwargs":
            collecting = True
        elif collecting and _ASSIGNMENT.match(argument):
            result += ["--model-kwargs", argument]
        else:
            collecting = False
            result.append(argument)
    return result


def parse_model_kwargs(assignments: list[str]) -> dict[str, Any]:
    """`["img_size=112", "pool=avg"]` as `{"img_size": 112, "pool": "avg"}`: Python literals, else text, like timm.

    Raises:
        ConfigError: one is not `name=value`.
    """
    kwargs: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError("--model-kwargs", expected="name=value", got=assignment)
        try:
            kwargs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            kwargs[name] = value
    return kwargs


def parse_bits(bits: int) -> vocabulary.Bits:
    """`bits`, if that is a width of codes.

    Raises:
        ConfigError: it is none.
    """
    for width in vocabulary.BITS:
        if width == bits:
            return width
    raise ConfigError("--bits", expected=f"one of {', '.join(map(str, vocabulary.BITS))}", got=bits)


def parse_batch(text: str) -> int | None:
    """`dynamic` as None, a positive number as itself.

    Raises:
        ConfigError: it is neither.
    """
    if text == "dynamic":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError("--batch", expected="'dynamic' or a number of at least 1", got=text)
    return int(text)


def parse_bytes(option: str, text: str | None) -> int | None:
    """`2G`, `512M`, `64K` or a plain number as bytes, K being 1024; None stays None.

    Raises:
        ConfigError: it is none of these.
    """
    if text is None:
        return None
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(option, expected="a number of bytes, or one with K, M or G", got=text)
    return int(found[1]) << _SHIFTS[found[2].upper()]


def parse_precision(*, fp16: bool, bf16: bool) -> vocabulary.Precision:
    """The one floating-point precision that was asked for.

    Raises:
        ConfigError: there are two.
    """
    if fp16 and bf16:
        raise ConfigError("--fp16 and --bf16", expected="one of them")
    return "fp16" if fp16 else "bf16" if bf16 else "fp32"


def parse_dry_run(*, dry_run: bool, trt: str | None) -> TrtVersion | None:
    """The TensorRT that a dry run is for, or None for the installed one.

    Raises:
        ConfigError: `trt` is no version, or given without the dry run: an engine is built by what is installed.
    """
    if trt is not None and not dry_run:
        raise ConfigError("--trt", expected="--dry-run beside it")
    return None if trt is None else TrtVersion.parse(trt)


def parse_target(target: vocabulary.Backend, trt: str | None) -> TrtVersion | None:
    """The TensorRT that an export is for, or None for ONNX Runtime.

    Raises:
        ConfigError: `trt` is no version, or given without the target.
    """
    if target == "ort" and trt is not None:
        raise ConfigError("--trt", expected="--target trt beside it", got=f"--target {target}")
    return None if target == "ort" else TrtVersion.parse(trt or _DEFAULT_TRT)


def parse_devices(names: list[str]) -> tuple[Device | None, list[str]]:
    """The device of this machine, None to find it out, and other machines in its place.

    Raises:
        ConfigError: there are two devices, or this machine's and others, or a name means neither.
        DeviceError, MissingDependency: this machine has no such device, or it can't be asked.
    """
    machines = [name for name in names if name.startswith("ssh://")]
    if len(machines) == len(names):
        return None, machines
    if len(names) > 1:
        raise ConfigError(
            "--device", expected="one of cpu, cuda, jetson, or any number of ssh://…", got=" ".join(names)
        )
    return open_device(names[0]), []


def profile_options(context: typer.Context) -> list[str]:
    """The options of `profile` that were given and mean something on another machine, as words."""
    words: list[str] = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)  # an enumeration of Click's, or of the copy in newer Typers
        if source is None or source.name != "COMMANDLINE" or name in _LOCAL_OPTIONS:
            continue
        value = context.params[name]
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [parameter.opts[0], str(value)]
    return words
