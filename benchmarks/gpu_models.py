"""The ONNX models of the GPU check, made where torch is, to be built and measured where the GPU is.

    python benchmarks/gpu_models.py --weights W.safetensors --data IMAGES build/gpu-check --archive models.tar.xz

DeiT-Tiny: timm's stock export, and frozen by sensitivity; scattered heads against whole layers at the same sparsity;
two of them in INT8 too. Swin-Tiny with random weights, which tell time and size only. Each with its reference set.

The archive is small because float32 weights that were stored as float16 end in zeros, and models share most of theirs.
"""

from __future__ import annotations

import argparse
import lzma
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from PIL import Image
from safetensors.numpy import save_file

from eamdeploy import export, freeze
from eamdeploy.artifacts.files import digest_file
from eamdeploy.convert.ranges import Calibration
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.records import Checkpoint, FrozenMaps
from eamdeploy.eam.selection import sparsity_of
from eamdeploy.engines.trt.request import TrtOptions
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.host.model import RANDOM, ModelSpec, load_model
from eamdeploy.host.stock_export import export_stock
from eamdeploy.images.options import PreprocessingOverrides
from eamdeploy.images.source import ImageSource
from eamdeploy.parity.reference_set import ReferenceSet, reference_path
from eamdeploy.stages.build_trt import plan_trt_build

FORM = TrtVersion.parse("10.3")  # INT8 maps at opset 17: `build-trt` makes floats of them where they must be
REFERENCE_IMAGES = 32
DEIT, SWIN = "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
MANTISSA_BITS = 4  # of random weights: they mean nothing, and so they pack well

MODELS = (
    *(f"deit-{name}" for name in ("base", "heads-20", "heads-25", "heads-50", "heads-100", "layers-25", "layers-50")),
    *(f"deit-{name}" for name in ("base-int8", "heads-20-int8", "all-tokens", "stock")),
    *("swin-base", "swin-heads-20"),
)
"""What is made, by the files' names; all but the stock export with a reference set."""

Heads = Mapping[str, list[int]]


def main() -> None:
    """Write the models into a folder, and pack it where asked."""
    arguments = _parse()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        data = arguments.data or _noise_images(work / "noise")
        _make_deit(folder, arguments.weights, ImageSource(data, "even"), arguments.score_images, work)
        _make_swin(folder, ImageSource(data, "even", limit=16), work)
    assert all((folder / f"{name}.onnx").exists() for name in MODELS)
    if arguments.archive:
        pack(folder, arguments.archive)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the models go")
    parser.add_argument("--weights", type=Path, help="of DeiT-Tiny; random ones by default")
    parser.add_argument(
        "--data", type=Path, help="folder of images, of which every other one is used; noise by default"
    )
    parser.add_argument("--score-images", type=int, default=64, help="images behind the choice of heads")
    parser.add_argument("--archive", type=Path, help="also pack the folder into this .tar.xz")
    return parser.parse_args()


def _make_deit(folder: Path, weights: Path | None, images: ImageSource, score_images: int, work: Path) -> None:
    everything = work / "deit.eam.safetensors"
    spec = ModelSpec(DEIT, str(weights) if weights else RANDOM)
    options = FreezeOptions(sparsity=1.0, score="sensitivity", score_images=score_images)
    freeze(spec, images, everything, options, overrides=PreprocessingOverrides(crop_pct=0.875))
    frozen = checkpoints.load(everything)
    layers, heads = ranked_layers(frozen), ranked_heads(frozen)
    choices: dict[str, Heads] = {
        "heads-20": grouped(heads[:7]),
        "heads-25": grouped(heads[:9]),
        "layers-25": grouped([head for head in heads if head[0] in layers[:3]]),
        "heads-50": grouped(heads[:18]),
        "layers-50": grouped([head for head in heads if head[0] in layers[:6]]),
        "heads-100": grouped(heads),
    }
    reference = replace(images, limit=REFERENCE_IMAGES)
    for name, chosen in choices.items():
        checkpoint, output = work / f"{name}.eam.safetensors", folder / f"deit-{name}.onnx"
        checkpoints.save(subset(frozen, chosen), checkpoint)
        baseline = folder / "deit-base.onnx" if name == "heads-20" else None
        export(checkpoint, output, baseline=baseline, trt=FORM, images=reference)
    for name in ("base", "heads-20"):
        _quantize(folder / f"deit-{name}.onnx", folder / f"deit-{name}-int8.onnx", replace(images, limit=64))
    _export_all_tokens(work / "heads-20.eam.safetensors", folder / "deit-all-tokens.onnx", reference, work)
    # TensorRT 8.6.0 refuses the dynamo exporter's class token: "node_cat: error while computing output extent"
    stock = export_stock(load_model(spec), (224, 224), batch=None, opset=17, exporter="torchscript")
    onnx.save(stock.model, folder / "deit-stock.onnx")


def _export_all_tokens(checkpoint: Path, output: Path, images: ImageSource, work: Path) -> None:
    """The unfrozen model, whose last block computes all tokens."""
    frozen = work / f"frozen-{output.name}"
    export(checkpoint, frozen, baseline=output, trt=FORM, images=images, without=("class_token_only",))


def _make_swin(folder: Path, images: ImageSource, work: Path) -> None:
    weights, checkpoint = work / "swin.safetensors", work / "swin.eam.safetensors"
    state = load_model(ModelSpec(SWIN, RANDOM)).state_dict()
    save_file({name: rounded(tensor.numpy()) for name, tensor in state.items()}, weights)
    freeze(ModelSpec(SWIN, str(weights)), images, checkpoint, FreezeOptions(sparsity=0.2, score="variance"))
    export(checkpoint, folder / "swin-heads-20.onnx", baseline=folder / "swin-base.onnx", trt=FORM)


def _quantize(model: Path, output: Path, images: ImageSource) -> None:
    """The model in INT8, as `build-trt --int8` would have it, with the reference set of the model itself."""
    plan_trt_build(model, TrtOptions(int8=True), FORM, calibration=Calibration(images), onnx_output=output)
    reference = ReferenceSet.load(reference_path(model))
    replace(reference, model_digest=digest_file(output)).save(reference_path(output))


def ranked_heads(checkpoint: Checkpoint) -> list[tuple[str, int]]:
    """Every head as module path and number, the one that matters least first."""
    scores = checkpoint.header.freezing.scores
    return sorted(
        ((path, head) for path in scores for head in range(len(scores[path]))), key=lambda h: scores[h[0]][h[1]]
    )


def ranked_layers(checkpoint: Checkpoint) -> list[str]:
    """Every module by the mean score of its heads, the one that matters least first."""
    scores = checkpoint.header.freezing.scores
    return sorted(scores, key=lambda path: float(np.mean(scores[path])))


def grouped(heads: list[tuple[str, int]]) -> Heads:
    """The heads' numbers by module."""
    return {path: sorted(head for other, head in heads if other == path) for path, _ in heads}


def subset(checkpoint: Checkpoint, heads: Heads) -> Checkpoint:
    """The checkpoint with these heads frozen and all others live; all of them must be frozen in it."""
    frozen = {}
    for path, wanted in heads.items():
        maps = checkpoint.frozen[path]
        rows = np.searchsorted(maps.heads, wanted)
        frozen[path] = FrozenMaps(maps.heads[rows], maps.codes[rows], maps.scales[rows])
    sparsity = sparsity_of(frozen, checkpoint.header.attention)
    changes = {"heads": {path: list(each) for path, each in heads.items()}, "sparsity": sparsity}
    freezing = checkpoint.header.freezing.model_copy(update={**changes, "sparsity_asked": sparsity})
    return replace(checkpoint, frozen=frozen, header=checkpoint.header.model_copy(update={"freezing": freezing}))


def rounded(values: np.ndarray) -> np.ndarray:
    """Float32 values with fewer mantissa bits; others as they are."""
    if values.dtype != np.float32:
        return values
    mantissas, exponents = np.frexp(values)
    return np.ldexp(np.round(mantissas * 2**MANTISSA_BITS) / 2**MANTISSA_BITS, exponents).astype(np.float32)


def pack(folder: Path, archive: Path) -> None:
    """`archive` holds the folder's models and reference sets; what they share is stored once."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 512 << 20, "lc": 0, "lp": 2, "pb": 2}]
    with lzma.open(archive, "wb", filters=filters) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
        for file in sorted([*folder.glob("*.onnx"), *folder.glob("*.npz")]):
            tar.add(file, file.name)
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")


def _noise_images(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(32):
        Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


if __name__ == "__main__":
    main()
