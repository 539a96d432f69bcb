"""The embedded digit models: their files agree with each other and with the scripts that made them."""

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

from eamdeploy.cli.options import parse_model_kwargs, split_model_kwargs
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.pipeline.config import load_config

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "models/README.md"
FROZEN = ("digits_deit", "digits_swin")
"""Models with an EAM checkpoint beside their weights."""
NAMES = (*FROZEN, "digits_fine")
CALIBRATE = REPOSITORY / "calib_data/digits/calibrate"
HELDOUT = REPOSITORY / "calib_data/digits/heldout"


def read_labels(folder: Path) -> dict[str, int]:
    with (folder / "labels.csv").open(newline="") as file:
        return {row["file"]: int(row["label"]) for row in csv.DictReader(file)}


def read_pixels(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(path) as image:
        return np.asarray(image)


def weights_of(name: str) -> Path:
    return REPOSITORY / f"models/{name}.safetensors"


def heldout_pixels(size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Grey, uint8 [B,size,size], in the order of `labels.csv`."""
    images = [Image.fromarray(read_pixels(HELDOUT / name)) for name in read_labels(HELDOUT)]
    return np.stack([np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images])


def heldout_top1(model: Any) -> float:
    """Percent of the held-out digits that the torch model gets right; preprocessed here, independently of eamdeploy."""
    torch = pytest.importorskip("torch", reason="the timm model needs the extra 'host'")
    pixels = (heldout_pixels(model.patch_embed.img_size[0]).astype(np.float32) / 255 - 0.5) / 0.5
    with torch.inference_mode():
        found = model(torch.from_numpy(np.repeat(pixels[:, None], 3, axis=1))).argmax(-1).numpy()
    return 100 * float(np.mean(found == np.array(list(read_labels(HELDOUT).values()))))


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def facts(name: str) -> dict[str, Any]:
    safetensors = pytest.importorskip("safetensors", reason="reading weights needs the extra 'host'")
    with safetensors.safe_open(weights_of(name), framework="np") as file:
        return json.loads(file.metadata()["training"])


@pytest.fixture(scope="module")
def model(name: str, facts: dict[str, Any]) -> Any:
    pytest.importorskip("torch", reason="the timm model needs the extra 'host'")
    timm = pytest.importorskip("timm", reason="the timm model needs the extra 'host'")
    load_file = pytest.importorskip("safetensors.torch").load_file
    made = timm.create_model(facts["timm_model"], num_classes=facts["num_classes"], **facts["timm_kwargs"]).eval()
    made.load_state_dict(load_file(weights_of(name)), strict=True)
    return made


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of models/ can be imported."""
    pytest.importorskip("sklearn", reason="the digits come from scikit-learn (extra 'dev')")
    monkeypatch.syspath_prepend(str(REPOSITORY / "models"))


@pytest.fixture
def digit_images(scripts: None) -> Any:
    return importlib.import_module("digit_images")


def test_weights_reach_the_stated_heldout_accuracy(model: Any, facts: dict[str, Any]) -> None:
    reached = heldout_top1(model)
    assert facts["preprocessing"]["mean"] == facts["preprocessing"]["std"] == [0.5, 0.5, 0.5]
    assert reached == pytest.approx(facts["heldout_top1"], abs=0.5)
    assert reached > 94


def test_readme_logs_this_very_file(name: str, facts: dict[str, Any]) -> None:
    log = re.search(rf"<!-- training log of {name} -->(.*?)<!-- end -->", README.read_text(), re.DOTALL)
    assert log is not None
    stated = re.search(r"\| held-out top-1 \| ([\d.]+) % \((\d+) of (\d+) digits wrong\)", log[1])
    assert stated is not None
    assert float(stated[1]) == pytest.approx(facts["heldout_top1"], abs=0.01)
    assert 100 * (1 - int(stated[2]) / int(stated[3])) == pytest.approx(facts["heldout_top1"], abs=0.01)
    assert int(stated[3]) == facts["heldout_images"] == len(read_labels(HELDOUT))
    assert f"sha256:{hashlib.sha256(weights_of(name).read_bytes()).hexdigest()}" in log[1]


def test_model_is_small_with_enough_heads(name: str, model: Any) -> None:
    assert weights_of(name).stat().st_size < 2_000_000
    heads = sum(module.num_heads for module in model.modules() if hasattr(module, "qkv"))
    assert heads >= (24 if name in FROZEN else 16)


@pytest.mark.parametrize("name", ["digits_swin"], indirect=True)
def test_swin_has_windows_of_every_kind(model: Any) -> None:
    """Unshifted blocks, shifted ones whose windows share masks or have one each, and a stage of a single window."""
    found = []  # (windows, different shift masks) of every block
    for stage in model.layers:
        for block in stage.blocks:
            mask = block.attn_mask
            windows = np.prod(np.array(block.input_resolution) // np.array(block.window_size))
            found.append((int(windows), 0 if mask is None else len(mask.flatten(1).unique(dim=0))))
    assert found == [(16, 0), (16, 4), (4, 0), (4, 4), (1, 0), (1, 0)]


def test_run_config_is_the_trained_model_on_the_embedded_images(name: str, facts: dict[str, Any]) -> None:
    config = load_config(REPOSITORY / f"models/{name}.toml")
    assert config.model.name == facts["timm_model"]
    assert config.model.kwargs == {**facts["timm_kwargs"], "num_classes": facts["num_classes"]}
    assert Path(config.model.weights).resolve() == weights_of(name)
    assert [config.preprocessing.mean, config.preprocessing.std] == [(0.5, 0.5, 0.5)] * 2
    assert config.preprocessing.crop_pct == facts["preprocessing"]["crop_pct"] == 1.0
    assert config.calibrate.data.resolve() == CALIBRATE
    assert config.evaluate is not None and config.evaluate.data.resolve() == HELDOUT
    assert config.output.resolve() == REPOSITORY / "demo_output" / name


def test_demo_freezes_three_layers_of_four_and_compares_with_torchs_export() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    recipe = makefile.partition("\ndemo:")[2].partition("\n\n")[0]
    (name,) = re.findall(r"eamdeploy run --force models/(\w+)\.toml$", recipe, re.MULTILINE)
    config = load_config(REPOSITORY / f"models/{name}.toml")
    assert config.freeze.sparsity == 0.75 and config.export.stock


@pytest.mark.parametrize("name", ["digits_fine"], indirect=True)
def test_layers_that_worked_with_their_mean_maps_can_be_frozen_whole(
    name: str, model: Any, facts: dict[str, Any], tmp_path: Path
) -> None:
    """What `make demo` shows: the choice falls on these layers, and accuracy stays within half a point."""
    host = pytest.importorskip("eamdeploy.host.model", reason="freezing needs the extra 'host'")
    from eamdeploy import freeze
    from eamdeploy.host.reference import load_reference

    config, output = load_config(REPOSITORY / f"models/{name}.toml"), tmp_path / "x.eam.safetensors"
    spec = host.ModelSpec(config.model.name, config.model.weights, config.model.kwargs)
    header = freeze(spec, config.calibrate.source, output, config.freeze, overrides=config.preprocessing)
    assert header.freezing.heads == {f"blocks.{index}.attn": [0, 1, 2, 3] for index in range(3)}
    frozen = load_reference(checkpoints.load(output), frozen=True, where=output.name).model
    assert heldout_top1(frozen) >= facts["heldout_top1"] - 0.5


def test_freeze_command_spells_the_recipe(name: str, facts: dict[str, Any], scripts: None) -> None:
    """Also the lists, such as `depths=[2, 2, 2]`, which come back from the command line as lists."""
    train_digits = importlib.import_module("train_digits")
    recipe = next(recipe for recipe in train_digits.MODELS if recipe.name == name)
    spelled = split_model_kwargs(train_digits.freeze_command(recipe))
    kwargs = [spelled[index + 1] for index, argument in enumerate(spelled) if argument == "--model-kwargs"]
    assert parse_model_kwargs(kwargs) == {"num_classes": facts["num_classes"], **facts["timm_kwargs"]}
    assert spelled[spelled.index("--model") + 1] == facts["timm_model"]


def test_log_replaces_its_own_place_only_even_an_empty_one(scripts: None) -> None:
    insert_log = importlib.import_module("train_digits").insert_log
    empty = "<!-- training log of a -->\n<!-- end -->\ntext\n<!-- training log of b -->\nold\n<!-- end -->\n"
    filled = empty.replace(" a -->\n", " a -->\nnew\n")
    assert insert_log(empty, "a", "new") == insert_log(filled, "a", "new") == filled
    assert insert_log(empty, "b", "new") == empty.replace("old", "new")
    with pytest.raises(ValueError, match="no place for the training log of c"):
        insert_log(empty, "c", "new")


@pytest.mark.parametrize("name", FROZEN, indirect=True)
def test_checkpoint_holds_the_trained_weights(name: str, facts: dict[str, Any]) -> None:
    load_file = pytest.importorskip("safetensors.numpy", reason="reading weights needs the extra 'host'").load_file
    checkpoint = checkpoints.load(weights_of(name).with_suffix(".eam.safetensors"))
    header, weights = checkpoint.header, load_file(weights_of(name))
    assert checkpoint.weights.keys() == weights.keys()
    assert all(np.array_equal(checkpoint.weights[key], weights[key]) for key in weights)
    assert header.timm_kwargs == {"num_classes": facts["num_classes"], **facts["timm_kwargs"]}
    assert header.preprocessing.model_dump(mode="json") == facts["preprocessing"]
    assert header.freezing.granularity == "head" and 0.15 < header.freezing.sparsity <= 0.2


@pytest.mark.parametrize("name", FROZEN, indirect=True)
def test_frozen_model_keeps_its_accuracy(name: str, facts: dict[str, Any]) -> None:
    reference = pytest.importorskip("eamdeploy.host.reference", reason="the reference forward needs the extra 'host'")
    path = weights_of(name).with_suffix(".eam.safetensors")
    loaded = reference.load_reference(checkpoints.load(path), frozen=True, where=path.name)
    assert heldout_top1(loaded.model) >= facts["heldout_top1"] - 0.5


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
