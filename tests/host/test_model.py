from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KWARGS, NAME, SWIN_KWARGS, SWIN_NAME, images, make_model
from torch import nn

from eamdeploy.artifact import Preprocessing
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.host.model import (
    TIMM_PREPROCESSING,
    ModelSpec,
    PreprocessingOverrides,
    load_model,
    load_weights,
    preprocessing_of,
    read_weights,
    to_numpy,
)

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


def spring(mark: str) -> None:
    Path(mark).write_text("sprung")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return spring, (str(self.mark),)


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
    with pytest.raises(CheckpointError, match=r"expected tensors.*; got test_model\.spring\."):
        read_weights(tmp_path / "w.pth")


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("w.safetensors", half),
        ("w.safetensors", lambda data: data[:5]),
        ("w.safetensors", lambda _: b""),
        ("w.safetensors", lambda _: b"<html>404 not found</html>" * 9),
        ("w.pth", half),
        ("w.pth", lambda _: b""),
        ("w.pth", lambda _: b"<html>404 not found</html>"),
    ],
)
def test_truncated_and_foreign_files_are_named(
    tiny_weights: Path, state: dict[str, torch.Tensor], tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    file = tmp_path / name
    torch.save(state, file)
    data = file.read_bytes() if name.endswith("pth") else tiny_weights.read_bytes()
    file.write_bytes(damage(data))
    with pytest.raises(CheckpointError, match=rf"cannot read weights from \S*{name}: .*truncated or in another format"):
        read_weights(file)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"a": 1}}], ids=["empty", "no weights", "numbers"])
def test_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth holds no state dict; expected tensors by name"):
        read_weights(tmp_path / "w.pth")


def test_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weights file at"):
        read_weights(tmp_path / "w.pth")


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
    module = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))
    module[0].weight.data = module[0].weight.data.transpose(2, 3)
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
