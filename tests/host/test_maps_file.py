from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import FOREIGN, assert_plain, write_foreign
from numpy.typing import NDArray
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from eamdeploy.eam.quantizers import quantize_rows
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.host.maps_file import read_maps

N = 5
PATH = "blocks.3.attn"


def some_maps(heads: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).dirichlet(np.ones(N), (heads, N)).astype(np.float32)


def some_codes(heads: int, largest: int = 15) -> NDArray[np.int64]:
    codes = np.random.default_rng(1).integers(0, largest + 1, (heads, N, N))
    codes[..., 0] = largest
    return codes


def write(file: Path, arrays: dict[str, NDArray[Any]]) -> Path:
    if file.suffix == ".npz":
        np.savez(file, **arrays)  # type: ignore[arg-type]
    else:
        save_file(arrays, file)
    return file


@pytest.fixture(params=[".npz", ".safetensors"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"maps{request.param}"


@pytest.mark.parametrize("quantizer", ["squared", "uniform"])
def test_maps_are_quantized_and_heads_sorted(file: Path, quantizer: Any) -> None:
    maps = some_maps(3)
    write(file, {f"{PATH}.heads": np.array([4, 0, 2], np.int32), f"{PATH}.maps": maps})
    (got,) = read_maps(file, 3, quantizer).maps.values()
    codes, scales = quantize_rows(maps[[1, 2, 0]], 3, quantizer)
    assert got.heads.dtype == np.int64 and got.heads.tolist() == [0, 2, 4]
    np.testing.assert_array_equal(got.codes, codes)
    np.testing.assert_array_equal(got.scales, scales)


@pytest.mark.parametrize(("quantizer", "power"), [("squared", 2), ("uniform", 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_codes_are_kept_and_get_the_scale_that_makes_rows_sum_to_one(
    file: Path, quantizer: Any, power: int, dtype: Any
) -> None:
    codes = some_codes(2).astype(dtype)
    write(file, {f"{PATH}.heads": np.array([7, 1]), f"{PATH}.codes": codes})
    (got,) = read_maps(file, 4, quantizer).maps.values()
    assert got.codes.dtype == np.uint8
    np.testing.assert_array_equal(got.codes, codes[::-1])
    np.testing.assert_allclose(got.scales, 1 / (codes[::-1].astype(float) ** power).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(got.maps(quantizer).sum(-1), 1, rtol=1e-6)


def test_modules_stay_apart(file: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "blocks.0.attn.heads": np.array([1]),
        "blocks.0.attn.codes": some_codes(1),
        "blocks.1.attn.heads": np.array([0, 2]),
        "blocks.1.attn.maps": some_maps(2),
    }
    got = read_maps(write(file, arrays), 4, "squared").maps
    assert {path: item.heads.tolist() for path, item in got.items()} == {"blocks.0.attn": [1], "blocks.1.attn": [0, 2]}


# --- windows, rows and entries ---------------------------------------------------------------------------------------


def masks_of(heads: int, axes: int) -> NDArray[np.bool_]:
    mask = np.random.default_rng(3).random((heads, *[N] * axes)) < 0.5
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize("windows", [(), (3,)], ids=["image", "windows"])
@pytest.mark.parametrize("axes", [0, 1, 2], ids=["heads", "rows", "entries"])
def test_maps_keep_the_sum_of_what_is_frozen_and_ignore_the_rest(
    file: Path, axes: int, windows: tuple[int, ...]
) -> None:
    maps = np.random.default_rng(0).dirichlet(np.ones(N), (2, *windows, N)).astype(np.float32)
    arrays: dict[str, NDArray[Any]] = {f"{PATH}.heads": np.array([5, 1])}
    mask = masks_of(2, axes) if axes else None
    frozen = np.broadcast_to(True if mask is None else mask[..., None] if axes == 1 else mask, (2, N, N))
    spread = np.broadcast_to(frozen[:, None] if windows else frozen, maps.shape)
    arrays[f"{PATH}.maps"] = np.where(spread, maps, np.float32(np.nan))
    if mask is not None:
        arrays[f"{PATH}.mask"] = mask
    (got,) = read_maps(write(file, arrays), 8, "squared").maps.values()
    assert got.heads.tolist() == [1, 5]
    wanted = np.where(spread, maps, 0)[::-1]
    np.testing.assert_allclose(got.maps("squared"), wanted, atol=0.005)
    np.testing.assert_allclose(got.maps("squared").sum(-1), wanted.sum(-1), atol=1e-6)
    assert (got.codes[~spread[::-1]] == 0).all()
    np.testing.assert_array_equal(got.frozen(), frozen[::-1])
    assert (got.mask is None) == (mask is None) and (mask is None or got.mask.dtype == np.bool_)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64])
def test_codes_of_rows_are_kept_and_those_of_live_rows_dropped(file: Path, dtype: Any) -> None:
    codes, mask = some_codes(2), masks_of(2, 1)
    codes[~mask] = 99  # no code, but nobody asked
    arrays = {f"{PATH}.heads": np.array([0, 1]), f"{PATH}.codes": codes, f"{PATH}.mask": mask.astype(dtype)}
    (got,) = read_maps(write(file, arrays), 4, "uniform").maps.values()
    np.testing.assert_array_equal(got.codes, np.where(mask[..., None], codes, 0))
    np.testing.assert_allclose(got.maps("uniform").sum(-1), mask, rtol=1e-6)
    assert (got.scales[~mask] == 0).all()


def test_codes_of_entries_come_with_their_scales(file: Path) -> None:
    codes, mask = some_codes(2), masks_of(2, 2)
    mask[0, 3] = False
    scales = np.full((2, N), 1 / 5000, np.float64)
    arrays: dict[str, NDArray[Any]] = {
        f"{PATH}.heads": np.array([3, 2]),
        f"{PATH}.codes": codes,
        f"{PATH}.mask": mask,
        f"{PATH}.scales": scales,
    }
    (got,) = read_maps(write(file, arrays), 4, "squared").maps.values()
    wanted = np.where(mask, codes.astype(float) ** 2 / 5000, 0)[::-1]
    np.testing.assert_allclose(got.maps("squared"), wanted, rtol=1e-6)
    assert got.scales.dtype == np.float32 and got.scales[1, 3] == 0 and got.scales[0, 3] > 0


def off_by(maps: NDArray[np.float32], change: float) -> NDArray[np.float32]:
    maps = maps.copy()
    maps[0, 2] *= 1 + change
    return maps


def with_value(array: NDArray[Any], value: float) -> NDArray[Any]:
    array = array.copy()
    array[0, 1, 1] = value
    return array


HEADS = np.array([0])
BAD: dict[str, tuple[dict[str, NDArray[Any]], str]] = {
    "rows that don't sum to 1": ({"heads": HEADS, "maps": off_by(some_maps(1), 0.01)}, "1 of 5 rows.*do not sum to 1"),
    "NaN": ({"heads": HEADS, "maps": with_value(some_maps(1), np.nan)}, "are not finite"),
    "negative values": ({"heads": HEADS, "maps": with_value(some_maps(1), -0.1)}, r"leave \[0, 1\] at \[0, 1, 1\]"),
    "integers as maps": ({"heads": HEADS, "maps": some_codes(1)}, "expected a non-empty floating-point array"),
    "no map": ({"heads": HEADS[:0], "maps": some_maps(1)[:0]}, "expected a non-empty floating-point array"),
    "code above the bits": ({"heads": HEADS, "codes": with_value(some_codes(1), 16)}, r"0 … 15 \(4 bits\); got 0 … 16"),
    "code below 0": ({"heads": HEADS, "codes": with_value(some_codes(1), -1)}, r"0 … 15 \(4 bits\); got -1 … 15"),
    "fractions as codes": ({"heads": HEADS, "codes": some_maps(1)}, "are no codes; expected integers.*got float32"),
    "no code": ({"heads": HEADS[:0], "codes": some_codes(1)[:0]}, r"are no codes; .*got int64 \[0, 5, 5\]"),
    "row of zeros": ({"heads": HEADS, "codes": 0 * some_codes(1)}, "a row has no code but 0"),
    "both": (
        {"heads": HEADS, "codes": some_codes(1), "maps": some_maps(1)},
        "heads, and either maps or codes; got cod",
    ),
    "heads alone": ({"heads": HEADS}, "is incomplete; .*; got heads"),
    "maps alone": ({"maps": some_maps(1)}, "is incomplete; .*; got maps"),
    "head twice": ({"heads": np.array([2, 2]), "maps": some_maps(2)}, r"distinct integers \[F\]; got \[2, 2\]"),
    "heads as fractions": ({"heads": np.array([0.5]), "maps": some_maps(1)}, r"distinct integers \[F\]; got \[0\.5\]"),
    "heads in two dimensions": ({"heads": np.array([[0]]), "maps": some_maps(1)}, r"distinct integers \[F\]; got \[\["),
    "fewer maps than heads": (
        {"heads": np.array([0, 1]), "maps": some_maps(1)},
        r"expected \[2, N, N\], or \[2, M, N, N\] with windows; got \[1, 5, 5\]",
    ),
    "one map without its axis": (
        {"heads": HEADS, "maps": some_maps(1)[0]},
        r"expected \[1, N, N\], or \[1, M, N, N\] with windows; got \[5, 5\]",
    ),
    "mask of another shape": (
        {"heads": HEADS, "maps": some_maps(1), "mask": np.ones((1, N + 1), np.bool_)},
        r"mask has the wrong shape; expected \[1, 5\] \(rows\) or \[1, 5, 5\] \(entries\); got \[1, 6\]",
    ),
    "mask with a window axis": (
        {"heads": HEADS, "maps": some_maps(1)[:, None], "mask": np.ones((1, 1, N, N), np.bool_)},
        r"mask has the wrong shape.*got \[1, 1, 5, 5\]",
    ),
    "mask of other numbers": (
        {"heads": HEADS, "maps": some_maps(1), "mask": np.full((1, N), 2)},
        r"mask; expected true and false, or 0 and 1; got \[2\]",
    ),
    "head of which nothing is frozen": (
        {"heads": np.array([0, 1]), "maps": some_maps(2), "mask": np.array([[1] * N, [0] * N])},
        "nothing of the head at index 1 is frozen",
    ),
    "frozen part above 1": (
        {"heads": HEADS, "maps": 2 * some_maps(1), "mask": np.eye(N, dtype=np.bool_)[None] | (np.arange(N) > 0)},
        r"do not sum to 1|leave \[0, 1\]",
    ),
    "codes of entries without scales": (
        {"heads": HEADS, "codes": some_codes(1), "mask": np.ones((1, N, N), np.bool_)},
        r"scales are missing; .*; got codes, heads, mask",
    ),
    "scales of whole rows": (
        {"heads": HEADS, "codes": some_codes(1), "scales": np.ones((1, N))},
        r"scales are of no use; .*; got codes, heads, scales",
    ),
    "scales of another shape": (
        {
            "heads": HEADS,
            "codes": some_codes(1),
            "mask": np.ones((1, N, N), np.bool_),
            "scales": np.ones((1, N + 1)),
        },
        r"scales; expected floating point \[1, 5\]; got float64 \[1, 6\]",
    ),
    "row of zeros among live ones": (
        {"heads": HEADS, "codes": 0 * some_codes(1), "mask": np.eye(N, dtype=np.bool_)[:1]},
        "a row has no code but 0",
    ),
    "maps that are not square": (
        {"heads": HEADS, "maps": some_maps(1)[:, :4]},
        r"expected \[1, N, N\], or \[1, M, N, N\] with windows; got \[1, 4, 5\]",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), BAD.values(), ids=BAD.keys())
def test_maps_that_mean_nothing_are_refused_by_name(file: Path, arrays: dict[str, NDArray[Any]], message: str) -> None:
    write(file, {f"{PATH}.{key}": np.ascontiguousarray(array) for key, array in arrays.items()})
    with pytest.raises(CheckpointError, match=message) as err:
        read_maps(file, 4, "squared")
    assert f"{file}: {PATH}" in str(err.value)


def test_row_sums_within_rounding_are_fine(file: Path) -> None:
    write(file, {f"{PATH}.heads": HEADS, f"{PATH}.maps": off_by(some_maps(1), 5e-4)})
    assert len(read_maps(file, 4, "squared").maps) == 1


def test_stray_arrays_and_empty_files_are_refused(file: Path) -> None:
    write(file, {f"{PATH}.heads": HEADS, f"{PATH}.weight": some_maps(1)})
    with pytest.raises(CheckpointError, match=r"unknown array blocks\.3\.attn\.weight; expected <module path>\.heads"):
        read_maps(file, 4, "squared")
    write(file, {"heads": HEADS})
    with pytest.raises(CheckpointError, match="unknown array heads"):
        read_maps(file, 4, "squared")
    write(file, {})
    with pytest.raises(CheckpointError, match="holds no maps"):
        read_maps(file, 4, "squared")


def test_damaged_files_are_named(file: Path) -> None:
    write(file, {f"{PATH}.heads": HEADS, f"{PATH}.maps": some_maps(1)})
    data = file.read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"<html>not found</html>", data[:40] + b"\xff" * 60 + data[100:]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{file.name} is damaged or no "):
            read_maps(file, 4, "squared")


def test_pickled_and_single_arrays_are_no_maps(tmp_path: Path) -> None:
    np.savez(tmp_path / "maps.npz", heads=np.array([None, {}]))
    with pytest.raises(CheckpointError, match=r"maps\.npz is damaged.*got an array of Python objects.*numpy\.savez"):
        read_maps(tmp_path / "maps.npz", 4, "squared")
    with (tmp_path / "maps.npz").open("wb") as stream:
        np.save(stream, some_maps(1))
    with pytest.raises(CheckpointError, match=r"maps\.npz is damaged.*one array, not an archive"):
        read_maps(tmp_path / "maps.npz", 4, "squared")


@pytest.mark.parametrize("kind", [kind for kind in FOREIGN if kind not in ("npz", "npz of objects", "safetensors")])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_file_of_another_kind_is_named(tmp_path: Path, kind: str, suffix: str) -> None:
    path, words = write_foreign(tmp_path, kind, f"maps{suffix}")
    with pytest.raises(CheckpointError) as caught:
        read_maps(path, 4, "squared")
    if suffix == ".npz" and kind == "empty zip":
        assert_plain(str(caught.value), "maps.npz", "holds no maps")
    else:
        assert_plain(
            str(caught.value), f"maps{suffix}", suffix.removeprefix("."), f"got {words}", "Write the maps again"
        )


def test_bfloat16_is_refused(tmp_path: Path) -> None:
    maps = {f"{PATH}.heads": torch.tensor([0]), f"{PATH}.maps": torch.full((1, 4, 4), 0.25, dtype=torch.bfloat16)}
    save_torch(maps, tmp_path / "maps.safetensors")
    with pytest.raises(CheckpointError, match=r"maps\.safetensors.*bfloat16"):
        read_maps(tmp_path / "maps.safetensors", 4, "squared")


def test_missing_files_and_other_suffixes_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file of maps at"):
        read_maps(tmp_path / "maps.npz", 4, "squared")
    with pytest.raises(ConfigError, match=r"expected a \.npz or \.safetensors file; got \.pth"):
        read_maps(tmp_path / "maps.pth", 4, "squared")
