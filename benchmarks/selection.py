"""Which heads are frozen by which rule, what the set costs, and how long finding it takes.

Sensitivity is measured twice: for every head on all calibration images, and as `eamdeploy freeze` does by default. Each
rule then chooses heads for every sparsity, and the whole set is measured on the calibration and the validation images.

    python benchmarks/selection.py --weights W.safetensors --data IMAGES    # even images calibrate, odd ones measure
    python benchmarks/selection.py --model swin_… --weights W --calibration A --validation B
    python benchmarks/selection.py --model vit_base_patch16_224 --timed 2   # time alone, extrapolated

With `--timed N` every head is measured on N calibration images, and the times on all of them and on the default's are
extrapolated from that: both are in proportion to the images.

Rules: `score` ranks heads by their divergence and stops at the first that does not fit (eamdeploy until November 2026);
`score per entry` divides it by the head's attention entries and fills up; `together` also counts pairs of heads, on all
images; `default` is what `eamdeploy freeze` does: the better of these two, found on few images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from shown_model import ShownModel

from eamdeploy.artifacts.files import write_json
from eamdeploy.artifacts.records import Record
from eamdeploy.devices.provenance import machine_summary, package_versions, usable_cores
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.host.model import RANDOM, ModelSpec
from eamdeploy.host.scoring import HEAD_IMAGES, PieceScores
from eamdeploy.images.options import PreprocessingOverrides
from eamdeploy.images.source import ImageSource

Pieces = dict[str, NDArray[np.bool_]]


class Row(Record):
    """A rule at a sparsity, and what its heads cost; percent, and nats for the divergences."""

    rule: str
    sparsity: float
    heads: int
    calibration_kl: float | None
    kl: float | None
    agreement: float | None
    top1: float | None


def main() -> None:
    """Print times and one row per rule and sparsity, and write them as JSON where asked."""
    arguments = _parse()
    torch.set_num_threads(arguments.threads)
    console = Console(width=140, highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        calibration, validation = _images(arguments, Path(folder))
        shown = ShownModel(_spec(arguments), calibration, validation, _overrides(arguments))
        images = len(shown.seen.folder.files)
        if arguments.timed:
            seconds = _seconds(lambda: shown.scores(FreezeOptions(score_images=arguments.timed))) / arguments.timed
            times = {"all images": seconds * arguments.images, "default": seconds * HEAD_IMAGES}
            note = f"extrapolated from {arguments.timed} images"
            rows = []
        else:
            few, many = FreezeOptions(), FreezeOptions(score_images=images)
            times = {
                "all images": _seconds(lambda: shown.scores(many)),
                "default": _seconds(lambda: shown.scores(few)),
            }
            note = f"{images} calibration images"
            rows = [
                _row(shown, name, rule(shown, sparsity))
                for sparsity in arguments.sparsity
                for name, rule in _rules(shown.scores(many), shown.scores(few)).items()
            ]
    console.print(f"{machine_summary()}, {arguments.threads} threads; {note}")
    ratio = times["all images"] / times["default"]
    console.print("  ".join(f"{name}: {value:.1f} s" for name, value in times.items()), f" ratio {ratio:.2f}")
    console.print(_table(rows))
    if arguments.output:
        document = {
            "machine": machine_summary(),
            "versions": package_versions(),
            "threads": arguments.threads,
            "seconds": times,
            "note": note,
            "rows": [row.model_dump() for row in rows],
        }
        write_json(arguments.output, document)


def _rules(many: PieceScores, few: PieceScores) -> dict[str, Callable[[ShownModel, float], Pieces]]:
    """What each rule freezes of a model at a sparsity."""
    alone = replace(many, together=None)
    return {
        "score": lambda shown, sparsity: _longest_prefix(shown, many.values, sparsity),
        "score per entry": lambda shown, sparsity: alone.selections(shown.sites, sparsity)[0].pieces,
        "together": lambda shown, sparsity: many.selections(shown.sites, sparsity)[-1].pieces,
        "default": lambda shown, sparsity: shown.chosen(few, FreezeOptions(sparsity)).pieces,
    }


def _longest_prefix(shown: ShownModel, scores: dict[str, NDArray[np.float64]], sparsity: float) -> Pieces:
    """The heads with the lowest scores up to the first that does not fit."""
    heads = [(value, site, head) for site in shown.sites for head, value in enumerate(scores[site.path])]
    budget = sparsity * sum(site.entries_per_head for _, site, _ in heads) * (1 + 1e-9)
    frozen = {site.path: np.zeros(site.heads, np.bool_) for site in shown.sites}
    for _, site, head in sorted(heads, key=lambda each: each[0]):
        budget -= site.entries_per_head
        if budget < 0:
            break
        frozen[site.path][head] = True
    return {path: pieces for path, pieces in frozen.items() if pieces.any()}


def _row(shown: ShownModel, rule: str, pieces: Pieces) -> Row:
    options = FreezeOptions()
    entries = {site.path: site.entries_per_head for site in shown.sites}
    total = sum(site.heads * site.entries_per_head for site in shown.sites)
    on_calibration = shown.measure(pieces, options, shown.calibration)
    found = shown.measure(pieces, options)
    return Row(
        rule=rule,
        sparsity=sum(int(frozen.sum()) * entries[path] for path, frozen in pieces.items()) / total,
        heads=sum(int(frozen.sum()) for frozen in pieces.values()),
        calibration_kl=on_calibration.kl,
        kl=found.kl,
        agreement=found.agreement,
        top1=found.top1,
    )


def _table(rows: list[Row]) -> Table:
    table = Table(box=None)
    for name in Row.model_fields:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for _, value in row))
    return table


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _spec(arguments: argparse.Namespace) -> ModelSpec:
    weights = str(arguments.weights) if arguments.weights else RANDOM
    return ModelSpec(arguments.model, weights, arguments.model_kwargs)


def _overrides(arguments: argparse.Namespace) -> PreprocessingOverrides:
    mean, std = (None if values is None else tuple(values) for values in (arguments.mean, arguments.std))
    return PreprocessingOverrides(mean, std, arguments.crop_pct)


def _images(arguments: argparse.Namespace, scratch: Path) -> tuple[ImageSource, ImageSource]:
    if arguments.calibration:
        calibration = ImageSource(arguments.calibration, limit=arguments.images)
        return calibration, ImageSource(arguments.validation or arguments.calibration)
    if arguments.data is None:
        for index in range(arguments.timed):
            noise = np.random.default_rng(index).integers(0, 256, (256, 256, 3), np.uint8)
            Image.fromarray(noise).save(scratch / f"{index}.png")
        return ImageSource(scratch), ImageSource(scratch)
    return ImageSource(arguments.data, "even", limit=arguments.images), ImageSource(arguments.data, "odd")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm name of a ViT, DeiT or Swin")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, help="timm's arguments as JSON")
    parser.add_argument("--weights", type=Path, help="the model's weights; random ones by default")
    parser.add_argument("--data", type=Path, help="labelled images: even ones calibrate, odd ones measure")
    parser.add_argument("--calibration", type=Path, help="calibration images, in place of --data")
    parser.add_argument("--validation", type=Path, help="labelled images that measure, beside --calibration")
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--timed", type=int, default=0, help="only time, on so many images (noise without --data)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--crop-pct", type=float, help="share that the centre crop keeps; the model's own by default")
    parser.add_argument("--mean", type=float, nargs=3, help="of the pixels, 0 to 1; the model's own by default")
    parser.add_argument("--std", type=float, nargs=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("-o", "--output", type=Path, help="also write times and rows as JSON")
    arguments = parser.parse_args()
    if not (arguments.data or arguments.calibration or arguments.timed):
        parser.error("give --data, --calibration or --timed")
    return arguments


if __name__ == "__main__":
    main()
