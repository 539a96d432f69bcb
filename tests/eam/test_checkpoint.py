"""EAM checkpoints as files: round trips, and files that are damaged, foreign or incomplete."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from eamdeploy.artifact import Freezing
from eamdeploy.eam.checkpoint import AttentionShape, Checkpoint, FrozenMaps, load, save
from eamdeploy.eam.quantizers import BITS, QUANTIZERS, Bits, Quantizer, quantize_rows
from eamdeploy.errors import CheckpointError, ConfigError, MissingDependency

Tensors = dict[str, NDArray[Any]]


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "m.eam.safetensors"
    save(checkpoint, path)
    return path


def read_raw(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def assert_same(first: Checkpoint, second: Checkpoint) -> None:
    assert first.header == second.header
    assert first.weights.keys() == second.weights.keys()
    for key, weight in first.weights.items():
        assert weight.dtype == second.weights[key].dtype
        np.testing.assert_array_equal(weight, second.weights[key], strict=True)
    assert first.frozen.keys() == second.frozen.keys()
    for path, maps in first.frozen.items():
        for field in dataclasses.fields(FrozenMaps):
            np.testing.assert_array_equal(
                getattr(maps, field.name), getattr(second.frozen[path], field.name), strict=True
            )


def test_round_trip(checkpoint: Checkpoint, saved: Path) -> None:
    assert_same(load(saved), checkpoint)


def test_the_file_is_laid_out_as_documented(checkpoint: Checkpoint, saved: Path) -> None:
    tensors, metadata = read_raw(saved)
    assert set(tensors) == {f"model.{key}" for key in checkpoint.weights} | {
        f"eam.blocks.1.attn.{suffix}" for suffix in ("codes", "scales", "heads")
    }
    assert tensors["eam.blocks.1.attn.codes"].shape == (19,)
    assert tensors["eam.blocks.1.attn.scales"].shape == (2, 5)
    assert tensors["eam.blocks.1.attn.heads"].tolist() == [0, 2]
    assert list(metadata) == ["eam"]
    header = json.loads(metadata["eam"])
    assert header["format"] == 1
    assert header["freezing"]["heads"] == {"blocks.1.attn": [0, 2]}
    assert header["class_names"] == ["cat", "dög"]
    assert header["timm_kwargs"] == {"embed_dim": 8, "img_size": [8, 8]}


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name in "ab":
        save(checkpoint, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_maps_are_what_codes_and_scales_stand_for(checkpoint: Checkpoint) -> None:
    frozen = checkpoint.frozen["blocks.1.attn"]
    maps = frozen.maps("squared")
    np.testing.assert_allclose(maps, frozen.codes.astype(float) ** 2 * frozen.scales[..., None], rtol=1e-6)
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)


def test_a_model_without_frozen_heads_round_trips(checkpoint: Checkpoint, tmp_path: Path) -> None:
    freezing = checkpoint.header.freezing.model_copy(update={"heads": {}, "sparsity": 0.0})
    plain = Checkpoint(checkpoint.weights, {}, checkpoint.header.model_copy(update={"freezing": freezing}))
    save(plain, tmp_path / "plain")
    assert_same(load(tmp_path / "plain"), plain)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    bits=st.sampled_from(BITS),
    quantizer=st.sampled_from(QUANTIZERS),
    attention=st.dictionaries(
        st.from_regex(r"[a-z]{1,3}(\.[a-z0-9]{1,5}){0,2}(\.codes|\.heads)?", fullmatch=True),
        st.builds(AttentionShape, heads=st.integers(1, 4), tokens=st.integers(1, 6)),
        min_size=1,
        max_size=4,
    ),
)
def test_round_trip_of_any_checkpoint(
    checkpoint: Checkpoint,
    tmp_path: Path,
    data: st.DataObject,
    bits: Bits,
    quantizer: Quantizer,
    attention: dict[str, AttentionShape],
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    frozen = {}
    for path, shape in attention.items():
        heads = sorted(data.draw(st.sets(st.integers(0, shape.heads - 1))))
        if heads:
            maps = rng.dirichlet(np.full(shape.tokens, 0.3), size=(len(heads), shape.tokens))
            frozen[path] = FrozenMaps(np.array(heads), *quantize_rows(maps, bits, quantizer))
    total = sum(shape.heads * shape.tokens**2 for shape in attention.values())
    freezing = Freezing(
        bits=bits,
        quantizer=quantizer,
        score="own training",
        sparsity_asked=None,
        sparsity=sum(maps.codes.size for maps in frozen.values()) / total,
        heads={path: maps.heads.tolist() for path, maps in frozen.items()},
    )
    header = checkpoint.header.model_copy(update={"attention": attention, "freezing": freezing, "calibration": None})
    made = Checkpoint(checkpoint.weights, frozen, header)
    save(made, tmp_path / "any")
    assert_same(load(tmp_path / "any"), made)


def test_saving_an_unsound_checkpoint_keeps_the_old_file(checkpoint: Checkpoint, saved: Path) -> None:
    before = saved.read_bytes()
    checkpoint.weights["head.weight"][0, 0] = np.nan
    with pytest.raises(CheckpointError, match=r"m\.eam\.safetensors: model\.head\.weight is not finite"):
        save(checkpoint, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupted_save_keeps_the_old_file(
    checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    before = saved.read_bytes()
    checkpoint.weights["head.weight"][0, 0] = 7
    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoint, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_unwritable_and_missing_files(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        save(checkpoint, tmp_path / "nowhere" / "x")
    with pytest.raises(ConfigError, match=r"cannot read.*No such file"):
        load(tmp_path / "missing")
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 1500, -1])
def test_truncated_files(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"m\.eam\.safetensors is damaged or no safetensors file"):
        load(saved)


@pytest.mark.parametrize(
    "contents", [b"PK\x03\x04" + b"\0" * 100, b"\xff" * 64, b"{}" * 40, b"\x80\x02}q\x00." * 20], ids=str
)
def test_files_of_another_kind(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "x").write_bytes(contents)
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        load(tmp_path / "x")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_plain_weights_are_recognized(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"head.weight": np.zeros(3)}, tmp_path / "w", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"is no EAM checkpoint.*plain weights.*freeze.*pack"):
        load(tmp_path / "w")


def test_a_flipped_bit_anywhere_in_the_maps_is_noticed(saved: Path) -> None:
    """Codes change a row's sum, heads contradict the header, scales change a row's sum."""
    tensors, metadata = read_raw(saved)
    unnoticed = 0
    for suffix in ("codes", "heads", "scales"):
        data = tensors[f"eam.blocks.1.attn.{suffix}"].view(np.uint8).reshape(-1)
        for bit in range(data.size * 8):
            data[bit // 8] ^= 1 << bit % 8
            save_file(tensors, saved, metadata)
            try:
                load(saved)
                unnoticed += 1
            except CheckpointError:
                pass
            data[bit // 8] ^= 1 << bit % 8
    assert unnoticed <= 2 * 5 * 8  # the lowest mantissa bits of ten scales lie within the tolerance of a row sum


def remove(key: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(key)


def replace(key: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def add(key: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: np.zeros(3)})


def rename_module(tensors: Tensors) -> None:
    for suffix in ("codes", "scales", "heads"):
        tensors[f"eam.blocks.7.attn.{suffix}"] = tensors.pop(f"eam.blocks.1.attn.{suffix}")


def remove_module(tensors: Tensors) -> None:
    for suffix in ("codes", "scales", "heads"):
        del tensors[f"eam.blocks.1.attn.{suffix}"]


CODES, SCALES, HEADS = (f"eam.blocks.1.attn.{suffix}" for suffix in ("codes", "scales", "heads"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove(CODES), r"eam\.blocks\.1\.attn is incomplete.*got no codes"),
        (remove(SCALES), r"is incomplete.*got no scales"),
        (remove(HEADS), r"is incomplete.*got no heads"),
        (add("optimizer.step"), r"unknown tensor optimizer\.step"),
        (add("head.bias"), r"unknown tensor head\.bias"),
        (add("model."), r"unknown tensor model\."),
        (add("eam.codes"), r"unknown tensor eam\.codes"),
        (add("eam.blocks.1.attn.mask"), r"unknown tensor eam\.blocks\.1\.attn\.mask"),
        (add("eam.blocks.0.attn.scales"), r"eam\.blocks\.0\.attn is incomplete.*got no heads, codes"),
        (rename_module, r"eam\.blocks\.7\.attn belongs to no attention module.*expected one of blocks\.0\.attn"),
        (remove_module, r"freezing\.heads and tensor eam\.blocks\.1\.attn\.heads disagree.*no such tensor"),
        (replace(CODES, lambda a: a[:-1]), r"attn\.codes have the wrong size; expected uint8 \[19\].*got uint8 \[18\]"),
        (replace(CODES, lambda a: np.append(a, a[:1])), r"attn\.codes have the wrong size"),
        (replace(CODES, lambda a: a.astype(np.int32)), r"attn\.codes have the wrong size.*got int32 \[19\]"),
        (replace(CODES, lambda a: a | np.uint8(0x80)), r"attn\.codes go on after the last code.*padding"),
        (replace(CODES, np.zeros_like), r"10 of 10 rows do not sum to 1.*got 0 at"),
        (replace(SCALES, lambda a: a.astype(np.float64)), r"attn\.scales has the wrong dtype.*float32 \[2, 5\]"),
        (replace(SCALES, lambda a: a.reshape(5, 2)), r"attn\.scales has the wrong.*got float32 \[5, 2\]"),
        (replace(SCALES, lambda a: a * np.float32(1.001)), r"rows do not sum to 1.*got 1\.001"),
        (replace(SCALES, lambda a: -a), r"attn\.scales at .*positive finite"),
        (
            replace(HEADS, lambda a: a.astype(np.int32)),
            r"attn\.heads has the wrong.*int64 \[2\]; got int32 \[2\]",
        ),
        (replace(HEADS, lambda a: a[:1]), r"attn\.codes have the wrong size"),
        (replace(HEADS, lambda a: a[::-1].copy()), r"attn\.heads; expected strictly ascending.*got \[2, 0\]"),
        (replace(HEADS, lambda a: a * 0), r"strictly ascending.*got \[0, 0\]"),
        (replace(HEADS, lambda a: a + 1), r"0…2; got \[1, 3\]"),
        (replace(HEADS, lambda a: a // 2), r"freezing\.heads and tensor .* disagree; expected \[0, 2\].*got \[0, 1\]"),
        (replace("model.head.weight", lambda a: a * np.inf), r"model\.head\.weight is not finite"),
    ],
)
def test_bad_tensors_are_named(saved: Path, change: Callable[[Tensors], None], message: str) -> None:
    tensors, metadata = read_raw(saved)
    change(tensors)
    save_file(tensors, saved, metadata)
    with pytest.raises(CheckpointError, match=message) as error:
        load(saved)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format": 2}, "unknown checkpoint format; expected format 1; got 2"),
        ({"format": None}, "unknown checkpoint format.*got None"),
        ({"future": 1}, r"header metadata `eam` is not a valid CheckpointHeader: future"),
        ({"num_classes": "ten"}, "not a valid CheckpointHeader: num_classes"),
        ({"num_classes": 3}, "class_names does not fit num_classes; expected 3 names; got 2"),
        ({"attention": {}}, "attention is empty"),
        ({"attention": {"a": {"heads": 0, "tokens": 5}}}, r"not a valid CheckpointHeader: attention\.a\.heads"),
        ({"freezing.granularity": "row"}, "granularity row is not supported yet.*Freeze whole heads"),
        ({"freezing.granularity": "cell"}, r"not a valid CheckpointHeader: freezing\.granularity"),
        ({"freezing.bits": 5}, r"freezing\.bits"),
        ({"freezing.bits": 4}, r"attn\.codes have the wrong size; expected uint8 \[25\]"),
        ({"freezing.quantizer": "uniform"}, "do not sum to 1.*quantizer uniform"),
        ({"freezing.sparsity": 0.5}, r"freezing\.sparsity; expected 0\.333.* got 0\.5"),
        ({"freezing.sparsity": float("nan")}, r"freezing\.sparsity"),
        ({"freezing.sparsity_asked": 1.5}, r"freezing\.sparsity_asked; expected a number in \[0, 1\]; got 1\.5"),
        ({"freezing.heads": {"blocks.1.attn": [0]}}, r"disagree; expected \[0\] as in the header; got \[0, 2\]"),
        ({"freezing.heads": {}}, "disagree; expected no frozen heads"),
        ({"freezing.scores": {"blocks.1.attn": [1.0, 6.0, 2.0]}}, r"freezing\.scores does not fit"),
        ({"calibration": {"n_images": 0, "digest": "", "source": ""}}, r"calibration\.n_images"),
    ],
)
def test_bad_headers_are_named(saved: Path, edit: dict[str, object], message: str) -> None:
    tensors, metadata = read_raw(saved)
    header = json.loads(metadata["eam"])
    for key, value in edit.items():
        *parents, last = key.split(".")
        place = header
        for parent in parents:
            place = place[parent]
        place[last] = value
    save_file(tensors, saved, {"eam": json.dumps(header)})
    with pytest.raises(CheckpointError, match=message) as error:
        load(saved)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[1]", "null", "1"])
def test_header_metadata_that_is_no_object(saved: Path, text: str) -> None:
    tensors, _ = read_raw(saved)
    save_file(tensors, saved, {"eam": text})
    with pytest.raises(CheckpointError, match=r"`eam` is no JSON|unknown checkpoint format"):
        load(saved)


def test_a_refused_granularity_is_the_reason_given_even_with_its_tensors(saved: Path) -> None:
    tensors, metadata = read_raw(saved)
    tensors["eam.blocks.1.attn.mask"] = np.zeros(2, np.uint8)
    save_file(tensors, saved, {"eam": metadata["eam"].replace('"granularity":"head"', '"granularity":"entry"')})
    with pytest.raises(CheckpointError, match="granularity entry is not supported yet"):
        load(saved)


def test_bfloat16_weights_are_refused_with_advice(saved: Path) -> None:
    tensors, metadata = read_raw(saved)
    tensors["model.head.weight"] = tensors["model.head.weight"].astype(np.float16)
    save_file(tensors, saved, metadata)
    raw = saved.read_bytes()
    place = raw.index(b'"model.head.weight"')
    saved.write_bytes(raw[:place] + raw[place:].replace(b'"F16"', b'"BF16"', 1).replace(b"} ", b"}", 1))
    with pytest.raises(CheckpointError, match=r"model\.head\.weight has an unsupported dtype.*got BF16.*float32"):
        load(saved)


def test_without_safetensors_the_error_says_what_to_install(
    checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(MissingDependency, match=r"pip install 'eamdeploy\[host\]'"):
        load(saved)
    with pytest.raises(MissingDependency, match=r"pip install 'eamdeploy\[host\]'"):
        save(checkpoint, saved)
