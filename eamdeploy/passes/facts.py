"""What is known of a model before its graph is rewritten: how often it has what passes change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eamdeploy.eam.int8 import rows_over_int8
from eamdeploy.passes.freeze_heads import AttentionModule, stored_maps


@dataclass(frozen=True)
class Parts:
    """How often a model has what some passes change, as its family in `host` states it.

    A number is None where nobody knows it: for a model of a family that states nothing.

    Attributes:
        embeddings: places where tokens of weights are put beside the patches and positions are
            added.
        layer_scales: learned factors of channels behind attention or MLP.
        scaled_queries: attention modules with a scale other than 1 and no norm of their queries.
        biased_keys: attention modules with a bias of their keys and no norm behind it.
        biased_values: attention modules with a bias of their values and one behind the output
            projection.
        token_moves: chains that move whole tokens: into the windows of a block, back, and together
            for patch merging.
        reordering_blocks: blocks whose windows divide the image and hold its tokens in another
            order than the image does.
        reorderings_met: reordering blocks behind which the next thing that depends on the order of
            tokens gathers them too (another reordering block, patch merging without padding), or
            in which it reduces over all tokens.
        masks: blocks with shifted windows.
    """

    embeddings: int | None = None
    layer_scales: int | None = None
    scaled_queries: int | None = None
    biased_keys: int | None = None
    biased_values: int | None = None
    token_moves: int | None = None
    reordering_blocks: int | None = None
    reorderings_met: int | None = None
    masks: int | None = None


UNKNOWN = Parts()


@dataclass(frozen=True)
class Facts:
    """What the numbers of places of all passes follow from.

    Attributes:
        parts: what the model's family states.
        attentions: attention modules; None, as are the numbers below, where only a file is known.
        shortened: attention modules of which at most half of the tokens are read.
        frozen: attention modules with frozen maps.
        maps: constants that hold frozen maps.
        wide_maps: constants of frozen maps with an integer that does not fit INT8.
    """

    parts: Parts = UNKNOWN
    attentions: int | None = None
    shortened: int | None = None
    frozen: int | None = None
    maps: int | None = None
    wide_maps: int | None = None


NOTHING_KNOWN = Facts()


def facts_of(modules: Sequence[AttentionModule], parts: Parts = UNKNOWN) -> Facts:
    """The facts about a model with these attention modules and parts, its stored maps aside."""
    return Facts(
        parts=parts,
        attentions=len(modules),
        shortened=sum(module.read_tokens is not None for module in modules),
        frozen=sum(module.has_frozen for module in modules),
    )


def facts_of_maps(modules: Sequence[AttentionModule]) -> Facts:
    """The facts about an exported graph that holds the frozen maps of these modules."""
    maps = [integers for module in modules for _, integers in stored_maps(module)]
    wide = sum(rows_over_int8(integers) > 0 for integers in maps)
    return Facts(maps=len(maps), wide_maps=wide)
