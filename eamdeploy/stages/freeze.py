"""The stage that makes an EAM checkpoint: what costs least is frozen to its quantized mean map."""

from __future__ import annotations

from pathlib import Path

from eamdeploy.artifacts.card import Freezing
from eamdeploy.artifacts.files import require_output
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import DEFAULT_OPTIONS, FreezeOptions
from eamdeploy.eam.records import CheckpointHeader, ranks_of
from eamdeploy.host.freezing import calibrate, head_means
from eamdeploy.host.model import ModelSpec
from eamdeploy.host.saving import save_checkpoint
from eamdeploy.images.options import TIMM_PREPROCESSING, PreprocessingOverrides
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT, Observer


def freeze(
    spec: ModelSpec,
    images: ImageSource,
    output: Path,
    options: FreezeOptions = DEFAULT_OPTIONS,
    *,
    overrides: PreprocessingOverrides = TIMM_PREPROCESSING,
    class_names: list[str] | None = None,
    observer: Observer = SILENT,
) -> CheckpointHeader:
    """`output` is an EAM checkpoint: what costs least is frozen to its quantized mean map over the images.

    Raises:
        ConfigError, CheckpointError, UnsupportedGraph: model, weights, images or options can't be used, or `output`
            can't be written; what was there stays.
    """
    require_output(output, Path(spec.weights))
    done = calibrate(spec, images, options, overrides, class_names, observer, always_measure=True)
    freezing = Freezing(
        granularity=options.granularity,
        window_maps=done.windows,
        bits=options.bits,
        quantizer=options.quantizer,
        score=options.score,
        scores=head_means(done.scores),
        sparsity_asked=options.sparsity,
        sparsity=done.chosen.selection.sparsity,
        heads={path: list(heads) for path, heads in done.chosen.selection.heads.items()},
        ranks=ranks_of(done.chosen.frozen, done.chosen.factors),
        cost=done.chosen.cost,
    )
    return save_checkpoint(
        spec,
        done.model,
        done.sites,
        done.how,
        class_names,
        freezing,
        done.chosen.frozen,
        done.provenance,
        output,
        done.chosen.factors,
    )


def read_shares(path: Path) -> dict[str, list[float]]:
    """Which share of its entries is frozen, in (0, 1], for every frozen head of the EAM checkpoint at `path`.

    By module path, in the order of `Freezing.heads`.

    Raises:
        CheckpointError, ConfigError: as `checkpoint.load`.
    """
    return checkpoints.load(path).shares
