"""What freezing costs: top-1 and agreement for every granularity, score, sparsity, width and quantizer.

Even images of a labelled folder calibrate, odd images measure; the frozen model is the reference forward in torch. The
statistics are collected once and every score is computed once, so that a row costs little more than one evaluation.

    python benchmarks/accuracy.py --weights W.safetensors --data IMAGES -o result.json
    python benchmarks/accuracy.py --weights W.safetensors --data IMAGES --granularity entry
"""

from __future__ import annotations

import argparse
import copy
import json
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from eamdeploy.accuracy import measure_accuracy
from eamdeploy.artifact import Record, write_bytes
from eamdeploy.eam.selection import GRANULARITIES, Granularity
from eamdeploy.host.attention import Constants, attention_sites, freeze_attention
from eamdeploy.host.calibrate import look, predict
from eamdeploy.host.means import freeze_pieces, mean_maps
from eamdeploy.host.model import ModelSpec, PreprocessingOverrides, load_model, preprocessing_of
from eamdeploy.host.options import FreezeOptions
from eamdeploy.host.scoring import PieceScores, score_pieces
from eamdeploy.host.sites import window_maps
from eamdeploy.observer import SILENT
from eamdeploy.source import ImageSource

BATCH = 16


class Row(Record):
    """A setting and what it costs; percent, and nats for kl."""

    granularity: Granularity
    score: str
    sparsity: float
    stored: str
    top1: float | None
    agreement: float | None
    kl: float | None


def settings(granularity: Granularity) -> list[FreezeOptions]:
    """The rows of one granularity: scores and sparsities at 4 bits squared, then other widths at sparsity 0.2."""
    make = partial(FreezeOptions, granularity=granularity)
    scores = ["entropy", "variance", "random"] + ["row-entropy"] * (granularity != "entry")
    return [
        *(make(score="sensitivity", sparsity=share) for share in (0.1, 0.2, 0.3, 0.5, 0.8)),
        *(make(score=score, sparsity=share) for score in scores for share in (0.2, 0.5)),
        *(make(score="sensitivity", bits=bits) for bits in (8, 3, 2)),
        *(make(score="sensitivity", bits=bits, quantizer="uniform") for bits in (8, 4, 3, 2)),
    ]


class Study:
    """A model with the statistics of its maps over the calibration images, and how well it does frozen."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = load_model(ModelSpec(arguments.model, str(arguments.weights), arguments.model_kwargs))
        self.sites = attention_sites(self.model)
        self.how = preprocessing_of(self.model, PreprocessingOverrides(crop_pct=arguments.crop_pct))
        self.even, self.odd = (ImageSource(arguments.data, split) for split in ("even", "odd"))
        self.score_images = arguments.score_images
        self.seen = look(
            self.model,
            self.sites,
            self.even,
            self.how,
            bins=16,
            spacing="uniform",
            windows="shared",
            observer=SILENT,
        )
        self.means = {site.path: mean_maps(site, self.seen.statistics[site.path]) for site in self.sites}
        self.scores = lru_cache(self._scores)

    def row(self, options: FreezeOptions) -> Row:
        """The setting, measured on the odd images."""
        heads = options.granularity == "head"  # exact sensitivity depends on how the map is stored
        stored = (options.bits, options.quantizer) if heads and options.score == "sensitivity" else (4, "squared")
        scores = self.scores(options.granularity, options.score, *stored)
        selected = scores.select(self.sites, options.sparsity)
        model = copy.deepcopy(self.model)
        freeze_attention(
            model,
            {
                site.path: self._constants(site.path, selected.pieces[site.path], options)
                for site in self.sites
                if site.path in selected.pieces
            },
        )
        found = measure_accuracy(
            partial(predict, model),
            self.odd.open_labelled(model.num_classes, None),
            self.how,
            batch_size=BATCH,
            reference=partial(predict, self.model),
        )
        return Row(
            granularity=options.granularity,
            score=options.score,
            sparsity=selected.sparsity,
            stored=f"{options.bits} bits {options.quantizer}",
            top1=found.top1,
            agreement=found.agreement,
            kl=found.kl,
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

    def _scores(self, granularity: Granularity, score: str, bits: int, quantizer: str) -> PieceScores:
        options = FreezeOptions(
            granularity=granularity, score=score, bits=bits, quantizer=quantizer, score_images=self.score_images
        )
        return score_pieces(self.model, self.sites, self.seen, self.even, self.how, options, SILENT)


def main() -> None:
    """Print one row per setting, and write them as JSON where asked."""
    arguments = _parse()
    console = Console(width=120, highlight=False)
    study = Study(arguments)
    table = Table(box=None)
    for name in Row.model_fields:
        table.add_column(name, justify="right")
    rows = []
    for options in [options for granularity in arguments.granularity for options in settings(granularity)]:
        rows.append(study.row(options))
        values = [f"{value:.3g}" if isinstance(value, float) else str(value) for _, value in rows[-1]]
        table.add_row(*values)
        console.print("  ".join(values))
    console.print(table)
    if arguments.output:
        write_bytes(arguments.output, ("\n".join(row.model_dump_json() for row in rows) + "\n").encode())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm name of a ViT, DeiT or Swin")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, help="timm's arguments as JSON")
    parser.add_argument("--weights", type=Path, required=True, help="the model's weights")
    parser.add_argument("--data", type=Path, required=True, help="labelled images")
    parser.add_argument("--crop-pct", type=float, default=0.875, help="share that the centre crop keeps")
    parser.add_argument("--score-images", type=int, help="images for the sensitivity; as freeze by default")
    parser.add_argument("--granularity", nargs="+", choices=GRANULARITIES, default=GRANULARITIES)
    parser.add_argument("-o", "--output", type=Path, help="also write the rows as JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
