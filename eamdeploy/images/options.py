"""Which images are read and how they are prepared: options of the command line and sections of a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from eamdeploy.images.source import ImageSource
from eamdeploy.vocabulary import Split

# fields that records of options share, here and on the command line
WhichFiles = Annotated[Split, Field(description="All files, or those at even or odd positions when sorted.")]
MostImages = Annotated[int | None, Field(description="At most that many, spread evenly over the folder.")]
SkipBad = Annotated[bool, Field(description="Leave out and name files that can't be decoded.")]
ExifTranspose = Annotated[bool, Field(description="Turn images as their EXIF orientation says; timm does not.")]


@dataclass(frozen=True)
class PreprocessingOverrides:
    """`[preprocessing]`: what the user says about preprocessing; None leaves timm's data config in charge."""

    mean: Annotated[
        tuple[float, float, float] | None, Field(description="Channel means, instead of timm's data config.")
    ] = None
    std: Annotated[tuple[float, float, float] | None, Field(description="Channel standard deviations, likewise.")] = (
        None
    )
    crop_pct: Annotated[
        float | None, Field(description="Share of the shorter side that the centre crop keeps, likewise.")
    ] = None
    interpolation: Annotated[str | None, Field(description="Filter of the resize, likewise: bicubic, bilinear, …")] = (
        None
    )

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


TIMM_PREPROCESSING = PreprocessingOverrides()


@dataclass(frozen=True)
class ImageOptions:
    """`[calibrate]`: a folder of images and what to take of it."""

    data: Annotated[
        Path, Field(description="Images: class sub-folders, flat files with labels.csv, or unlabelled files.")
    ]
    split: WhichFiles = "all"
    images: MostImages = None
    skip_bad: SkipBad = False
    exif_transpose: ExifTranspose = False

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def source(self) -> ImageSource:
        """These images, to be opened."""
        return ImageSource(self.data, self.split, self.images, self.skip_bad, self.exif_transpose)
