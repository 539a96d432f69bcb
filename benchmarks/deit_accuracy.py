"""What freezing costs: top-1 and agreement of DeiT-Tiny for every score, sparsity, width and quantizer.

Even images of a labelled folder calibrate, odd images measure; the frozen model is the reference forward in torch. The
statistics are collected once, and the sensitivity once for every width, so that a row costs one evaluation.

    python benchmarks/deit_accuracy.py --weights W.safetensors --data IMAGES -o result.json
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from eamdeploy.accuracy import measure_accuracy
from eamdeploy.artifact import Record, write_bytes
from eamdeploy.eam.quantizers import Bits, Quantizer, dequantize, quantize_rows
from eamdeploy.eam.scores import score_heads
from eamdeploy.eam.selection import select
from eamdeploy.host.attention import attention_sites, freeze_attention
from eamdeploy.host.calibrate import as_tensors, collect_statistics, predict
from eamdeploy.host.model import ModelSpec, PreprocessingOverrides, load_model, preprocessing_of
from eamdeploy.host.sensitivity import sensitivity
from eamdeploy.observer import SILENT
from eamdeploy.source import ImageSource

MODEL = "deit_tiny_patch16_224"
BATCH = 16


@dataclass(frozen=True)
class Setting:
    """One row: what is frozen and how it is stored; bits None keeps the mean maps as they are."""

    score: str
    sparsity: float
    bits: Bits | None = 4
    quantizer: Quantizer = "squared"


class Row(Record):
    """A setting and what it costs; percent, and nats for kl."""

    score: str
    sparsity: float
    stored: str
    heads: int
    top1: float | None
    agreement: float | None
    kl: float | None


SETTINGS = (
    *(Setting("sensitivity", share) for share in (0.0, 0.1, 0.2, 0.3, 0.5)),
    *(Setting("row-entropy", share) for share in (0.1, 0.2, 0.3, 0.5)),
    *(Setting(name, 0.2) for name in ("entropy", "entropy, squared bins", "variance", "random")),
    *(Setting("sensitivity", 0.2, bits) for bits in (None, 3, 2)),
    *(Setting("sensitivity", 0.2, bits, "uniform") for bits in (8, 4, 3, 2)),
)


class Study:
    """A model with the statistics of its maps over the calibration images, and how well it does frozen."""

    def __init__(self, weights: Path, data: Path, crop_pct: float, score_images: int) -> None:
        self.model = load_model(ModelSpec(MODEL, str(weights)))
        self.sites = attention_sites(self.model)
        self.how = preprocessing_of(self.model, PreprocessingOverrides(crop_pct=crop_pct))
        self.even, self.odd = (ImageSource(data, split) for split in ("even", "odd"))
        self.score_images = score_images
        self.uniform, self.squared = (
            collect_statistics(
                self.model, self.sites, self._tensors(self.even), bins=16, spacing=spacing, on_images=lambda _: None
            )
            for spacing in ("uniform", "squared")
        )
        self.sensitivity = lru_cache(self._sensitivity)

    def row(self, setting: Setting) -> Row:
        """The setting, measured on the odd images."""
        scores = self._scores(setting)
        selected = select(scores, {site.path: site.entries_per_head for site in self.sites}, setting.sparsity)
        frozen = copy.deepcopy(self.model)
        maps = self._maps(setting.bits, setting.quantizer)
        chosen = {
            path: (torch.tensor(heads), torch.from_numpy(maps[path][list(heads)]))
            for path, heads in selected.heads.items()
        }
        freeze_attention(frozen, chosen)
        found = measure_accuracy(
            partial(predict, frozen),
            self.odd.open_labelled(self.model.num_classes, None),
            self.how,
            batch_size=BATCH,
            reference=partial(predict, self.model),
        )
        return Row(
            score=setting.score,
            sparsity=selected.sparsity,
            stored="float32" if setting.bits is None else f"{setting.bits} bits {setting.quantizer}",
            heads=sum(map(len, selected.heads.values())),
            top1=found.top1,
            agreement=found.agreement,
            kl=found.kl,
        )

    def _scores(self, setting: Setting) -> dict[str, NDArray[np.float64]]:
        if setting.score == "sensitivity":
            return self.sensitivity(setting.bits, setting.quantizer)
        name, _, bins = setting.score.partition(", ")
        return score_heads(self.squared if bins else self.uniform, name)

    def _sensitivity(self, bits: Bits | None, quantizer: Quantizer) -> dict[str, NDArray[np.float64]]:
        images = self._tensors(replace(self.even, limit=self.score_images))
        maps = self._maps(bits, quantizer)
        return sensitivity(self.model, self.sites, maps, images, self.score_images, lambda *_: None)

    def _maps(self, bits: Bits | None, quantizer: Quantizer) -> dict[str, NDArray[np.float32]]:
        means = {path: module.mean() for path, module in self.uniform.items()}
        if bits is None:
            return {path: mean.astype(np.float32) for path, mean in means.items()}
        return {path: dequantize(*quantize_rows(mean, bits, quantizer), quantizer) for path, mean in means.items()}

    def _tensors(self, images: ImageSource) -> Iterator[torch.Tensor]:
        return as_tensors(images.batches(images.open(), self.how, BATCH, SILENT), self.how)


def main() -> None:
    """Print one row per setting, and write them as JSON where asked."""
    arguments = _parse()
    console = Console(width=120, highlight=False)
    study = Study(arguments.weights, arguments.data, arguments.crop_pct, arguments.score_images)
    table = Table(box=None)
    for name in Row.model_fields:
        table.add_column(name, justify="right")
    rows = []
    for setting in SETTINGS:
        rows.append(study.row(setting))
        values = [f"{value:.3g}" if isinstance(value, float) else str(value) for _, value in rows[-1]]
        table.add_row(*values)
        console.print("  ".join(values))
    console.print(table)
    if arguments.output:
        write_bytes(arguments.output, ("\n".join(row.model_dump_json() for row in rows) + "\n").encode())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="DeiT-Tiny weights")
    parser.add_argument("--data", type=Path, required=True, help="labelled images")
    parser.add_argument("--crop-pct", type=float, default=0.875, help="share that the centre crop keeps")
    parser.add_argument("--score-images", type=int, default=128, help="images for the sensitivity")
    parser.add_argument("-o", "--output", type=Path, help="also write the rows as JSON lines")
    return parser.parse_args()


if __name__ == "__main__":
    main()
