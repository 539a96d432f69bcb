"""What to freeze and how: the section `[freeze]` of a configuration, and the options of `analyze` and `freeze`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, ConfigDict, Field

from eamdeploy.eam.kinds import kinds_of
from eamdeploy.eam.quantizers import check_quantizer
from eamdeploy.eam.scores import check_score
from eamdeploy.eam.selection import check_sparsity
from eamdeploy.errors import ConfigError
from eamdeploy.vocabulary import WINDOW_MAPS, Bits, Granularity, Quantizer, Score, Spacing, WindowMaps


@dataclass(frozen=True)
class FreezeOptions:
    """What to freeze and how; each field's description is also the help of its option."""

    sparsity: Annotated[float, Field(description="Frozen ÷ all attention entries, in [0, 1].")] = 0.2
    granularity: Annotated[
        Granularity,
        Field(description="What is frozen as one piece: a whole map, one query's row of it, or one value."),
    ] = "head"
    window_maps: Annotated[
        WindowMaps,
        Field(description="Swin: one frozen map for all windows, for those with the same shift mask, or for each."),
    ] = "shared"
    rank: Annotated[
        str,
        BeforeValidator(lambda value: str(value) if type(value) is int else value),
        Field(
            description="Freeze heads to factors of that rank, which need no values of all tokens: a number, none "
            "for whole maps, or auto for what costs least for each multiply-add that it saves."
        ),
    ] = "none"
    score: Annotated[
        Score,
        Field(
            description="What freezing is chosen by, the least for each entry first; sensitivity is the KL of the "
            "logits with pieces frozen, estimated for rows and entries."
        ),
    ] = "sensitivity"
    bits: Annotated[Bits, Field(description="Bits of a frozen map's codes: 2, 3, 4 or 8.")] = 4
    quantizer: Annotated[
        Quantizer, Field(description="A code stands for scale·code (uniform) or scale·code² (squared).")
    ] = "squared"
    bins: Annotated[int, Field(description="Bins of the histograms behind the score entropy.")] = 16
    spacing: Annotated[Spacing, Field(description="Where the bins' edges lie: i/n or (i/n)².")] = "uniform"
    seed: Annotated[int, Field(description="For --weights random, --score random, and sensitivity of parts.")] = 0
    score_images: Annotated[
        int | None, Field(description="Images for sensitivity; default 48 for heads, all for rows and entries.")
    ] = None

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


DEFAULT_OPTIONS = FreezeOptions()


def check_options(options: FreezeOptions) -> None:
    """`options` can be used; so that bad ones fail before minutes of work, not after.

    Raises:
        ConfigError: they can't.
    """
    check_sparsity(options.sparsity)
    check_score(options.score, options.granularity)
    if options.window_maps not in WINDOW_MAPS:
        raise ConfigError("unknown window maps", expected=f"one of {', '.join(WINDOW_MAPS)}", got=options.window_maps)
    check_quantizer(options.bits, options.quantizer)
    _check_rank(options)
    if options.score_images is not None and options.score_images < 1:
        raise ConfigError("cannot score on that number of images", expected="at least 1", got=options.score_images)


def _check_rank(options: FreezeOptions) -> None:
    kinds = kinds_of(options.rank)
    if kinds != (None,) and options.granularity != "head":
        raise ConfigError(
            f"rank {options.rank} needs whole heads", expected="granularity head", got=options.granularity
        )
    if len(kinds) > 1 and options.score != "sensitivity":
        raise ConfigError(
            "rank auto weighs what freezing costs, which that score does not measure",
            expected="score sensitivity",
            got=options.score,
            hint="Use --score sensitivity, or name one rank.",
        )
