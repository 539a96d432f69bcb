"""Our engines beside everything that a user would pick instead: latency, accuracy, size, distance from the floor.

For every number of threads and every batch size all engines are loaded together and take turns, in one process, so that
the ratios hold on a machine whose speed drifts. Stock is the faster of torch's two exports, as measured there. Accuracy
is that of the odd images, one at a time; even images calibrate.

    python benchmarks/peers.py --weights W.safetensors --data IMAGES --keep build/peers -o peers.json --plot peers.svg
    python benchmarks/peers.py --model deit_tiny_patch16_224 --batch 1 --threads 2 --seconds 1 --images 100

DeiT-Tiny has the weights given, any other model random ones: how far an engine agrees with its own unfrozen model is
all that its accuracy can tell. Without `--weights` and `--data` all weights are random and the images noise. Peers that
are not installed are named with the reason; `pip install 'eamdeploy[bench]'` brings them. Our rows on OpenVINO need the
package onnxruntime-openvino in the place of onnxruntime, which then runs all rows of ONNX Runtime
(docs/guides/onnx-runtime.md).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import our_engines
from comparison import run
from peer_engines import PEERS
from peers_show import draw, tables
from PIL import Image
from rich.console import Console
from study import Settings, Study

from eamdeploy.artifacts.files import require_output
from eamdeploy.devices.provenance import usable_cores
from eamdeploy.host.model import RANDOM, ModelSpec
from eamdeploy.profiling.timing import Schedule

DEIT, SWIN = "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
NOISE_IMAGES, NOISE_SIDE = 64, 256


def main() -> None:
    """Print the tables, and write JSON and picture where asked; the JSON after every run, in case one is cut short."""
    arguments = _parse()
    for file in (arguments.output, arguments.plot):
        if file is not None:
            require_output(file)
    with tempfile.TemporaryDirectory() as scratch:
        keep = arguments.keep or Path(scratch)
        settings = Settings(
            data=arguments.data or noise_images(keep / "noise"),
            keep=keep,
            crop_pct=arguments.crop_pct,
            calibration_images=arguments.calibration_images,
            score_images=arguments.score_images,
            images=arguments.images,
        )
        results = run(
            [partial(Study, _spec(name, arguments.weights), settings) for name in arguments.model],
            [*PEERS, *our_engines.plans()],
            [(threads, batch) for threads in arguments.threads for batch in arguments.batch],
            Schedule(min_seconds=arguments.seconds, sittings=arguments.sittings),
            lambda text: print(text, file=sys.stderr),
        )
        for result in results:
            if arguments.output:
                result.write(arguments.output)
    Console(width=200).print(tables(result))
    if arguments.plot:
        draw(result, arguments.plot)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[DEIT, SWIN], help="timm names of ViT, DeiT or Swin")
    parser.add_argument("--weights", type=Path, help="of DeiT-Tiny; random ones by default")
    parser.add_argument("--data", type=Path, help="folder of images; noise by default")
    parser.add_argument("--crop-pct", type=float, default=0.875, help="share that the centre crop keeps")
    parser.add_argument("--calibration-images", type=int, default=300, help="even images for calibration")
    parser.add_argument("--score-images", type=int, default=64, help="even images behind the choice of heads")
    parser.add_argument("--images", type=int, help="odd images for the accuracy; all by default")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, usable_cores()}))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=5.0, help="time every engine for at least this long")
    parser.add_argument("--sittings", type=int, default=5, help="how often engines are loaded anew to time them")
    parser.add_argument("--keep", type=Path, help="folder that keeps what was made, for the next run")
    parser.add_argument("-o", "--output", type=Path, help="also write the measurements as JSON")
    parser.add_argument("--plot", type=Path, help="also draw agreement against latency (.png or .svg)")
    return parser.parse_args()


def _spec(name: str, weights: Path | None) -> ModelSpec:
    return ModelSpec(name, str(weights) if weights is not None and name == DEIT else RANDOM)


def noise_images(folder: Path) -> Path:
    """The folder of random pictures, the same each time; for latency they are as good as photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for index in range(NOISE_IMAGES):
        pixels = rng.integers(0, 256, (NOISE_SIDE, NOISE_SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return folder


if __name__ == "__main__":
    main()
