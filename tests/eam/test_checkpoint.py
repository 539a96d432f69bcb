"""EAM checkpoints as files: round trips, and files that are damaged, foreign or incomplete."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_checkpoints import WINDOWS, WindowMaps, frozen_maps, make, with_frozen
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from eamdeploy.artifacts.seal import seal_of
from eamdeploy.eam.checkpoint import AttentionShape, Checkpoint, FrozenMaps, load, save
from eamdeploy.errors import CheckpointError, ConfigError, MissingDependency
from eamdeploy.vocabulary import BITS, GRANULARITIES, QUANTIZERS, Bits, Granularity, Quantizer

Tensors = dict[str, NDArray[Any]]

UNSAVED = {"format": 3, "content_digest": None}
"""What a header has before it is saved."""
EMBEDDED = Path(__file__).parents[2] / "models" / "digits_deit.eam.safetensors"


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    path = tmp_path / "m.eam.safetensors"
    save(checkpoint, path)
    return path


def read_raw(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def assert_same(first: Checkpoint, second: Checkpoint) -> None:
    assert first.header.model_copy(update=UNSAVED) == second.header.model_copy(update=UNSAVED)
    assert first.weights.keys() == second.weights.keys()
    for key, weight in first.weights.items():
        assert weight.dtype == second.weights[key].dtype
        np.testing.assert_array_equal(weight, second.weights[key], strict=True)
    assert first.frozen.keys() == second.frozen.keys()
    for path, maps in first.frozen.items():
        assert (maps.mask is None) == (second.frozen[path].mask is None)
        for field in dataclasses.fields(FrozenMaps):
            np.testing.assert_array_equal(
                getattr(maps, field.name), getattr(second.frozen[path], field.name), strict=True
            )


def test_round_trip(checkpoint: Checkpoint, saved: Path) -> None:
    assert_same(load(saved), checkpoint)
    assert save(checkpoint, saved) == load(saved).header


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
    assert header["format"] == 3
    assert header["freezing"]["heads"] == {"blocks.1.attn": [0, 2]}
    assert header["class_names"] == ["cat", "dög"]
    assert header["timm_kwargs"] == {"embed_dim": 8, "img_size": [8, 8]}


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name in "ab":
        save(checkpoint, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_seal_is_of_all_tensors_and_of_the_rest_of_the_header(saved: Path) -> None:
    tensors, metadata = read_raw(saved)
    header = json.loads(metadata["eam"])
    seal = header.pop("content_digest")
    assert seal == seal_of(header, tensors) == load(saved).header.content_digest
    reordered = dict(reversed(tensors.items()))
    save_file(reordered, saved, metadata)
    assert load(saved).header.content_digest == seal


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_flipped_bit_anywhere_in_the_file_is_refused_or_changes_nothing(
    checkpoint: Checkpoint, tmp_path: Path, granularity: Granularity
) -> None:
    """Nothing changes by another last digit of a fraction that has more of them than it needs."""
    path = tmp_path / "f.eam.safetensors"
    made = make(checkpoint, granularity, "class")
    save(made, path)
    good, unnoticed = path.read_bytes(), 0
    places = range(0, 8 * len(good), 29)
    for bit in places:
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert_same(load(path), made)
            unnoticed += 1
        except CheckpointError as err:
            assert str(path) in str(err)
    assert unnoticed < 0.01 * len(places)


def flip_weight(path: Path) -> None:
    """The last bit of the last weight in the file is another."""
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    layout = json.loads(raw[8 : 8 + length])
    start = layout["model.head.weight"]["data_offsets"][0]
    raw[8 + length + start] ^= 1
    path.write_bytes(raw)


def test_an_altered_file_is_read_where_that_is_asked_for(checkpoint: Checkpoint, saved: Path) -> None:
    flip_weight(saved)
    with pytest.raises(CheckpointError, match=r"m\.eam\.safetensors was damaged or altered.*--no-verify"):
        load(saved)
    altered = load(saved, verify=False)
    change = np.abs(altered.weights["head.weight"] - checkpoint.weights["head.weight"])
    assert np.count_nonzero(change) == 1 and change.max() < 1e-6


def unseal(path: Path, changes: dict[str, object]) -> None:
    tensors, metadata = read_raw(path)
    header = json.loads(metadata["eam"])
    del header["content_digest"]
    save_file(tensors, path, {"eam": json.dumps({**header, **changes})})


def test_files_without_a_seal_load_only_if_they_are_of_before(checkpoint: Checkpoint, saved: Path) -> None:
    unseal(saved, {"format": 1})
    assert_same(load(saved), checkpoint)
    assert load(saved).header.content_digest is None
    unseal_again: dict[str, object] = {"format": 1, "content_digest": None}  # as another program may write it
    save(checkpoint, saved)
    unseal(saved, unseal_again)
    assert_same(load(saved), checkpoint)
    save(checkpoint, saved)
    unseal(saved, {})
    with pytest.raises(CheckpointError, match="expected a content_digest; got sha256:"):
        load(saved)


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


@pytest.mark.parametrize("window_maps", WINDOWS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_round_trip_by_granularity_and_window_maps(
    checkpoint: Checkpoint, tmp_path: Path, granularity: Granularity, window_maps: WindowMaps | None
) -> None:
    made = make(checkpoint, granularity, window_maps)
    save(made, tmp_path / "made")
    assert_same(load(tmp_path / "made"), made)
    tensors, _ = read_raw(tmp_path / "made")
    assert ("eam.blocks.1.attn.mask" in tensors) == (granularity != "head")
    assert 0 < made.header.freezing.sparsity < 1


@pytest.mark.parametrize(
    ("granularity", "mask", "packed_mask", "codes", "packed_codes", "scales"),
    [
        (
            "row",
            [[False, True]],
            [0b10],
            [[[0, 0], [3, 1]], [[0, 0], [2, 0]]],
            [3 | 1 << 4, 2],
            [[0, 1 / 4], [0, 1 / 2]],
        ),
        (
            "entry",
            [[[True, False], [False, True]]],
            [0b1001],
            [[[3, 0], [0, 1]], [[2, 0], [0, 7]]],
            [3 | 1 << 4, 2 | 7 << 4],
            [[1 / 4, 1 / 2], [1 / 2, 1 / 8]],
        ),
    ],
)
def test_rows_and_entries_are_laid_out_as_documented(
    checkpoint: Checkpoint,
    tmp_path: Path,
    granularity: Granularity,
    mask: list[Any],
    packed_mask: list[int],
    codes: list[Any],
    packed_codes: list[int],
    scales: list[Any],
) -> None:
    """One head of two tokens with two window maps, by hand."""
    shape = AttentionShape(heads=2, tokens=2, windows=[0, 1, 0])
    maps = FrozenMaps(np.array([1]), np.array([codes], np.uint8), np.array([scales], np.float32), np.array(mask))
    how: dict[str, Any] = {"granularity": granularity, "window_maps": "class", "bits": 4, "quantizer": "uniform"}
    made = with_frozen(checkpoint, {"a": shape}, {"a": maps}, **how)
    save(made, tmp_path / "x")
    tensors, metadata = read_raw(tmp_path / "x")
    assert (tensors["eam.a.mask"].dtype, tensors["eam.a.mask"].tolist()) == (np.dtype(np.uint8), packed_mask)
    assert (tensors["eam.a.codes"].dtype, tensors["eam.a.codes"].tolist()) == (np.dtype(np.uint8), packed_codes)
    assert (tensors["eam.a.scales"].dtype, tensors["eam.a.scales"].tolist()) == (np.dtype(np.float32), [scales])
    header = json.loads(metadata["eam"])
    assert header["attention"]["a"]["windows"] == [0, 1, 0]
    assert (header["freezing"]["window_maps"], header["freezing"]["sparsity"]) == ("class", 0.25)
    assert_same(load(tmp_path / "x"), made)


def test_files_of_before_windows_and_masks_load_and_save_as_they_were(tmp_path: Path) -> None:
    old = load(EMBEDDED)
    assert old.header.freezing.window_maps is None and old.frozen
    save(old, tmp_path / "again")
    before, after = read_raw(EMBEDDED)[0], read_raw(tmp_path / "again")[0]
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[key], strict=True)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    bits=st.sampled_from(BITS),
    quantizer=st.sampled_from(QUANTIZERS),
    granularity=st.sampled_from(GRANULARITIES),
    window_maps=st.sampled_from(list(WINDOWS)),
    modules=st.dictionaries(
        st.from_regex(r"[a-z]{1,3}(\.[a-z0-9]{1,5}){0,2}(\.codes|\.heads|\.mask)?", fullmatch=True),
        st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5)),
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
    granularity: Granularity,
    window_maps: WindowMaps | None,
    modules: dict[str, tuple[int, int, int]],
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    attention, frozen = {}, {}
    for path, (heads, tokens, n_windows) in modules.items():
        windows: dict[WindowMaps | None, list[int] | None] = {
            None: None,
            "shared": [0] * n_windows,
            "class": [0, *rng.integers(0, 2, size=n_windows - 1).tolist()],
            "window": list(range(n_windows)),
        }
        attention[path] = AttentionShape(heads=heads, tokens=tokens, windows=windows[window_maps])
        if chosen := sorted(data.draw(st.sets(st.integers(0, heads - 1)))):
            frozen[path] = frozen_maps(rng, attention[path], chosen, granularity, bits, quantizer)
    made = with_frozen(
        checkpoint,
        attention,
        frozen,
        granularity=granularity,
        window_maps=window_maps,
        bits=bits,
        quantizer=quantizer,
    )
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


@pytest.mark.parametrize("granularity", ["row", "entry"])
def test_a_flipped_bit_anywhere_in_the_mask_is_noticed(
    checkpoint: Checkpoint, tmp_path: Path, granularity: Granularity
) -> None:
    """It changes how many codes there must be, or the sparsity, or is in the padding."""
    save(make(checkpoint, granularity, "class"), tmp_path / "x")
    tensors, metadata = read_raw(tmp_path / "x")
    data = tensors["eam.blocks.1.attn.mask"]
    for bit in range(data.size * 8):
        data[bit // 8] ^= 1 << bit % 8
        save_file(tensors, tmp_path / "x", metadata)
        with pytest.raises(CheckpointError):
            load(tmp_path / "x")
        data[bit // 8] ^= 1 << bit % 8


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


CODES, SCALES, HEADS, MASK = (f"eam.blocks.1.attn.{suffix}" for suffix in ("codes", "scales", "heads", "mask"))


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
        (add(MASK), r"unknown tensor eam\.blocks\.1\.attn\.mask.*codes, \.scales for granularity head"),
        (add("eam.blocks.0.attn.scales"), r"eam\.blocks\.0\.attn is incomplete.*got no heads, codes"),
        (rename_module, r"eam\.blocks\.7\.attn belongs to no attention module.*expected one of blocks\.0\.attn"),
        (remove_module, r"freezing\.heads and tensor eam\.blocks\.1\.attn\.heads disagree.*no such tensor"),
        (replace(CODES, lambda a: a[:-1]), r"attn\.codes has the wrong size; expected uint8 \[19\].*got uint8 \[18\]"),
        (replace(CODES, lambda a: np.append(a, a[:1])), r"attn\.codes has the wrong size"),
        (replace(CODES, lambda a: a.astype(np.int32)), r"attn\.codes has the wrong size.*got int32 \[19\]"),
        (replace(CODES, lambda a: a | np.uint8(0x80)), r"attn\.codes goes on after the last value.*padding"),
        (replace(CODES, np.zeros_like), r"10 of 10 rows do not sum to 1.*got 0 at"),
        (replace(SCALES, lambda a: a.astype(np.float64)), r"attn\.scales has the wrong dtype.*float32 \[2, 5\]"),
        (replace(SCALES, lambda a: a.reshape(5, 2)), r"attn\.scales has the wrong.*got float32 \[5, 2\]"),
        (replace(SCALES, lambda a: a * np.float32(1.001)), r"rows do not sum to 1.*got 1\.001"),
        (replace(SCALES, lambda a: -a), r"attn\.scales at .*positive finite"),
        (
            replace(HEADS, lambda a: a.astype(np.int32)),
            r"attn\.heads has the wrong.*int64 \[2\]; got int32 \[2\]",
        ),
        (replace(HEADS, lambda a: a[:1]), r"attn\.codes has the wrong size"),
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
        load(saved, verify=False)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize(
    ("granularity", "change", "message"),
    [
        ("row", remove(MASK), r"is incomplete; expected .*\.mask, .* for granularity row; got no mask"),
        ("entry", remove(MASK), "for granularity entry; got no mask"),
        (
            "row",
            replace(MASK, lambda a: a[:1]),
            r"attn\.mask has the wrong size; expected uint8 \[2\].*\[2, 5\]; got uint8",
        ),
        ("entry", replace(MASK, lambda a: a[:2]), r"attn\.mask has the wrong size; expected uint8 \[7\].*\[2, 5, 5\]"),
        ("entry", replace(MASK, lambda a: a.astype(np.bool_)), r"attn\.mask has the wrong size.*got bool \[7\]"),
        (
            "row",
            replace(MASK, lambda a: a | np.uint8(0x80)),
            r"attn\.mask goes on after the last value.*padding bits 0",
        ),
        (
            "entry",
            replace(MASK, lambda a: a | np.array([0] * 6 + [4], np.uint8)),
            r"attn\.mask goes on after the last value",
        ),
        ("row", replace(MASK, np.zeros_like), r"attn\.codes has the wrong size; expected uint8 \[0\] for .*\[0\]"),
        ("entry", replace(CODES, lambda a: a[:-1]), r"attn\.codes has the wrong size"),
        ("entry", replace(CODES, lambda a: np.append(a, a[:1])), r"attn\.codes has the wrong size"),
        ("row", replace(CODES, np.zeros_like), r"rows do not sum to 1.*got 0 at \(frozen head, window map, row\)"),
        (
            "row",
            replace(SCALES, lambda a: a + np.float32(1)),
            r"scales at .*expected 0 in a row without frozen entries",
        ),
        ("entry", replace(SCALES, lambda a: a * 0), r"scales at .*expected a positive finite number; got 0"),
        (
            "entry",
            replace(SCALES, lambda a: a * 100),
            r"have a frozen part that sums to more than 1; .*at most 1e-05 over 1",
        ),
        ("row", replace(SCALES, lambda a: a[:, 0]), r"scales has the wrong.*float32 \[2, 3, 5\]; got float32 \[2, 5\]"),
        ("head", replace(SCALES, lambda a: a[:, :2]), r"scales has the wrong.*float32 \[2, 3, 5\]; got .*\[2, 2, 5\]"),
        ("head", replace(CODES, lambda a: a[:20]), r"codes has the wrong size.*3-bit codes \[2, 3, 5, 5\]"),
    ],
)
def test_bad_tensors_of_pieces_and_windows_are_named(
    checkpoint: Checkpoint, tmp_path: Path, granularity: Granularity, change: Callable[[Tensors], None], message: str
) -> None:
    path = tmp_path / "p.eam.safetensors"
    save(make(checkpoint, granularity, "class"), path)
    tensors, metadata = read_raw(path)
    change(tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path, verify=False)
    assert str(path) in str(error.value)


def edit_header(path: Path, edit: dict[str, object]) -> None:
    """The header has other values under these dotted keys, in which `#1~` stands for `blocks.1.attn`."""
    tensors, metadata = read_raw(path)
    header = json.loads(metadata["eam"])
    for key, value in edit.items():
        *parents, last = (re.sub(r"#(\d)~", r"blocks.\1.attn", part) for part in key.split("."))
        place = header
        for parent in parents:
            place = place[parent]
        place[last] = value
    save_file(tensors, path, {"eam": json.dumps(header)})


@pytest.mark.parametrize(
    ("window_maps", "edit", "message"),
    [
        (
            "class",
            {"attention.#1~.windows": [0, 1, 1, 3]},
            r"attention\.blocks\.1\.attn\.windows: .*each at least once",
        ),
        ("class", {"attention.#1~.windows": [1, 2, 3, 1]}, r"attention\.blocks\.1\.attn\.windows: "),
        ("class", {"attention.#1~.windows": []}, r"attention\.blocks\.1\.attn\.windows: "),
        ("class", {"attention.#1~.windows": [0, 1, 1, 1]}, r"codes has the wrong size.*\[2, 2, 5, 5\]"),
        (
            "class",
            {"attention.#0~.windows": None},
            r"blocks\.0\.attn\.windows and freezing\.window_maps disagree.*None and class",
        ),
        ("class", {"attention.#0~.windows": [0]}, r"freezing\.sparsity; expected"),
        ("class", {"freezing.window_maps": None}, r"window_maps disagree; expected both.*got \[0, 1, 1, 2\] and None"),
        (
            "class",
            {"freezing.window_maps": "shared"},
            r"does not fit window_maps shared; expected only 0; got \[0, 1, 1, 2\]",
        ),
        ("class", {"freezing.window_maps": "window"}, r"does not fit window_maps window; expected 0…3 in order"),
        ("class", {"freezing.window_maps": "mask"}, r"not a valid CheckpointHeader: freezing\.window_maps"),
        ("window", {"attention.#1~.windows": [0, 1, 3, 2]}, r"does not fit window_maps window.*got \[0, 1, 3, 2\]"),
        ("window", {"freezing.window_maps": "shared"}, "does not fit window_maps shared"),
        (None, {"freezing.window_maps": "shared"}, r"window_maps disagree.*got None and shared"),
        (None, {"attention.#0~.windows": [0]}, r"window_maps disagree.*got \[0\] and None"),
    ],
)
def test_bad_windows_are_named(
    checkpoint: Checkpoint, tmp_path: Path, window_maps: WindowMaps | None, edit: dict[str, object], message: str
) -> None:
    path = tmp_path / "w.eam.safetensors"
    save(make(checkpoint, "head", window_maps), path)
    edit_header(path, edit)
    with pytest.raises(CheckpointError, match=message) as error:
        load(path, verify=False)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("granularity", "claimed", "message"),
    [
        ("row", "head", r"unknown tensor eam\.blocks\.1\.attn\.mask"),
        ("row", "entry", r"attn\.mask has the wrong size"),
        ("entry", "row", r"attn\.mask has the wrong size"),
        ("head", "row", "got no mask"),
        ("head", "entry", "got no mask"),
    ],
)
def test_a_granularity_that_is_not_the_files_is_noticed(
    checkpoint: Checkpoint, tmp_path: Path, granularity: Granularity, claimed: Granularity, message: str
) -> None:
    save(make(checkpoint, granularity), tmp_path / "x")
    edit_header(tmp_path / "x", {"freezing.granularity": claimed})
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "x", verify=False)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"format": 4}, "unknown checkpoint format; expected format 1 or 2 or 3; got 4"),
        ({"format": None}, "unknown checkpoint format.*got None"),
        ({"format": True}, "unknown checkpoint format.*got True"),
        ({"format": 2.0}, "unknown checkpoint format.*got 2.0"),
        ({"future": 1}, r"header metadata `eam` is not a valid CheckpointHeader: future"),
        ({"num_classes": "ten"}, "not a valid CheckpointHeader: num_classes"),
        ({"num_classes": 3}, "class_names does not fit num_classes; expected 3 names; got 2"),
        ({"attention": {}}, "attention is empty"),
        ({"attention": {"a": {"heads": 0, "tokens": 5}}}, r"not a valid CheckpointHeader: attention\.a\.heads"),
        ({"freezing.granularity": "cell"}, r"not a valid CheckpointHeader: freezing\.granularity"),
        ({"freezing.bits": 5}, r"freezing\.bits"),
        ({"freezing.bits": 4}, r"attn\.codes has the wrong size; expected uint8 \[25\]"),
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
    edit_header(saved, edit)
    with pytest.raises(CheckpointError, match=message) as error:
        load(saved, verify=False)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[1]", "null", "1"])
def test_header_metadata_that_is_no_object(saved: Path, text: str) -> None:
    tensors, _ = read_raw(saved)
    save_file(tensors, saved, {"eam": text})
    with pytest.raises(CheckpointError, match=r"`eam` is no JSON|unknown checkpoint format"):
        load(saved, verify=False)


def test_bfloat16_weights_are_refused_with_advice(saved: Path) -> None:
    tensors, metadata = read_raw(saved)
    tensors["model.head.weight"] = tensors["model.head.weight"].astype(np.float16)
    save_file(tensors, saved, metadata)
    raw = saved.read_bytes()
    place = raw.index(b'"model.head.weight"')
    saved.write_bytes(raw[:place] + raw[place:].replace(b'"F16"', b'"BF16"', 1).replace(b"} ", b"}", 1))
    with pytest.raises(CheckpointError, match=r"model\.head\.weight has an unsupported dtype.*got BF16.*float32"):
        load(saved, verify=False)


def test_without_safetensors_the_error_says_what_to_install(
    checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(MissingDependency, match=r"pip install 'eamdeploy\[host\]'"):
        load(saved)
    with pytest.raises(MissingDependency, match=r"pip install 'eamdeploy\[host\]'"):
        save(checkpoint, saved)
