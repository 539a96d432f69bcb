"""Good files of every kind that eamdeploy reads, small, for the campaign to hurt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_models import make_frozen_model
from fake_jetson import AGX_ORIN_LINE, ORIN_NANO_LINE, THOR_LINE
from made_checkpoints import make
from PIL import Image
from report_records import digest, manifest, remote_profiles, rich_records, write_all
from tiny_models import KWARGS, NAME, draw_pictures, make_model, save_weights

from eamdeploy import build_ort, export, freeze
from eamdeploy.artifacts.files import digest_file
from eamdeploy.artifacts.run_state import RunState, StageState
from eamdeploy.convert.ranges import ActivationRanges
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.engines.manifest import manifest_path
from eamdeploy.host.model import ModelSpec
from eamdeploy.images.source import ImageSource
from eamdeploy.stages.doctor import doctor

KWARGS_HERE = {**KWARGS, "depth": 1, "embed_dim": 24, "num_heads": 3}

TOML = """output = "out"
[model]
name = "vit_tiny_patch16_224"
weights = "no_such_file.safetensors"
class_names = "classes.txt"
[model.kwargs]
img_size = 32
patch_size = 8
[preprocessing]
mean = [0.5, 0.5, 0.5]
crop_pct = 0.9
[calibrate]
data = "pictures"
split = "even"
images = 4
[freeze]
sparsity = 0.4
score = "row-entropy"
bits = 4
[export]
batch = 1
opset = 17
without = ["zero_mask"]
[build]
int8 = true
calibrate = true
min_agreement = 50
[evaluate]
data = "pictures"
skip_bad = true
[profile]
threads = 1
min_seconds = 0.1
"""


def make_good_files(folder: Path) -> None:
    """`folder`, which is new, holds a file of every kind, and those that belong to it beside it."""
    folder.mkdir(parents=True)
    _models(folder)
    _maps(folder)
    _pictures(folder)
    _documents(folder)
    (folder / "tegrastats.txt").write_text("\n".join((AGX_ORIN_LINE, ORIN_NANO_LINE, THOR_LINE)))
    (folder / "run.toml").write_text(TOML)


def _models(folder: Path) -> None:
    model = make_model(changes={key: KWARGS_HERE[key] for key in ("depth", "embed_dim")})
    save_weights(model, folder / "weights.safetensors")
    torch.save({"model": model.state_dict(), "epoch": 3}, folder / "weights.pth")
    torch.save(model.state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    draw_pictures(folder / "pictures", 4)
    checkpoint = folder / "x.eam.safetensors"
    freeze(
        ModelSpec(NAME, str(folder / "weights.safetensors"), KWARGS_HERE),
        ImageSource(folder / "pictures"),
        checkpoint,
        FreezeOptions(sparsity=0.4, score="random"),
    )
    loaded = checkpoints.load(checkpoint)
    for granularity in ("row", "entry"):
        checkpoints.save(make(loaded, granularity, "class"), folder / f"{granularity}.eam.safetensors")
    freeze(
        ModelSpec(NAME, str(folder / "weights.safetensors"), KWARGS_HERE),
        ImageSource(folder / "pictures"),
        folder / "rank.eam.safetensors",
        FreezeOptions(sparsity=0.4, score="random", rank="3"),
    )
    _unsealed(checkpoint, folder / "old.eam.safetensors")
    export(checkpoint, folder / "x.onnx", exporter="torchscript", images=ImageSource(folder / "pictures"))
    build_ort(folder / "x.onnx", folder / "x.ort.onnx", threads=1)
    (folder / "foreign.onnx").write_bytes(make_frozen_model().to_onnx(card=None).SerializeToString())
    (folder / "alone.onnx").write_bytes((folder / "x.onnx").read_bytes())


def _unsealed(sealed: Path, path: Path) -> None:
    """The checkpoint as it was written before there were seals."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(sealed, framework="numpy") as file:
        header = json.loads(file.metadata()["eam"])
    del header["content_digest"]
    save_file(load_file(sealed), path, {"eam": json.dumps({**header, "format": 1})})


def _maps(folder: Path) -> None:
    from safetensors.numpy import save_file

    maps = np.random.default_rng(0).dirichlet(np.ones(17), size=(2, 17)).astype(np.float32)
    mask = np.zeros((2, 17), np.bool_)
    mask[:, ::2] = True
    arrays: dict[str, Any] = {
        "blocks.0.attn.heads": np.array([0, 2]),
        "blocks.0.attn.maps": maps,
        "blocks.0.attn.mask": mask,
    }
    np.savez(folder / "maps.npz", **arrays)
    save_file(arrays, folder / "maps.safetensors")
    rng = np.random.default_rng(2)
    factors: dict[str, Any] = {
        "blocks.0.attn.heads": np.array([2]),
        "blocks.0.attn.maps": maps[1:],
        "blocks.0.attn.rank3.heads": np.array([0]),
        "blocks.0.attn.rank3.mix": rng.dirichlet(np.ones(3), size=(1, 17)).astype(np.float32),
        "blocks.0.attn.rank3.pool": rng.dirichlet(np.ones(17), size=(1, 3)).astype(np.float32),
    }
    np.savez(folder / "factors.npz", **factors)


def _pictures(folder: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 44, 3), np.uint8)
    for suffix in ("png", "jpg", "bmp", "ppm", "webp"):
        (folder / f"one_{suffix}").mkdir()
        Image.fromarray(pixels).save(folder / f"one_{suffix}" / f"a.{suffix}")
    rows = [f"{file.name},{index}" for index, file in enumerate(sorted((folder / "pictures").iterdir()))]
    (folder / "pictures" / "labels.csv").write_text("\n".join(["file,label", *rows]))
    (folder / "classes.json").write_text(json.dumps([f"class {index}" for index in range(10)]))
    (folder / "classes.txt").write_text("\n".join(f"class {index}" for index in range(10)))


def _documents(folder: Path) -> None:
    write_all(folder, {**rich_records(), "machines.json": remote_profiles(), "doctor.json": doctor()})
    export_record = json.loads((folder / "export.json").read_bytes())
    del export_record["content_digest"]  # as from `export --json > export.json`
    (folder / "export.json").write_text(json.dumps(export_record))
    (folder / "x.plan").write_bytes(bytes(range(256)) * 4)
    plan = manifest("x.plan", None, backend="trt", threads=1, engine_digest=digest_file(folder / "x.plan"))
    plan.write(manifest_path(folder / "x.plan"))
    ranges = ActivationRanges(
        key=digest("k"), method="minmax", images=4, source="pictures", ranges={"a": (-1.0, 2.0), "b": (0.0, 0.5)}
    )
    ranges.write(folder / "x.ranges.json")
    outputs = {name: digest_file(folder / name) for name in ("evaluation.json", "model.ort.onnx.json", "pc.json")}
    RunState(stages={"evaluate": StageState(inputs=digest("i"), outputs=outputs)}).write(folder / "run.json")
