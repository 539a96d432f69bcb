"""One model on ONNX Runtime CPU: timm's stock exports against EAM engines of several sparsities and granularities.

All engines are loaded together and take turns, with the same input and threads, so that the ratios hold on a machine
whose speed drifts. Absolute times are this machine's at this moment.

    python benchmarks/sparsity.py --model swin_tiny_patch4_window7_224 -o result.json
    python benchmarks/sparsity.py --weights W.safetensors --data IMAGES --granularity head row entry --sparsity 0 0.2

Without weights and images they are random, which does for latency: frozen maps cost the same whatever they hold. Only
which heads, rows or entries are frozen depends on them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from PIL import Image
from rich.console import Console

from eamdeploy import build_ort, export, freeze, profile
from eamdeploy.cli import show_profile
from eamdeploy.devices.provenance import usable_cores
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.host.model import RANDOM, ModelSpec, load_model, preprocessing_of
from eamdeploy.host.stock_export import export_stock
from eamdeploy.images.options import TIMM_PREPROCESSING
from eamdeploy.images.source import ImageSource
from eamdeploy.profiling.timing import Schedule
from eamdeploy.records.profile import Profile
from eamdeploy.vocabulary import GRANULARITIES, WINDOW_MAPS, Exporter, Granularity

OPSET = 18  # the first that both of torch's exporters write for ViT and Swin


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    arguments = _parse()
    spec = ModelSpec(arguments.model, str(arguments.weights) if arguments.weights else RANDOM)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = load_model(spec)
        size = preprocessing_of(model, TIMM_PREPROCESSING).size
        stock = [_stock(model, size, exporter, arguments, work) for exporter in ("torchscript", "dynamo")]
        data = arguments.data or _noise_images(work / "noise", size)
        plans = [(granularity, sparsity) for granularity in arguments.granularity for sparsity in arguments.sparsity]
        if 0 in arguments.sparsity:  # the same for every granularity
            plans = [("head", 0.0), *(plan for plan in plans if plan[1] > 0)]
        engines = [_engine(spec, data, *plan, arguments, work) for plan in plans]
        measured = profile(
            [*stock[1:], *engines],
            stock[0],
            threads=arguments.threads,
            batch=arguments.batch,
            schedule=Schedule(min_seconds=arguments.seconds),
        )
        measured = _without_folder(measured, work)
    Console(width=160).print(show_profile.profile(measured))
    if arguments.output:
        measured.write(arguments.output)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="timm name of a ViT, DeiT or Swin")
    parser.add_argument("--weights", type=Path, help="the model's weights; random ones by default")
    parser.add_argument("--data", type=Path, help="folder of calibration images; noise by default")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.2, 0.5, 1.0])
    parser.add_argument("--granularity", nargs="+", choices=GRANULARITIES, default=["head"])
    parser.add_argument("--window-maps", choices=WINDOW_MAPS, default="shared", help="for models with windows")
    parser.add_argument("--score", default="variance", help="what ranks heads, rows or entries")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--fixed-batch", action="store_true", help="export for this batch size alone")
    parser.add_argument("--seconds", type=float, default=10.0, help="time every engine for at least this long")
    parser.add_argument("-o", "--output", type=Path, help="also write the measurements as JSON")
    return parser.parse_args()


def _stock(model: Any, size: tuple[int, int], exporter: Exporter, arguments: argparse.Namespace, work: Path) -> Path:
    """The model exactly as torch exports it, for ONNX Runtime with its own defaults."""
    path = work / f"stock-{exporter}.onnx"
    batch = arguments.batch if arguments.fixed_batch else None
    onnx.save(export_stock(model, size, batch=batch, opset=OPSET, exporter=exporter).model, path)
    return path


def _engine(
    spec: ModelSpec, data: Path, granularity: Granularity, sparsity: float, arguments: argparse.Namespace, work: Path
) -> Path:
    """An EAM engine, checked against its reference."""
    name = f"{granularity}-{sparsity}"
    checkpoint, model = work / f"{name}.eam.safetensors", work / f"{name}.onnx"
    options = FreezeOptions(
        sparsity=sparsity, granularity=granularity, window_maps=arguments.window_maps, score=arguments.score
    )
    freeze(spec, ImageSource(data, limit=16), checkpoint, options)
    export(checkpoint, model, batch=arguments.batch if arguments.fixed_batch else None, opset=OPSET)
    engine = work / f"eam-{name}.ort.onnx"
    build_ort(model, engine, threads=arguments.threads)
    return engine


def _noise_images(folder: Path, size: tuple[int, int]) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def _without_folder(measured: Profile, work: Path) -> Profile:
    """The same figures with engines named by file, not by a temporary path."""
    return Profile.model_validate_json(measured.model_dump_json().replace(f"{work}/", ""))


if __name__ == "__main__":
    main()
