"""Commands that make an EAM checkpoint: analyze, freeze, pack."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eamdeploy.cli import options, show
from eamdeploy.cli.console import print_result
from eamdeploy.cli.spread import description
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.errors import host_packages
from eamdeploy.images.options import ImageOptions, PreprocessingOverrides
from eamdeploy.images.source import read_class_names
from eamdeploy.vocabulary import Score

if TYPE_CHECKING:
    from eamdeploy.host.model import ModelSpec

Heatmap = Annotated[Path | None, typer.Option(help="Draw layers × heads with the frozen ones marked: .png or .svg.")]


@dataclass(frozen=True)
class ModelArguments:
    """A timm model and its weights."""

    model: options.Model
    weights: options.Weights = "pretrained"
    model_kwargs: options.ModelKwargs = field(default_factory=list)

    def spec(self, seed: int) -> ModelSpec:
        from eamdeploy.host.model import ModelSpec

        return ModelSpec(self.model, self.weights, options.parse_model_kwargs(self.model_kwargs), seed)


@dataclass(frozen=True)
class AnalyzeOptions(FreezeOptions):
    """As for freeze, with a score that needs no model run with frozen heads."""

    score: Annotated[Score, typer.Option(help=description(FreezeOptions, "score"))] = "entropy"


def analyze(
    context: typer.Context,
    model: ModelArguments,
    images: ImageOptions,
    output: options.Output,
    settings: AnalyzeOptions,
    overrides: PreprocessingOverrides,
    heatmap: Heatmap = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure the entropy of every attention head over a folder of images; mark what freeze would take."""
    with host_packages("analyze"):
        from eamdeploy.stages.analyze import analyze as run_analyze
    options.require_outputs([output, heatmap], [Path(model.weights)])
    with context.obj as terminal:
        result = run_analyze(model.spec(settings.seed), images.source, settings, overrides=overrides, observer=terminal)
    result.write(output)
    if heatmap is not None:
        from eamdeploy.reporting.draw.heat_file import write_heat_map
        from eamdeploy.reporting.records.heat_map import of_analysis

        write_heat_map(of_analysis(result)[0], heatmap)
    print_result(result, show.analysis(result), as_json=as_json)


def freeze(
    context: typer.Context,
    model: ModelArguments,
    images: ImageOptions,
    output: options.Output,
    settings: FreezeOptions,
    overrides: PreprocessingOverrides,
    heatmap: Heatmap = None,
    class_names: options.ClassNames = None,
    as_json: options.AsJson = False,
) -> None:
    """Freeze what depends least on the image; write an EAM checkpoint (*.eam.safetensors)."""
    with host_packages("freeze"):
        from eamdeploy.stages.freeze import freeze as run_freeze
        from eamdeploy.stages.freeze import read_shares
    options.require_outputs([output, heatmap], [Path(model.weights)])
    with context.obj as terminal:
        header = run_freeze(
            model.spec(settings.seed),
            images.source,
            output,
            settings,
            overrides=overrides,
            class_names=read_class_names(class_names),
            observer=terminal,
        )
    if heatmap is not None:
        from eamdeploy.reporting.draw.heat_file import write_heat_map
        from eamdeploy.reporting.records.heat_map import of_checkpoint

        write_heat_map(of_checkpoint(header, read_shares(output)), heatmap)
    print_result(header, show.checkpoint(header), as_json=as_json)


def pack(
    model: ModelArguments,
    maps: Annotated[
        Path,
        typer.Option(
            help="Frozen maps, .npz or .safetensors: <module>.heads with .maps or .codes, perhaps .mask; heads of low "
            "rank: <module>.rank<r>.heads with .mix and .pool."
        ),
    ],
    output: options.Output,
    overrides: PreprocessingOverrides,
    class_names: options.ClassNames = None,
    bits: options.Bits = FreezeOptions.bits,
    quantizer: options.Quantizer = FreezeOptions.quantizer,
    seed: options.Seed = FreezeOptions.seed,
    as_json: options.AsJson = False,
) -> None:
    """Pack weights and frozen maps from your own EAM training into an EAM checkpoint."""
    with host_packages("pack"):
        from eamdeploy.host.maps_file import read_maps
        from eamdeploy.stages.pack import pack as run_pack
    options.require_outputs([output], [Path(model.weights), maps])
    width = options.parse_bits(bits)
    given = read_maps(maps, width, quantizer)
    header = run_pack(
        model.spec(seed),
        given.maps,
        output,
        bits=width,
        quantizer=quantizer,
        overrides=overrides,
        class_names=read_class_names(class_names),
        factors=given.factors,
    )
    print_result(header, show.checkpoint(header), as_json=as_json)
