"""What an export is made of, decided before anything is rewritten: a checkpoint in torch, options, and two variants.

    checkpoint ─▶ plan ─▶ stock graph ─▶ rewrite ─▶ prove ─▶ write
                            (once)       └── for the frozen model, and for its unfrozen twin ──┘

The two variants differ in their attention modules, their card and their reference forward, and in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eamdeploy.artifacts.card import ModelCard
from eamdeploy.artifacts.files import digest_file
from eamdeploy.devices.provenance import package_versions
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.checkpoint import AttentionShape, Checkpoint, FrozenFactors, FrozenMaps
from eamdeploy.eam.int8 import int8_checkpoint
from eamdeploy.eam.quantizers import integer_values
from eamdeploy.eam.records import CheckpointHeader
from eamdeploy.engines.trt.versions import TrtVersion, capabilities
from eamdeploy.errors import ConfigError
from eamdeploy.graph.frozen import IntegerFactors, IntegerMaps
from eamdeploy.host.attention import parts
from eamdeploy.host.reference import LoadedModel, load_reference
from eamdeploy.host.sites import AttentionSite
from eamdeploy.passes.class_token_only import ClassTokenOnly
from eamdeploy.passes.facts import Parts
from eamdeploy.passes.freeze_heads import AttentionModule
from eamdeploy.passes.gather_tokens import GatherTokens
from eamdeploy.passes.order import with_dependents
from eamdeploy.passes.requantize_maps import RequantizeMaps
from eamdeploy.vocabulary import DEFAULT_OPSET, OPSET_WITHOUT_LAYER_NORMALIZATION, Exporter, Quantizer

_UINT16_OPSET = 21


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint becomes ONNX.

    Attributes:
        batch: fixed batch size, or None for a dynamic one.
        opset: None for the default, which depends on whether TensorRT knows LayerNormalization.
        fold_preprocess: the input is pixels, uint8, and the patch embedding normalizes them; not for TensorRT.
        without: passes of `passes.order` that are left out, and with them those that depend on them.
        trt: the TensorRT that must take the graph; None for ONNX Runtime.
    """

    batch: int | None = None
    opset: int | None = None
    exporter: Exporter = "auto"
    fold_preprocess: bool = False
    without: tuple[str, ...] = ()
    trt: TrtVersion | None = None


@dataclass(frozen=True)
class Variant:
    """One of the two models of an export.

    Attributes:
        modules: every attention module, with the frozen maps that its graph is to hold.
        reference: the model in torch that its graph must agree with.
        card: without the rewrites that are still to come.
    """

    modules: tuple[AttentionModule, ...]
    reference: LoadedModel
    card: ModelCard


@dataclass(frozen=True)
class ExportPlan:
    """A checkpoint and all that is decided about its export.

    Attributes:
        opset: the operator set of the stock graph.
        parts: how often the model has what some passes change.
        left_out: passes that are left out, with those that depend on them.
        requantized: rows of frozen maps that did not fit INT8 and are quantized anew.
    """

    header: CheckpointHeader
    options: ExportOptions
    opset: int
    parts: Parts
    left_out: frozenset[str]
    requantized: int
    frozen: Variant
    twin: Variant


def make_plan(checkpoint: Path, options: ExportOptions, *, verify: bool) -> ExportPlan:
    """The plan for the checkpoint at that path; nothing is exported yet.

    Args:
        verify: the checkpoint must be as it was written.

    Raises:
        ConfigError, CheckpointError: the checkpoint or an option can't be used.
        UnsupportedGraph: the architecture is not supported.
    """
    opset, left_out = _check_options(options)
    loaded, requantized = checkpoints.load(checkpoint, verify=verify), 0
    header = loaded.header
    if options.trt is not None and capabilities(options.trt).integer_maps:
        loaded, requantized = int8_checkpoint(loaded)
    live = load_reference(loaded, frozen=False, where=str(checkpoint))
    modules = _attention_modules(loaded, live, opset, left_out)
    card = ModelCard(
        timm_model=header.timm_model,
        weights=header.weights,
        num_classes=header.num_classes,
        class_names=header.class_names,
        preprocessing=header.preprocessing,
        recovery=header.recovery,
        checkpoint_digest=digest_file(checkpoint),
        takes_pixels=options.fold_preprocess,
        versions=package_versions(),
    )
    rewrites = [RequantizeMaps.name] if requantized else []
    return ExportPlan(
        header=header,
        options=options,
        opset=opset,
        parts=parts(live.model),
        left_out=left_out,
        requantized=requantized,
        frozen=Variant(
            modules,
            load_reference(loaded, frozen=True, where=str(checkpoint)),
            card.model_copy(update={"freezing": header.freezing, "rewrites": rewrites}),
        ),
        twin=Variant(tuple(replace(module, frozen=None, factors=()) for module in modules), live, card),
    )


def _check_options(options: ExportOptions) -> tuple[int, frozenset[str]]:
    """The operator set, and all passes that are left out."""
    if options.fold_preprocess and options.trt is not None:
        raise ConfigError(
            "TensorRT is not given pixels", expected="a float32 input", got="uint8", hint="Leave --fold-preprocess out."
        )
    return _choose_opset(options.opset, options.trt), with_dependents(options.without)


def _choose_opset(opset: int | None, trt: TrtVersion | None) -> int:
    """`opset`, or the default for that TensorRT.

    Raises:
        ConfigError: TensorRT does not know that operator set, or is too old.
    """
    can = None if trt is None else capabilities(trt)
    if opset is None:
        return DEFAULT_OPSET if can is None or can.layer_normalization else OPSET_WITHOUT_LAYER_NORMALIZATION
    if can is not None and opset > can.max_opset:
        raise ConfigError(f"TensorRT {trt} does not know that opset", expected=f"at most {can.max_opset}", got=opset)
    return opset


def _attention_modules(
    checkpoint: Checkpoint, live: LoadedModel, opset: int, left_out: frozenset[str]
) -> tuple[AttentionModule, ...]:
    """Every attention module with its value weights and, where it has some, its frozen maps as ONNX stores them."""
    modules = []
    for site in live.sites:
        weight = live.model.get_submodule(site.path).qkv.weight.detach().numpy()  # rows: q, k, v
        frozen = checkpoint.frozen.get(site.path)
        shape = checkpoint.header.attention[site.path]
        maps = None if frozen is None else _integer_maps(frozen, shape, checkpoint.header.freezing.quantizer, opset)
        read = None if _computes_all_rows(site, left_out) else site.read_tokens
        factors = tuple(
            _integer_factors(group, shape, checkpoint.header.freezing.quantizer, opset)
            for group in checkpoint.factors.get(site.path, ())
        )
        modules.append(AttentionModule(site.path, weight[2 * len(weight) // 3 :], maps, read, factors))
    return tuple(modules)


def _computes_all_rows(site: AttentionSite, left_out: frozenset[str]) -> bool:
    """Whether every row of the maps is computed, so that every row of a frozen map must be there.

    In windows the choice of tokens is one node only where `gather_tokens` wrote it.
    """
    return ClassTokenOnly.name in left_out or (site.classes is not None and GatherTokens.name in left_out)


def _integer_maps(frozen: FrozenMaps, shape: AttentionShape, quantizer: Quantizer, opset: int) -> IntegerMaps:
    integers = _integers(frozen.codes, quantizer, opset)
    rows = (len(frozen.heads), shape.n_maps, shape.tokens)
    return IntegerMaps(
        heads=tuple(frozen.heads.tolist()),
        integers=integers.reshape(*rows, shape.tokens),
        scales=frozen.scales.reshape(rows),
        windows=tuple(shape.windows or [0]),
        mask=frozen.mask,
    )


def _integer_factors(group: FrozenFactors, shape: AttentionShape, quantizer: Quantizer, opset: int) -> IntegerFactors:
    mix, pool = (_integers(codes, quantizer, opset) for codes in (group.mix_codes, group.pool_codes))
    of_map = (len(group.heads), shape.n_maps)
    return IntegerFactors(
        heads=tuple(group.heads.tolist()),
        mix=mix.reshape(*of_map, shape.tokens, group.rank),
        mix_scales=group.mix_scales.reshape(*of_map, shape.tokens),
        pool=pool.reshape(*of_map, group.rank, shape.tokens),
        pool_scales=group.pool_scales.reshape(*of_map, group.rank),
        windows=tuple(shape.windows or [0]),
    )


def _integers(codes: NDArray[np.uint8], quantizer: Quantizer, opset: int) -> NDArray[np.unsignedinteger]:
    """What the graph stores of `codes`.

    Raises:
        ConfigError: no type of that operator set's constants holds them.
    """
    integers = integer_values(codes, quantizer)
    if integers.dtype == np.uint16 and opset < _UINT16_OPSET:
        raise ConfigError(
            "squared 8-bit codes need UINT16 constants",
            expected=f"opset {_UINT16_OPSET} or higher",
            got=opset,
            hint="Freeze with --bits 4 or --quantizer uniform.",
        )
    return integers
