"""DeiT-Tiny on ONNX Runtime CPU: timm's stock export against EAM engines at sparsity 0, 0.2, 0.5 and 1.

All engines are loaded together and take turns, with the same input and threads, so that the ratios hold on a machine
whose speed drifts. Absolute times are this machine's at this moment.

    python benchmarks/deit_sparsity.py --weights W.safetensors --data IMAGES -o result.json

Without weights and images they are random, which does for latency: frozen maps cost the same whatever they hold.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from rich.console import Console

from eamdeploy import build_ort, export, freeze, profile, show
from eamdeploy.engines.provenance import usable_cores
from eamdeploy.host.freezing import FreezeOptions
from eamdeploy.host.model import RANDOM, ModelSpec, load_model
from eamdeploy.host.stock_export import export_stock
from eamdeploy.profiling.profile import Profile
from eamdeploy.source import ImageSource

MODEL = "deit_tiny_patch16_224"
SIZE = (224, 224)
SPARSITIES = (0.0, 0.2, 0.5, 1.0)
OPSET = 17


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    arguments = _parse()
    spec = ModelSpec(MODEL, str(arguments.weights) if arguments.weights else RANDOM)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = arguments.data or _noise_images(work / "noise")
        stock = [_stock(spec, exporter, arguments, work) for exporter in ("torchscript", "dynamo")]
        engines = [_engine(spec, data, sparsity, arguments, work) for sparsity in SPARSITIES]
        measured = profile(
            [*stock[1:], *engines],
            stock[0],
            threads=arguments.threads,
            batch=arguments.batch,
            min_seconds=arguments.seconds,
        )
        measured = _without_folder(measured, work)
    Console(width=160).print(show.profile(measured))
    if arguments.output:
        measured.write(arguments.output)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="DeiT-Tiny weights; random ones by default")
    parser.add_argument("--data", type=Path, help="folder of calibration images; noise by default")
    parser.add_argument("--score", default="row-entropy", help="what ranks the heads")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--fixed-batch", action="store_true", help="export for this batch size alone")
    parser.add_argument("--seconds", type=float, default=10.0, help="time every engine for at least this long")
    parser.add_argument("-o", "--output", type=Path, help="also write the measurements as JSON")
    return parser.parse_args()


def _stock(spec: ModelSpec, exporter: str, arguments: argparse.Namespace, work: Path) -> Path:
    """The model exactly as torch exports it, for ONNX Runtime with its own defaults."""
    path = work / f"stock-{exporter}.onnx"
    batch = arguments.batch if arguments.fixed_batch else None
    onnx.save(export_stock(load_model(spec), SIZE, batch=batch, opset=OPSET, exporter=exporter).model, path)
    return path


def _engine(spec: ModelSpec, data: Path, sparsity: float, arguments: argparse.Namespace, work: Path) -> Path:
    """An EAM engine, checked against its reference."""
    checkpoint, model = work / f"{sparsity}.eam.safetensors", work / f"{sparsity}.onnx"
    options = FreezeOptions(sparsity=sparsity, score=arguments.score, score_images=16)
    freeze(spec, ImageSource(data, limit=16), checkpoint, options)
    export(checkpoint, model, batch=arguments.batch if arguments.fixed_batch else None, opset=OPSET)
    engine = work / f"eam-{sparsity}.ort.onnx"
    build_ort(model, engine, threads=arguments.threads)
    return engine


def _noise_images(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def _without_folder(measured: Profile, work: Path) -> Profile:
    """The same figures with engines named by file, not by a temporary path."""
    return Profile.model_validate_json(measured.model_dump_json().replace(f"{work}/", ""))


if __name__ == "__main__":
    main()
