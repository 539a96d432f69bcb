"""What freezing costs: top-1 and agreement for every granularity, score, sparsity, width and quantizer.

Even images of a labelled folder calibrate, odd images measure; the frozen model is the reference forward in torch. The
statistics are collected once and every score is computed once, so that a row costs little more than one evaluation.

    python benchmarks/accuracy.py --weights W.safetensors --data IMAGES -o result.json
    python benchmarks/accuracy.py --weights W.safetensors --data IMAGES --granularity entry
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from shown_model import ShownModel

from eamdeploy.artifacts.files import write_bytes
from eamdeploy.artifacts.records import Record
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.host.model import ModelSpec
from eamdeploy.images.options import PreprocessingOverrides
from eamdeploy.images.source import ImageSource
from eamdeploy.vocabulary import GRANULARITIES, Granularity, Score


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
    scores: list[Score] = ["entropy", "variance", "random"]
    scores += ["row-entropy"] if granularity != "entry" else []
    return [
        *(make(score="sensitivity", sparsity=share) for share in (0.1, 0.2, 0.3, 0.5, 0.8)),
        *(make(score=score, sparsity=share) for score in scores for share in (0.2, 0.5)),
        *(make(score="sensitivity", bits=bits) for bits in (8, 3, 2)),
        *(make(score="sensitivity", bits=bits, quantizer="uniform") for bits in (8, 4, 3, 2)),
    ]


def row(shown: ShownModel, options: FreezeOptions, score_images: int | None) -> Row:
    """The setting, measured on the odd images."""
    heads = options.granularity == "head"  # exact sensitivity depends on how the map is stored
    scored = FreezeOptions(granularity=options.granularity, score=options.score, score_images=score_images)
    if heads and options.score == "sensitivity":
        scored = replace(scored, bits=options.bits, quantizer=options.quantizer)
    selected = shown.chosen(shown.scores(scored), options)
    found = shown.measure(selected.pieces, options)
    return Row(
        granularity=options.granularity,
        score=options.score,
        sparsity=selected.sparsity,
        stored=f"{options.bits} bits {options.quantizer}",
        top1=found.top1,
        agreement=found.agreement,
        kl=found.kl,
    )


def main() -> None:
    """Print one row per setting, and write them as JSON where asked."""
    arguments = _parse()
    console = Console(width=120, highlight=False)
    shown = ShownModel(
        ModelSpec(arguments.model, str(arguments.weights), arguments.model_kwargs),
        ImageSource(arguments.data, "even"),
        ImageSource(arguments.data, "odd"),
        PreprocessingOverrides(crop_pct=arguments.crop_pct),
    )
    table = Table(box=None)
    for name in Row.model_fields:
        table.add_column(name, justify="right")
    rows = []
    for options in [options for granularity in arguments.granularity for options in settings(granularity)]:
        rows.append(row(shown, options, arguments.score_images))
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
