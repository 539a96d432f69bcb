"""The embedded digit model: its files agree with each other and with the scripts that made them."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
WEIGHTS = REPOSITORY / "models/digits_deit.safetensors"
README = REPOSITORY / "models/README.md"
CALIBRATE = REPOSITORY / "calib_data/digits/calibrate"
HELDOUT = REPOSITORY / "calib_data/digits/heldout"


def read_labels(folder: Path) -> dict[str, int]:
    with (folder / "labels.csv").open(newline="") as file:
        return {row["file"]: int(row["label"]) for row in csv.DictReader(file)}


def read_pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    safetensors = pytest.importorskip("safetensors", reason="reading weights needs the extra 'host'")
    with safetensors.safe_open(WEIGHTS, framework="np") as file:
        return json.loads(file.metadata()["training"])


@pytest.fixture
def digit_images(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn (extra 'dev')")
    monkeypatch.syspath_prepend(str(REPOSITORY / "models"))
    return importlib.import_module("digit_images")


def test_weights_fit_the_timm_model_and_reach_the_stated_heldout_accuracy(facts: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="the timm model needs the extra 'host'")
    timm = pytest.importorskip("timm", reason="the timm model needs the extra 'host'")
    load_file = pytest.importorskip("safetensors.torch").load_file

    model = timm.create_model(facts["timm_model"], num_classes=facts["num_classes"], **facts["timm_kwargs"]).eval()
    model.load_state_dict(load_file(WEIGHTS), strict=True)
    labels = read_labels(HELDOUT)
    pixels = np.stack([read_pixels(HELDOUT / name) for name in labels]).astype(np.float32) / 255
    images = torch.from_numpy(np.repeat(((pixels - 0.5) / 0.5)[:, None], 3, axis=1))
    with torch.inference_mode():
        found = model(images).argmax(-1).numpy()
    top1 = 100 * np.mean(found == np.array(list(labels.values())))

    assert facts["preprocessing"]["mean"] == facts["preprocessing"]["std"] == [0.5, 0.5, 0.5]
    assert top1 == pytest.approx(facts["heldout_top1"], abs=0.5)
    assert top1 > 95


def test_readme_logs_this_very_file(facts: dict[str, Any]) -> None:
    text = README.read_text()
    stated = re.search(r"\| held-out top-1 \| ([\d.]+) % \((\d+) of (\d+) digits wrong\)", text)
    assert stated is not None
    assert float(stated[1]) == pytest.approx(facts["heldout_top1"], abs=0.01)
    assert 100 * (1 - int(stated[2]) / int(stated[3])) == pytest.approx(facts["heldout_top1"], abs=0.01)
    assert int(stated[3]) == facts["heldout_images"] == len(read_labels(HELDOUT))
    assert f"sha256:{hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()}" in text


def test_model_is_small_with_enough_heads(facts: dict[str, Any]) -> None:
    assert WEIGHTS.stat().st_size < 2_000_000
    assert facts["timm_kwargs"]["depth"] * facts["timm_kwargs"]["num_heads"] >= 24


@pytest.mark.parametrize(("folder", "count"), [(CALIBRATE, 64), (HELDOUT, 355)])
def test_folder_is_complete_and_balanced(folder: Path, count: int) -> None:
    labels = read_labels(folder)
    assert {path.name for path in folder.iterdir()} == {*labels, "labels.csv"}
    assert len(labels) == count
    sizes = np.bincount(list(labels.values()), minlength=10)
    assert len(sizes) == 10
    assert sizes.max() - sizes.min() <= 2
    assert {read_pixels(folder / name).shape for name in labels} == {(32, 32)}


def test_no_heldout_digit_calibrates_or_trains(digit_images: Any) -> None:
    split = digit_images.split_digits(digit_images.load_digits().labels)
    heldout = {f"{index:04}.png" for index in split.heldout}
    train = {f"{index:04}.png" for index in split.train}
    assert heldout == set(read_labels(HELDOUT))
    assert heldout.isdisjoint(train)
    assert len(heldout) + len(train) == 1797
    assert set(read_labels(CALIBRATE)) < train


def test_script_writes_the_same_files_again(digit_images: Any, tmp_path: Path) -> None:
    digits = digit_images.load_digits()
    split = digit_images.split_digits(digits.labels)
    digit_images.write_folder(digits, split.calibrate.tolist(), tmp_path / "calibrate")
    written = {path.name: path.read_bytes() for path in (tmp_path / "calibrate").iterdir()}
    assert written == {path.name: path.read_bytes() for path in CALIBRATE.iterdir()}
    for index in split.heldout:
        assert (HELDOUT / f"{index:04}.png").read_bytes() == digit_images.encode_png(digits.pixels[index])


def test_stored_png_holds_the_digit(digit_images: Any) -> None:
    digits = digit_images.load_digits()
    for index in digit_images.split_digits(digits.labels).calibrate:
        with Image.open(CALIBRATE / f"{index:04}.png") as image:
            image.verify()
        assert np.array_equal(read_pixels(CALIBRATE / f"{index:04}.png"), digits.pixels[index])
