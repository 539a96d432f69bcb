"""Trains the embedded digit models, after writing the digit images they are calibrated and measured on.

    python models/train_digits.py            every model of `MODELS`, some minutes each
    python models/train_digits.py --freeze   afterwards also the EAM checkpoints, with `eamdeploy freeze`

Everything is seeded: the same machine, versions and thread count give the same files, bit for bit. Needs the extras
`host` and `dev` (scikit-learn has the digits). The log of each training goes into models/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from digit_images import (
    CALIBRATE,
    CALIBRATION_IMAGES,
    CLASSES,
    PREPROCESSING,
    REPOSITORY,
    Digits,
    Split,
    load_digits,
    resized,
    split_digits,
    write_all,
)
from mean_maps import mean_maps
from numpy.typing import NDArray

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.artifacts.files import digest_file, write_bytes

PACKAGES = ("torch", "timm", "numpy", "pillow", "scikit-learn")


@dataclass(frozen=True)
class Recipe:
    """A model of the table and how it is trained; `kwargs` are timm's, beside `num_classes`.

    Attributes:
        freezable: so many of the first layers learn to work with their mean maps too, see `mean_maps`.
        threads: CPU threads; the weights depend on it.
        sparsity: of the EAM checkpoint beside the weights; None where there is none.
    """

    name: str
    timm_model: str
    kwargs: Mapping[str, int | float | list[int]]
    epochs: int
    batch_size: int = 64
    peak_learning_rate: float = 1.5e-3
    warmup_epochs: int = 4
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    seed: int = 0
    freezable: int = 0
    threads: int = 1
    sparsity: float | None = 0.2

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image becomes the model's input."""
        size = int(self.kwargs["img_size"])  # type: ignore[arg-type]
        return PREPROCESSING.model_copy(update={"size": (size, size)})

    @property
    def weights(self) -> Path:
        """Where the trained weights go, relative to the repository."""
        return Path("models") / f"{self.name}.safetensors"


MODELS = (
    Recipe(
        name="digits_deit",
        timm_model="deit_tiny_patch16_224",
        kwargs={"img_size": 32, "patch_size": 4, "embed_dim": 64, "depth": 6, "num_heads": 4, "mlp_ratio": 2},
        epochs=60,
    ),
    # grids of 16, 8 and 4 tokens a side, so 16, 4 and 1 windows; where there are several, every second block is shifted
    Recipe(
        name="digits_swin",
        timm_model="swin_tiny_patch4_window7_224",
        kwargs={
            "img_size": 32,
            "patch_size": 2,
            "embed_dim": 32,
            "depths": [2, 2, 2],
            "num_heads": [2, 4, 8],
            "window_size": 4,
            "mlp_ratio": 2,
        },
        epochs=120,
    ),
    # 14 × 14 patches of 2 pixels: so many tokens that attention takes most of the time
    Recipe(
        name="digits_fine",
        timm_model="deit_tiny_patch16_224",
        kwargs={"img_size": 28, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2},
        epochs=70,
        freezable=3,
        threads=2,
        sparsity=None,
    ),
)


@dataclass(frozen=True)
class Training:
    """What a training measured; `losses` holds the mean cross-entropy of each epoch in nats."""

    losses: tuple[float, ...]
    heldout_top1: float
    train_top1: float
    duration_s: float


def to_input(unit: torch.Tensor) -> torch.Tensor:
    """Grey pixels on a 0…1 scale [B,32,32] as the model's normalized input float32 [B,3,32,32]."""
    mean = torch.tensor(PREPROCESSING.mean).view(1, 3, 1, 1)
    std = torch.tensor(PREPROCESSING.std).view(1, 3, 1, 1)
    return (unit.unsqueeze(1).expand(-1, 3, -1, -1) - mean) / std


def augment(unit: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Grey pixels [B,32,32], each turned by up to 12°, scaled by up to 12 % and shifted by up to 3 pixels."""
    B, H, _ = unit.shape
    turn, grow, right, down = (torch.rand(4, B, generator=generator) * 2 - 1).unbind()
    angle, scale = turn * math.radians(12), 1 + 0.12 * grow
    shift = torch.stack([right, down], dim=-1) * (2 * 3 / H)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).view(B, 2, 2)
    affine = torch.cat([rotation * scale.view(B, 1, 1), shift.unsqueeze(-1)], dim=-1)
    grid = torch.nn.functional.affine_grid(affine, [B, 1, H, H], align_corners=False)
    return torch.nn.functional.grid_sample(unit.unsqueeze(1), grid, align_corners=False).squeeze(1)


def top1(model: torch.nn.Module, digits: Digits, indices: NDArray[np.int64]) -> float:
    """Percent of the chosen digits that the model gets right."""
    model.eval()
    unit = torch.from_numpy(digits.pixels[indices]).float() / 255
    with torch.inference_mode():
        found = torch.cat([model(to_input(part)).argmax(-1) for part in torch.split(unit, 256)])
    return 100 * float((found.numpy() == digits.labels[indices]).mean())


def train(recipe: Recipe, digits: Digits, split: Split) -> tuple[torch.nn.Module, Training]:
    """The model after its last epoch on `split.train`, and what it reaches on the held-out digits, used only here."""
    import timm

    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = timm.create_model(recipe.timm_model, num_classes=CLASSES, **recipe.kwargs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.peak_learning_rate, weight_decay=recipe.weight_decay)
    steps = math.ceil(len(split.train) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step / steps, recipe))
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    unit, labels = torch.from_numpy(digits.pixels).float() / 255, torch.from_numpy(digits.labels)
    losses: list[float] = []
    start = time.monotonic()
    with mean_maps([block.attn for block in _blocks(model)[: recipe.freezable]], generator):
        for epoch in range(recipe.epochs):
            model.train()
            order = torch.from_numpy(split.train)[torch.randperm(len(split.train), generator=generator)]
            total = 0.0
            for chosen in torch.split(order, recipe.batch_size):
                loss = criterion(model(to_input(augment(unit[chosen], generator))), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                total += loss.item() * len(chosen)
            losses.append(total / len(order))
            print(f"{recipe.name} epoch {epoch + 1}/{recipe.epochs} loss {losses[-1]:.4f}", flush=True)
    duration = time.monotonic() - start
    measured = Training(tuple(losses), top1(model, digits, split.heldout), top1(model, digits, split.train), duration)
    return model, measured


def _blocks(model: Any) -> list[Any]:
    """The blocks of a ViT; none of a Swin, which has stages."""
    return list(getattr(model, "blocks", ()))


def _learning_rate_factor(epoch: float, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if epoch < recipe.warmup_epochs:
        return (epoch + 0.1) / (recipe.warmup_epochs + 0.1)
    progress = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def save_weights(recipe: Recipe, model: torch.nn.Module, training: Training, split: Split, path: Path) -> None:
    """`path` holds the float32 weights under timm's names; its metadata `training` says how to make and feed the model.

    One metadata key, because safetensors writes several in an arbitrary order and the file should be reproducible.
    """
    from safetensors.torch import save

    facts = {
        "timm_model": recipe.timm_model,
        "timm_kwargs": dict(recipe.kwargs),
        "num_classes": CLASSES,
        "preprocessing": recipe.preprocessing.model_dump(mode="json"),
        "heldout_top1": round(training.heldout_top1, 3),
        "heldout_images": len(split.heldout),
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "versions": {package: version(package) for package in PACKAGES},
    }
    state = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(path, save(state, metadata={"training": json.dumps(facts)}))


def describe(recipe: Recipe, training: Training, split: Split, weights: Path) -> str:
    """The training's log as Markdown."""
    wrong = round(len(split.heldout) * (1 - training.heldout_top1 / 100))
    shown = sorted({0, *range(9, recipe.epochs, 10), recipe.epochs - 1})
    rows = {
        "timm model": f"`{recipe.timm_model}`, `{json.dumps(dict(recipe.kwargs))}`",
        "held-out top-1": f"{training.heldout_top1:.2f} % ({wrong} of {len(split.heldout)} digits wrong)",
        "training top-1": f"{training.train_top1:.2f} % of {len(split.train)} digits, not augmented",
        "loss by epoch (nats)": ", ".join(f"{epoch + 1}: {training.losses[epoch]:.3f}" for epoch in shown),
        "duration": f"{training.duration_s:.0f} s, {torch.get_num_threads()} thread(s)",
        "machine": f"{_cpu_name()}, {platform.system()} {platform.machine()}, no GPU",
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in PACKAGES)]),
        "file": f"{weights.stat().st_size} bytes, `{digest_file(weights)}`",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def insert_log(readme: str, name: str, log: str) -> str:
    """`readme` with `log` in place of what stood between the two comments that mark the place for model `name`."""
    start, end = f"<!-- training log of {name} -->\n", "<!-- end -->"
    before, found, rest = readme.partition(start)
    if not found or end not in rest:
        raise ValueError(f"models/README.md has no place for the training log of {name}")
    return f"{before}{start}{log}\n{rest[rest.index(end) :]}"


def freeze_command(recipe: Recipe) -> list[str]:
    """The command, run in the repository, that makes the EAM checkpoint beside the weights."""
    how = recipe.preprocessing
    return [
        *(sys.executable, "-m", "eamdeploy.cli", "freeze", "--model", recipe.timm_model),
        *("--weights", str(recipe.weights)),
        *("--model-kwargs", f"num_classes={CLASSES}", *(f"{name}={value}" for name, value in recipe.kwargs.items())),
        *("--mean", *map(str, how.mean), "--std", *map(str, how.std), "--crop-pct", str(how.crop_pct)),
        *("--data", str(CALIBRATE), "--images", str(CALIBRATION_IMAGES)),
        *("--sparsity", str(recipe.sparsity), "--granularity", "head"),
        *("--score", "sensitivity", "--bits", "4", "--quantizer", "squared"),
        *("-o", str(recipe.weights.with_suffix(".eam.safetensors"))),
    ]


def main() -> None:
    """Parses the command line and makes what it asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=[recipe.name for recipe in MODELS], help="train only this one")
    parser.add_argument("--freeze", action="store_true", help="afterwards make the EAM checkpoints")
    options = parser.parse_args()
    digits = load_digits()
    split = split_digits(digits.labels)
    write_all(digits, split)
    readme = REPOSITORY / "models/README.md"
    for recipe in MODELS:
        if options.model in (None, recipe.name):
            model, training = train(recipe, resized(digits, recipe.preprocessing.size), split)
            save_weights(recipe, model, training, split, REPOSITORY / recipe.weights)
            log = describe(recipe, training, split, REPOSITORY / recipe.weights)
            write_bytes(readme, insert_log(readme.read_text(), recipe.name, log).encode())
            print(f"{recipe.name}: {training.heldout_top1:.2f} % of the held-out digits right")
            if options.freeze and recipe.sparsity is not None:
                subprocess.run(freeze_command(recipe), cwd=REPOSITORY, check=True)


if __name__ == "__main__":
    main()
