"""A model that was shown its calibration images, and how well it does with some of its maps frozen."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.selection import Selection
from eamdeploy.host.attention import Constants, attention_sites, freeze_attention
from eamdeploy.host.calibrate import look, predict
from eamdeploy.host.choosing import choose
from eamdeploy.host.means import freeze_pieces, mean_maps
from eamdeploy.host.model import ModelSpec, load_model, preprocessing_of
from eamdeploy.host.scoring import PieceScores, score_pieces
from eamdeploy.host.sites import window_maps
from eamdeploy.images.options import PreprocessingOverrides
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT
from eamdeploy.parity.accuracy import Evaluation, measure_accuracy

BATCH = 16


class ShownModel:
    """A model with the statistics of its maps over the calibration images.

    Args:
        calibration, validation: the images that choose what is frozen, and those that measure it, with labels.
    """

    def __init__(
        self, spec: ModelSpec, calibration: ImageSource, validation: ImageSource, overrides: PreprocessingOverrides
    ) -> None:
        self.model: Any = load_model(spec)
        self.sites = attention_sites(self.model)
        self.how = preprocessing_of(self.model, overrides)
        self.calibration, self.validation = calibration, validation
        self.seen = look(
            self.model,
            self.sites,
            calibration,
            self.how,
            bins=16,
            spacing="uniform",
            windows="shared",
            observer=SILENT,
        )
        self.means = {site.path: mean_maps(site, self.seen.statistics[site.path]) for site in self.sites}
        self.scores = lru_cache(self._scores)

    def chosen(self, scores: PieceScores, options: FreezeOptions) -> Selection:
        """What `eamdeploy freeze` freezes by these scores: of the sets they propose the one that costs least."""
        found = choose(
            self.model,
            self.sites,
            self.seen,
            self.calibration,
            self.how,
            scores.selections(self.sites, options.sparsity),
            options,
            SILENT,
            always_measure=False,
        )
        return found.selection

    def frozen(self, pieces: Mapping[str, NDArray[np.bool_]], options: FreezeOptions) -> Any:
        """A copy of the model with these pieces frozen, stored as `options` say."""
        model = copy.deepcopy(self.model)
        freeze_attention(
            model,
            {
                site.path: self._constants(site.path, pieces[site.path], options)
                for site in self.sites
                if site.path in pieces
            },
        )
        return model

    def measure(
        self, pieces: Mapping[str, NDArray[np.bool_]], options: FreezeOptions, images: ImageSource | None = None
    ) -> Evaluation:
        """The model with these pieces frozen against itself, on the validation images or others."""
        images = self.validation if images is None else images
        return measure_accuracy(
            partial(predict, self.frozen(pieces, options)),
            images.open_labelled(self.model.num_classes, None),
            self.how,
            batch_size=BATCH,
            reference=partial(predict, self.model),
        )

    def _constants(self, path: str, pieces: NDArray[np.bool_], options: FreezeOptions) -> Constants:
        frozen = freeze_pieces(path, self.means[path], pieces, options.bits, options.quantizer)
        site = next(site for site in self.sites if site.path == path)
        return Constants(
            torch.from_numpy(frozen.heads),
            torch.from_numpy(frozen.maps(options.quantizer)),
            None if frozen.mask is None else torch.from_numpy(frozen.mask),
            window_maps(site, "shared"),
        )

    def _scores(self, options: FreezeOptions) -> PieceScores:
        return score_pieces(self.model, self.sites, self.seen, self.calibration, self.how, options, SILENT)
