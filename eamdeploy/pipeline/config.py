"""The configuration file of `eamdeploy run`: a section for each stage, with the options of its command."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, JsonValue, ValidationError, ValidationInfo, field_validator

from eamdeploy.artifacts.file_kinds import text_in_words
from eamdeploy.artifacts.records import Record
from eamdeploy.convert.ort_form import OrtForm, forms_for
from eamdeploy.eam.options import DEFAULT_OPTIONS, FreezeOptions
from eamdeploy.eam.recovery import RecoverOptions
from eamdeploy.errors import ConfigError
from eamdeploy.images.options import TIMM_PREPROCESSING, ImageOptions, PreprocessingOverrides
from eamdeploy.images.source import ImageSource, read_class_names
from eamdeploy.profiling.timing import Schedule
from eamdeploy.vocabulary import DEFAULT_OPSET, ClassOrder, Exporter, ProviderName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_EVERY_KEY = "See docs/reference/configuration.md for every key."
_Batch = Annotated[int | None, Field(ge=1), BeforeValidator(lambda value: None if value == "dynamic" else value)]


class ModelConfig(Record):
    """`[model]`: what `--model`, `--weights` and `--model-kwargs` say."""

    name: str
    weights: str = "pretrained"
    kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    class_names: Path | None = None


@dataclass(frozen=True)
class EvaluateOptions(ImageOptions):
    """`[evaluate]`: images, and how their labels are to be read."""

    class_order: ClassOrder | None = None
    class_names: Path | None = None

    @property
    def source(self) -> ImageSource:
        """These images, with their labels read as the section says.

        Raises:
            ConfigError: the file of class names can't be read.
        """
        return replace(super().source, class_order=self.class_order, class_names=read_class_names(self.class_names))


class ExportConfig(Record):
    """`[export]`: the options of `eamdeploy export`; `batch` is a number or "dynamic".

    Attributes:
        stock: the model as torch exports it is written, built and profiled too, and is what speed-ups are against.
    """

    batch: _Batch = None
    opset: int = DEFAULT_OPSET
    exporter: Exporter = "auto"
    fold_preprocess: bool = False
    without: tuple[str, ...] = ()
    stock: bool = False


class BuildConfig(Record):
    """`[build]`: the options of `eamdeploy build-ort`; with the defaults an engine is the exported file.

    Attributes:
        calibrate: the images of `[calibrate]` tell the ranges for static INT8, as those of `--calib-data` do.
        providers: what runs it; more than one are tried with `tune`. None: the CPU, or with `tune` all that are here.
        min_agreement: percent, as `--min-agreement`.
    """

    # a key is checked against those above it, so that an error names the one that is too much
    fused_attention: bool = False
    int8: bool = False
    calibrate: bool = False
    tune: bool = False
    providers: tuple[ProviderName, ...] | None = Field(default=None, min_length=1)
    min_agreement: float | None = Field(default=None, ge=0, le=100)

    @field_validator("calibrate", "min_agreement")
    @classmethod
    def _needs_int8(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and value is not False and not info.data.get("int8"):
            raise ValueError("it is of use for INT8 alone. Set int8 = true too, or leave it out")
        return value

    @field_validator("tune", "providers")
    @classmethod
    def _can_be_built(cls, value: Any, info: ValidationInfo) -> Any:
        so_far = {"providers": ["cpu"], **info.data, str(info.field_name): value}
        if so_far["providers"] is not None:
            try:
                cls.model_construct(**so_far).forms()
            except ConfigError as err:
                raise ValueError(str(err)) from err
        return value

    def forms(self) -> list[OrtForm]:
        """What is built of the frozen model: one form, or those of which the fastest is kept.

        Raises:
            MissingDependency: all providers that are here are to be tried, and ONNX Runtime is not installed.
        """
        return forms_for(
            self.providers,
            fused_attention=self.fused_attention,
            int8=self.int8,
            calibrated=self.calibrate,
            tune=self.tune,
        )


class ProfileConfig(Record):
    """`[profile]`: the options of `eamdeploy profile`."""

    threads: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1, ge=1)
    warmup_ms: float = Schedule.warmup_ms
    min_seconds: float = Schedule.min_seconds
    min_runs: int = Schedule.min_runs
    sittings: int = Schedule.sittings


class RunConfig(Record):
    """A whole run; paths are relative to the configuration file's folder.

    Attributes:
        output: folder for everything that the stages write.
        recover: with the images of `calibrate`; None leaves recovery out.
        evaluate: None leaves the accuracy out.
    """

    output: Path
    model: ModelConfig
    preprocessing: PreprocessingOverrides = TIMM_PREPROCESSING
    calibrate: ImageOptions
    freeze: FreezeOptions = DEFAULT_OPTIONS
    recover: RecoverOptions | None = None
    export: ExportConfig = ExportConfig()
    build: BuildConfig = BuildConfig()
    evaluate: EvaluateOptions | None = None
    profile: ProfileConfig = ProfileConfig()


def load_config(path: Path) -> RunConfig:
    """The configuration in a TOML file, its paths made relative to the current folder.

    Raises:
        ConfigError: the file can't be read, is no TOML, or has a wrong, missing or unknown key; the key is named.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        config = RunConfig.model_validate(document)
    except ValidationError as err:
        first = err.errors()[0]
        key = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ").rstrip(".")
        if first["type"] == "unexpected_keyword_argument":  # of a section that is a dataclass
            reason = "Extra inputs are not permitted"
        raise ConfigError(f"{path}: {key}: {reason}", hint=_EVERY_KEY) from err
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(
            f"cannot read the configuration {path}: {text_in_words(path, err)}",
            hint=None if isinstance(err, OSError) else f"It must be TOML in UTF-8. {_EVERY_KEY}",
        ) from err
    return _anchored(config, path.parent)


def _anchored(config: RunConfig, root: Path) -> RunConfig:
    """`config` with its paths relative to `root`."""

    def below(path: Path | str) -> Path:
        return Path(os.path.normpath(root / path))

    def anchor(section: Any, key: str) -> Any:
        value = getattr(section, key)
        if value is None:
            return section
        changed = {key: below(value)}
        return section.model_copy(update=changed) if isinstance(section, Record) else replace(section, **changed)

    model = anchor(config.model, "class_names")
    if config.model.weights not in ("pretrained", "random"):
        model = model.model_copy(update={"weights": str(below(config.model.weights))})
    update = {"output": below(config.output), "model": model, "calibrate": anchor(config.calibrate, "data")}
    if config.evaluate is not None:
        update["evaluate"] = anchor(anchor(config.evaluate, "data"), "class_names")
    return config.model_copy(update=update)
