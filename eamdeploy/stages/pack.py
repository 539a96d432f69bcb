"""The stage that makes an EAM checkpoint of somebody's own frozen maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from eamdeploy.artifacts.card import Freezing
from eamdeploy.artifacts.files import require_output
from eamdeploy.eam.records import CheckpointHeader, FrozenFactors, FrozenMaps, heads_of, ranks_of
from eamdeploy.eam.selection import sparsity_of
from eamdeploy.host.attention import attention_sites
from eamdeploy.host.given_maps import fit_maps
from eamdeploy.host.model import ModelSpec, load_model, preprocessing_of
from eamdeploy.host.saving import check_class_names, save_checkpoint
from eamdeploy.host.sites import attention_shapes
from eamdeploy.images.options import TIMM_PREPROCESSING, PreprocessingOverrides
from eamdeploy.vocabulary import Bits, Quantizer


def pack(
    spec: ModelSpec,
    maps: Mapping[str, FrozenMaps],
    output: Path,
    *,
    bits: Bits,
    quantizer: Quantizer,
    overrides: PreprocessingOverrides = TIMM_PREPROCESSING,
    class_names: list[str] | None = None,
    factors: Mapping[str, tuple[FrozenFactors, ...]] = MappingProxyType({}),
) -> CheckpointHeader:
    """`output` is an EAM checkpoint of a model and frozen maps from somebody's own EAM training.

    Args:
        maps: whole maps, or rows or entries of them, by attention module path, as `host.maps_file.read_maps` reads
            them.
        factors: heads of low rank, likewise.

    Raises:
        ConfigError, CheckpointError, UnsupportedGraph: model, weights or maps can't be used, or `output` not written.
    """
    require_output(output, Path(spec.weights))
    model = load_model(spec)
    sites = attention_sites(model)
    check_class_names(class_names, model.num_classes)
    fitted = fit_maps(maps, factors, sites, spec.name)
    shapes = attention_shapes(sites, fitted.windows)
    freezing = Freezing(
        granularity=fitted.granularity,
        window_maps=fitted.windows,
        bits=bits,
        quantizer=quantizer,
        score="given",
        sparsity_asked=None,
        sparsity=sparsity_of(fitted.maps, shapes, fitted.factors),
        heads=heads_of(fitted.maps, fitted.factors),
        ranks=ranks_of(fitted.maps, fitted.factors),
    )
    how = preprocessing_of(model, overrides)
    return save_checkpoint(spec, model, sites, how, class_names, freezing, fitted.maps, None, output, fitted.factors)
