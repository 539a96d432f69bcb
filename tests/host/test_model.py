from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from foreign_files import FOREIGN, Trap, assert_plain, write_foreign
from safetensors.torch import load_file, save_file
from tiny_models import KWARGS, NAME, SWIN_KWARGS, SWIN_NAME, images, make_model
from torch import nn

from eamdeploy.artifacts.card import Preprocessing
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.host.model import ModelSpec, load_model, load_weights, preprocessing_of, read_weights, to_numpy
from eamdeploy.images.options import TIMM_PREPROCESSING, PreprocessingOverrides

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def state(tiny_weights: Path) -> dict[str, torch.Tensor]:
    return load_file(tiny_weights)


def spec_of(weights: Path | str, **changes: object) -> ModelSpec:
    return ModelSpec(NAME, str(weights), {**KWARGS, **changes})


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in wanted)


# --- where weights come from -----------------------------------------------------------------------------------------


def test_safetensors_weights_arrive_whole_in_evaluation_mode(tiny_weights: Path) -> None:
    model = load_model(spec_of(tiny_weights))
    assert not model.training
    with torch.inference_mode():
        assert torch.equal(model(images()), make_model()(images()))


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_ema", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module."], ids=["plain", "DDP"])
def test_pth_weights_are_found_under_every_training_key(
    state: dict[str, torch.Tensor], tmp_path: Path, key: str | None, prefix: str
) -> None:
    prefixed = {prefix + name: value for name, value in state.items()}
    torch.save(prefixed if key is None else {"epoch": 3, key: prefixed}, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), state)


@pytest.mark.parametrize("ema", ["model_ema", "state_dict_ema"])
def test_averaged_weights_go_before_the_last_ones(state: dict[str, torch.Tensor], tmp_path: Path, ema: str) -> None:
    plain = "model" if ema == "model_ema" else "state_dict"
    torch.save({plain: {key: value + 1 for key, value in state.items()}, ema: state}, tmp_path / "w.pth")
    assert same(read_weights(tmp_path / "w.pth"), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_width_become_float32(
    state: dict[str, torch.Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    cast = {key: value.to(dtype) for key, value in state.items()}
    save_file(cast, tmp_path / "w.safetensors")
    model = load_model(spec_of(tmp_path / "w.safetensors"))
    assert same(model.state_dict(), {key: value.float() for key, value in cast.items()})


def test_random_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (load_model(ModelSpec(NAME, "random", KWARGS, seed)) for seed in (1, 1, 2))
    assert same(first.state_dict(), again.state_dict())
    assert not torch.equal(first.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("weights", "source"), [("random", "random"), ("pretrained", "pretrained"), ("/home/me/w.pth", "w.pth")]
)
def test_source_names_the_file_without_the_users_folders(weights: str, source: str) -> None:
    assert ModelSpec(NAME, weights).source == source


def test_pretrained_asks_timm_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    model = make_model()

    def create_model(name: str, pretrained: bool, num_classes: int) -> Any:
        asked.update(name=name, pretrained=pretrained, num_classes=num_classes)
        return model

    monkeypatch.setattr(timm, "create_model", create_model)
    load_model(ModelSpec(NAME, kwargs={"num_classes": 10}))
    assert asked == {"name": NAME, "pretrained": True, "num_classes": 10}


def test_pretrained_without_a_network_says_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_model(name: str, pretrained: bool) -> Any:
        raise OSError("cannot reach the hub.\nmore about it")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ConfigError, match=rf"pretrained weights of {NAME}: cannot reach the hub\. .*--weights FILE"):
        load_model(ModelSpec(NAME))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pth_that_wants_unpickling_is_refused_and_not_run(
    state: dict[str, torch.Tensor], tmp_path: Path, form: str
) -> None:
    mark, file = tmp_path / "mark", tmp_path / "w.pth"
    content = {"model": state, "args": Trap(mark)}
    if form == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=4))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"w\.pth wants unpickling.*not loaded.*state dict alone"):
        read_weights(file)
    assert not mark.exists()
    pickle.loads(file.read_bytes()) if form == "pickle" else torch.load(file, weights_only=False)
    assert mark.exists()  # so the trap works


def test_the_class_that_wants_unpickling_is_named(tmp_path: Path) -> None:
    torch.save({"model": {}, "args": Trap(tmp_path / "mark")}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"expected tensors.*; got foreign_files\.spring\."):
        read_weights(tmp_path / "w.pth")


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def said_of(file: Path) -> str:
    """What is said of weights that are refused."""
    with pytest.raises(CheckpointError) as caught:
        read_weights(file)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "damage", "fact"),
    [
        ("w.safetensors", half, "it begins as a safetensors file, and is damaged"),
        ("w.safetensors", lambda data: data[:-1], "it begins as a safetensors file, and is damaged"),
        ("w.safetensors", lambda data: data[:5], "it is damaged or neither a safetensors nor a PyTorch file"),
        ("w.safetensors", lambda data: bytes(len(data)), "it is damaged or neither a safetensors nor a PyTorch file"),
        ("w.pth", half, "got a ZIP archive that is damaged or was cut off"),
        ("w.pth", lambda data: data[:-1], "got a ZIP archive that is damaged or was cut off"),
        ("w.pth", lambda data: bytes(len(data)), "it is damaged or neither a safetensors nor a PyTorch file"),
        ("legacy.pth", half, "it begins as a pickle (which PyTorch files of before 1.6 are), and is damaged"),
        ("legacy.pth", lambda data: data[:-1], "it begins as a pickle"),
        ("legacy.pth", lambda data: data[:300], "it begins as a pickle"),
        ("legacy.pth", lambda data: data[:9], "it begins as a pickle"),
    ],
)
def test_damaged_files_are_named(
    tiny_weights: Path,
    state: dict[str, torch.Tensor],
    tmp_path: Path,
    name: str,
    damage: Callable[[bytes], bytes],
    fact: str,
) -> None:
    file = tmp_path / name
    torch.save(state, file, _use_new_zipfile_serialization=name == "w.pth")
    data = file.read_bytes() if name.endswith("pth") else tiny_weights.read_bytes()
    file.write_bytes(damage(data))
    message = said_of(file)
    assert_plain(message, "cannot read weights from", name, fact)
    assert "copy or download it again" in message.lower()


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin", ".ckpt", ".npz"])
def test_file_of_another_kind_is_named_with_a_remedy(tmp_path: Path, kind: str, suffix: str) -> None:
    path, words = write_foreign(tmp_path, kind, f"w{suffix}")
    if suffix == ".safetensors" and kind == "safetensors":
        assert list(read_weights(path)) == ["a"]
        return
    message = said_of(path)
    if kind == "pickle" and suffix != ".safetensors":
        assert_plain(message, "cannot read weights from", "got a pickle that PyTorch did not write", "torch.save")
        return
    expected = "a safetensors file" if suffix == ".safetensors" else "a PyTorch file (.pth) or a .safetensors file"
    assert_plain(message, f"cannot read weights from {path}; expected {expected}; got {words}")
    assert message.rpartition(words)[2].count(". ") >= 1, "there is a remedy"


class Pair(nn.Module):
    """A model of its own class, which a pickled module names."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.fc(x))


SCRIPT = ("got a TorchScript archive (torch.jit.save)", "torch.jit.load(FILE).state_dict()")


@pytest.mark.parametrize(
    ("write", "facts"),
    [
        (lambda model, file: torch.jit.save(torch.jit.script(model), file), SCRIPT),
        (lambda model, file: torch.jit.save(torch.jit.trace(model, torch.zeros(1, 2)), file), SCRIPT),
        (
            lambda model, file: torch.export.save(torch.export.export(model, (torch.zeros(1, 2),)), file),
            ("got a program of torch.export (.pt2)", "torch.export.load(FILE).state_dict"),
        ),
        (torch.save, ("wants unpickling", "got test_model.Pair.", "save its state dict alone")),
        (
            lambda model, file: torch.save(model, file, _use_new_zipfile_serialization=False),
            ("wants unpickling", "got test_model.Pair.", "save its state dict alone"),
        ),
        (
            lambda model, file: torch.save(
                {"state_dict": model.state_dict(), "hyper_parameters": {"net": model}}, file
            ),
            ("wants unpickling", "got test_model.Pair.", "save its state dict alone"),
        ),
        (
            lambda model, file: torch.save(list(model.parameters()), file),
            ("holds no state dict", "expected tensors by name, at the top or under model, state_dict or model_ema"),
        ),
        (lambda _, file: torch.save(torch.ones(2), file), ("holds no state dict", "got something else than a dict")),
        (lambda _, file: torch.save({"model": {}}, file), ("holds no state dict", "got none there")),
        (lambda _, file: torch.save({"optimizer": {}, "epoch": 3}, file), ("holds no", "got keys optimizer, epoch")),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.pt"])
def test_what_torch_saves_but_state_dicts_is_refused_with_a_remedy(
    tmp_path: Path, write: Callable[[nn.Module, Path], object], facts: tuple[str, ...], name: str
) -> None:
    write(Pair().eval(), tmp_path / name)
    assert_plain(said_of(tmp_path / name), name, *facts)


@pytest.mark.parametrize(
    ("kind", "load"),
    [
        ("torchscript", lambda file: torch.jit.load(file).state_dict()),
        ("torch.export", lambda file: torch.export.load(file).state_dict),
    ],
)
def test_the_remedies_work(tmp_path: Path, kind: str, load: Callable[[Path], dict[str, torch.Tensor]]) -> None:
    model, file, weights = Pair().eval(), tmp_path / "w.pt2", tmp_path / "weights.pth"
    if kind == "torchscript":
        torch.jit.save(torch.jit.script(model), file)
    else:
        torch.export.save(torch.export.export(model, (torch.zeros(1, 2),)), file)
    torch.save(load(file), weights)
    assert read_weights(weights).keys() == model.state_dict().keys()


def test_checkpoint_of_lightning_with_plain_settings_is_read(tmp_path: Path) -> None:
    state = Pair().state_dict()
    for settings in ({"lr": 0.1}, argparse.Namespace(lr=0.1)):
        torch.save({"state_dict": state, "hyper_parameters": settings}, tmp_path / "w.ckpt")
        assert read_weights(tmp_path / "w.ckpt").keys() == state.keys()


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"a": 1}}], ids=["empty", "no weights", "numbers"])
def test_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth holds no state dict; expected tensors by name"):
        read_weights(tmp_path / "w.pth")


def test_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weights file at"):
        read_weights(tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"no weights file at .*got a folder"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 7}, r"head\.weight and 1 more; expected shape \[7, 48\]; got \[10, 48\].*num_classes=10"),
        ({"img_size": 64}, r"pos_embed; expected shape \[1, 65, 48\]; got \[1, 17, 48\].*image size"),
        ({"embed_dim": 24}, r"cls_token and \d+ more; expected shape \[1, 1, 24\].*another architecture"),
        ({"depth": 3}, r"its 44 tensors; got 12 missing, first blocks\.2\.attn.*another architecture"),
        ({"depth": 1}, r"its 20 tensors; got 12 unknown, first blocks\.1\.attn"),
        ({"qk_norm": True}, r"got 8 missing, first blocks\.0\.attn\.k_norm\.bias"),
        ({"qkv_bias": False}, r"got 2 unknown, first blocks\.0\.attn\.qkv\.bias"),
    ],
)
def test_weights_of_another_model_are_refused(tiny_weights: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"tiny\.safetensors does not fit the model.*{message}"):
        load_model(spec_of(tiny_weights, **changes))


def test_a_refused_state_dict_changes_no_weight(state: dict[str, torch.Tensor]) -> None:
    model = load_model(ModelSpec(NAME, "random", KWARGS))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_weights(model, {key: value for key, value in state.items() if key != "norm.bias"}, "w")
    assert same(model.state_dict(), before)


def test_eam_checkpoint_is_not_taken_for_weights(eam_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="is an EAM checkpoint, not plain weights"):
        load_model(spec_of(eam_checkpoint))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(state: dict[str, torch.Tensor], tmp_path: Path, value: float) -> None:
    state["blocks.1.norm2.weight"][5] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"w\.safetensors: blocks\.1\.norm2\.weight has NaN or infinite"):
        load_model(spec_of(tmp_path / "w.safetensors"))


def test_unknown_model_gets_similar_names() -> None:
    with pytest.raises(ConfigError, match=r"no model 'vit_tiny_patch16_225'.*Similar: .*vit_tiny_patch16_224"):
        load_model(ModelSpec("vit_tiny_patch16_225", "random"))


@pytest.mark.parametrize(
    ("changes", "reason"), [({"colour": 3}, "argument 'colour'"), ({"num_heads": 5}, "divisible by num_heads")]
)
def test_arguments_that_timm_refuses_are_told(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"timm cannot make {NAME} with .*: .*{reason}"):
        load_model(spec_of("random", **changes))


# --- preprocessing ---------------------------------------------------------------------------------------------------


def test_preprocessing_is_timms_at_the_models_own_size() -> None:
    model = make_model("deit_tiny_patch16_224", {"img_size": (32, 48)})
    how = preprocessing_of(model, TIMM_PREPROCESSING)
    assert how == Preprocessing(
        size=(32, 48), mean=IMAGENET_MEAN, std=IMAGENET_STD, interpolation="bicubic", crop_pct=0.9
    )
    assert preprocessing_of(make_model(), TIMM_PREPROCESSING).mean == (0.5, 0.5, 0.5)  # another config of timm's


def test_what_the_user_says_goes_first() -> None:
    overrides = PreprocessingOverrides((0.1, 0.2, 0.3), (1, 2, 3), 0.875, "bilinear")
    assert preprocessing_of(make_model(), overrides) == Preprocessing(
        size=(32, 32), mean=(0.1, 0.2, 0.3), std=(1, 2, 3), interpolation="bilinear", crop_pct=0.875
    )
    only_crop = preprocessing_of(make_model("deit_tiny_patch16_224"), PreprocessingOverrides(crop_pct=1.0))
    assert (only_crop.mean, only_crop.crop_pct) == (IMAGENET_MEAN, 1.0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (PreprocessingOverrides(crop_pct=1.01), r"crop_pct: .*less than or equal to 1; got 1\.01"),
        (PreprocessingOverrides(crop_pct=0.0), "crop_pct: .*greater than 0; got 0"),
        (PreprocessingOverrides(interpolation="magic"), "interpolation: .*'bicubic'.*; got magic"),
        (PreprocessingOverrides(std=(0.2, 0.0, 0.2)), "std: .*must be positive"),
        (PreprocessingOverrides(mean=(0.2, float("nan"), 0.2)), "mean: .*must be finite"),
    ],
)
def test_preprocessing_that_cannot_be_done_is_told_in_one_line(overrides: PreprocessingOverrides, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"preprocessing is not supported: {message}") as err:
        preprocessing_of(make_model(), overrides)
    assert "\n" not in str(err.value)


def test_to_numpy_gives_the_state_dict_bit_for_bit(tiny_weights: Path, state: dict[str, torch.Tensor]) -> None:
    arrays = to_numpy(load_model(spec_of(tiny_weights)))
    assert arrays.keys() == state.keys()
    for key, array in arrays.items():
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, state[key].numpy())


def test_numbers_stay_numbers() -> None:
    """A batch norm counts its batches in a tensor without axes."""
    convolution = nn.Conv2d(3, 4, 2)
    convolution.weight.data = convolution.weight.data.transpose(2, 3)
    module = nn.Sequential(convolution, nn.BatchNorm2d(4))
    arrays = to_numpy(module)
    assert arrays["1.num_batches_tracked"].shape == ()
    assert {key: array.shape for key, array in arrays.items()} == {
        k: tuple(v.shape) for k, v in module.state_dict().items()
    }
    assert all(array.flags.c_contiguous for array in arrays.values())


# --- arguments and Swin ----------------------------------------------------------------------------------------------


def test_tuples_among_the_arguments_are_what_json_gives_back() -> None:
    spec = ModelSpec(SWIN_NAME, "random", SWIN_KWARGS)
    assert spec.plain_kwargs == {**SWIN_KWARGS, "depths": [2, 2], "num_heads": [2, 4]}
    model = load_model(spec)
    assert [len(stage.blocks) for stage in model.layers] == [2, 2]


@pytest.mark.parametrize("value", [{1, 2}, b"x", 1j, nn.GELU, float("nan")], ids=str)
def test_arguments_that_no_checkpoint_could_hold_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="--model-kwargs; expected numbers, texts, lists"):
        load_model(ModelSpec(NAME, "random", {**KWARGS, "extra": value}))


def test_tables_that_old_versions_of_timm_saved_are_left_out(tmp_path: Path) -> None:
    model = make_model(SWIN_NAME)
    state = dict(model.state_dict())
    state["layers.0.blocks.1.attn_mask"] = model.layers[0].blocks[1].attn_mask
    state["layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    torch.save(state, tmp_path / "w.pth")
    loaded = load_model(ModelSpec(SWIN_NAME, str(tmp_path / "w.pth"), SWIN_KWARGS))
    with torch.inference_mode():
        assert torch.equal(loaded(images()), model(images()))


def test_preprocessing_of_swin_has_its_own_oblong_size() -> None:
    model = load_model(ModelSpec(SWIN_NAME, "random", {**SWIN_KWARGS, "img_size": (36, 28)}))
    assert preprocessing_of(model, TIMM_PREPROCESSING).size == (36, 28)
