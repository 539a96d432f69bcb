"""What freezing costs: top-1 and agreement of DeiT-Tiny for every score, sparsity, width and quantizer.

Even images of a labelled folder calibrate, odd images measure; the frozen model is the reference forward in torch.

    python benchmarks/deit_accuracy.py --weights W.safetensors --data IMAGES -o result.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eamdeploy import evaluate, freeze
from eamdeploy.artifact import write_json
from eamdeploy.host.freezing import FreezeOptions
from eamdeploy.host.model import ModelSpec, PreprocessingOverrides
from eamdeploy.source import ImageSource

MODEL = "deit_tiny_patch16_224"
SETTINGS = (
    *(FreezeOptions(score="sensitivity", sparsity=share) for share in (0.1, 0.2, 0.3, 0.5)),
    *(FreezeOptions(score="row-entropy", sparsity=share) for share in (0.1, 0.2, 0.3, 0.5)),
    FreezeOptions(score="entropy"),
    FreezeOptions(score="entropy", spacing="squared"),
    FreezeOptions(score="variance"),
    FreezeOptions(score="random"),
    FreezeOptions(score="sensitivity", bits=3),
    FreezeOptions(score="sensitivity", bits=2),
    FreezeOptions(score="sensitivity", bits=8, quantizer="uniform"),
    FreezeOptions(score="sensitivity", bits=4, quantizer="uniform"),
    FreezeOptions(score="sensitivity", bits=2, quantizer="uniform"),
)


def main() -> None:
    """Print one row per setting, and write them as JSON where asked."""
    arguments = _parse()
    spec = ModelSpec(MODEL, str(arguments.weights))
    overrides = PreprocessingOverrides(crop_pct=arguments.crop_pct)
    even, odd = (ImageSource(arguments.data, split=split) for split in ("even", "odd"))
    console = Console(width=120)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "x.eam.safetensors"
        for options in SETTINGS:
            freeze(spec, even, checkpoint, options, overrides=overrides)
            found = evaluate(checkpoint, odd)
            row = {
                "score": options.score + (" (squared bins)" if options.spacing == "squared" else ""),
                "sparsity asked": options.sparsity,
                "bits": f"{options.bits} {options.quantizer}",
                "top-1": found.top1,
                "stock top-1": found.reference_top1,
                "agreement": found.agreement,
                "KL": found.kl,
            }
            rows.append(row)
            console.print(json.dumps(row), highlight=False)
    table = Table(box=None)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    if arguments.output:
        write_json(arguments.output, rows)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="DeiT-Tiny weights")
    parser.add_argument("--data", type=Path, required=True, help="labelled images")
    parser.add_argument("--crop-pct", type=float, default=0.875, help="share that the centre crop keeps")
    parser.add_argument("-o", "--output", type=Path, help="also write the rows as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
