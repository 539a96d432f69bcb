"""Heads of low rank in the file of maps that `pack` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from eamdeploy.eam.quantizers import quantize_rows
from eamdeploy.errors import CheckpointError
from eamdeploy.host.maps_file import read_maps

N, RANK = 5, 3
PATH = "blocks.3.attn"
Arrays = dict[str, NDArray[Any]]


def rows(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Random rows along the last axis that sum to 1."""
    *outer, keys = shape
    return np.random.default_rng(seed).dirichlet(np.ones(keys), outer).astype(np.float32)


def codes(*shape: int, seed: int = 0) -> NDArray[np.int64]:
    drawn = np.random.default_rng(seed).integers(0, 16, shape)
    drawn[..., 0] = 15
    return drawn


def factors(heads: int = 2, rank: int = RANK, windows: tuple[int, ...] = ()) -> Arrays:
    return {
        "heads": np.arange(heads),
        "mix": rows(heads, *windows, N, rank),
        "pool": rows(heads, *windows, rank, N, seed=1),
    }


def write(file: Path, arrays: Arrays) -> Path:
    stored = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if file.suffix == ".npz":
        np.savez(file, **stored)  # type: ignore[arg-type]
    else:
        save_file(stored, file)
    return file


def named(parts: Arrays, rank: int | str = RANK, path: str = PATH) -> Arrays:
    return {f"{path}.rank{rank}.{name}": array for name, array in parts.items()}


def maps_of(*heads: int) -> Arrays:
    return {f"{PATH}.heads": np.array(heads), f"{PATH}.maps": rows(len(heads), N, N)}


@pytest.fixture(params=[".npz", ".safetensors"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"maps{request.param}"


@pytest.mark.parametrize("windows", [(), (4,)], ids=["image", "windows"])
@pytest.mark.parametrize("quantizer", ["squared", "uniform"])
def test_floats_are_quantized_and_heads_sorted(file: Path, quantizer: Any, windows: tuple[int, ...]) -> None:
    given = factors(3, windows=windows) | {"heads": np.array([4, 0, 2], np.int32)}
    ((got,),) = read_maps(write(file, named(given)), 3, quantizer).factors.values()
    assert got.heads.dtype == np.int64 and got.heads.tolist() == [0, 2, 4] and got.rank == RANK
    order = [1, 2, 0]
    expected = [
        *quantize_rows(given["mix"][order], 3, quantizer),
        *quantize_rows(given["pool"][order], 3, quantizer),
    ]
    stored = (got.mix_codes, got.mix_scales, got.pool_codes, got.pool_scales)
    for one, other in zip(stored, expected, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    np.testing.assert_allclose(got.maps(quantizer).sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize(("quantizer", "power"), [("squared", 2), ("uniform", 1)])
def test_codes_are_kept_and_get_scales(file: Path, quantizer: Any, power: int) -> None:
    mix, pool = codes(2, N, RANK), codes(2, RANK, N, seed=1)
    given = {"heads": np.array([7, 1]), "mix_codes": mix, "pool_codes": pool}
    ((got,),) = read_maps(write(file, named(given)), 4, quantizer).factors.values()
    np.testing.assert_array_equal(got.mix_codes, mix[::-1])
    np.testing.assert_array_equal(got.pool_codes, pool[::-1])
    assert {got.mix_codes.dtype, got.pool_codes.dtype} == {np.dtype(np.uint8)}
    assert {got.mix_scales.dtype, got.pool_scales.dtype} == {np.dtype(np.float32)}
    np.testing.assert_allclose(got.mix_scales, 1 / (mix[::-1].astype(float) ** power).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(got.pool_scales, 1 / (pool[::-1].astype(float) ** power).sum(-1), rtol=1e-6)


def test_one_factor_may_be_floats_and_the_other_codes(file: Path) -> None:
    given = factors(1)
    given["pool_codes"] = codes(1, RANK, N)
    del given["pool"]
    ((got,),) = read_maps(write(file, named(given)), 4, "squared").factors.values()
    np.testing.assert_array_equal(got.pool_codes, given["pool_codes"])
    np.testing.assert_allclose(got.mix("squared"), given["mix"], atol=0.1)


def test_maps_ranks_and_modules_stay_apart(file: Path) -> None:
    """A module with maps and two ranks, one with maps alone, one with factors alone."""
    both = maps_of(1) | named(factors(1, 4) | {"heads": np.array([5])}, 4)
    both |= named(factors(2, 1) | {"heads": np.array([3, 0])}, 1)
    alone = named(factors(2), path="blocks.4.attn")
    plain = {"blocks.5.attn.heads": np.array([0]), "blocks.5.attn.maps": rows(1, N, N)}
    got = read_maps(write(file, alone | both | plain), 4, "squared")
    assert {path: item.heads.tolist() for path, item in got.maps.items()} == {PATH: [1], "blocks.5.attn": [0]}
    found = {path: [(g.rank, g.heads.tolist()) for g in groups] for path, groups in got.factors.items()}
    assert found == {PATH: [(1, [0, 3]), (4, [5])], "blocks.4.attn": [(RANK, [0, 1])]}


def changed(name: str, index: tuple[int, ...], value: float) -> Arrays:
    parts = factors()
    parts[name] = parts[name].copy()
    parts[name][index] = value
    return parts


def scaled(name: str, row: tuple[int, ...]) -> Arrays:
    parts = factors()
    parts[name][row] *= 1.02
    return parts


def coded(**arrays: NDArray[Any]) -> Arrays:
    return {
        "heads": np.arange(2),
        "mix_codes": codes(2, N, RANK),
        "pool_codes": codes(2, RANK, N),
    } | arrays


def without(name: str) -> Arrays:
    parts = factors()
    del parts[name]
    return parts


def with_code(name: str, index: tuple[int, ...], value: int) -> Arrays:
    parts = coded()
    parts[name][index] = value
    return parts


BAD: dict[str, tuple[Arrays, str]] = {
    "a row of the mix": (
        scaled("mix", (1, 2)),
        r"1 of 10 rows in the mixes of .*rank3 do not sum to 1; expected row sums within 0\.001 of 1"
        r".*got 1\.02 at \[1, 2\]\. Take them behind the softmax, or divide every row by its sum",
    ),
    "a row of the pool": (
        scaled("pool", (0, 1)),
        r"1 of 6 rows in the pools of .*rank3 do not sum to 1.*at \[0, 1\]",
    ),
    "NaN in the mix": (changed("mix", (0, 4, 1), np.nan), r"mixes of .* are not finite.*the first at \[0, 4, 1\]"),
    "infinite pool": (changed("pool", (1, 0, 2), np.inf), r"pools of .* are not finite.*the first at \[1, 0, 2\]"),
    "negative mix": (changed("mix", (0, 0, 0), -0.2), r"mixes of .* leave \[0, 1\] at \[0, 0, 0\]"),
    "integers as mix": (factors() | {"mix": codes(2, N, RANK)}, r"mixes of .*expected a non-empty floating-point"),
    "fractions as codes": (
        coded(pool_codes=rows(2, RANK, N)),
        r"rank3\.pool_codes are no codes; expected integers \[G, r, N\]; got float32",
    ),
    "a code above the bits": (
        with_code("mix_codes", (1, 0, 0), 16),
        r"rank3\.mix_codes out of range; expected integers in 0 … 15 \(4 bits\); got 0 … 16\. See --bits",
    ),
    "a code below 0": (with_code("pool_codes", (1, 0, 0), -1), r"rank3\.pool_codes out of range.*got -1 … 15"),
    "a row of the mix without codes": (
        with_code("mix_codes", (1, 3), 0),
        r"rank3\.mix_codes: a row has no code but 0; expected rows that can sum to 1; got only 0 at \[1, 3\]",
    ),
    "a row of the pool without codes": (
        with_code("pool_codes", (0, 2), 0),
        r"rank3\.pool_codes: a row has no code but 0.*at \[0, 2\]",
    ),
    "the rank of the name is another": (
        factors(rank=2),
        r"mix and pool have the wrong shapes; expected \[2, N, 3\] and \[2, 3, N\], or .* with windows"
        r"; got \[2, 5, 2\] and \[2, 2, 5\]\. The number behind `rank`",
    ),
    "mix and pool of other tokens": (
        factors() | {"pool": rows(2, RANK, N + 1)},
        r"wrong shapes.*got \[2, 5, 3\] and \[2, 3, 6\]",
    ),
    "windows of the mix alone": (
        factors() | {"mix": rows(2, 4, N, RANK)},
        r"wrong shapes.*got \[2, 4, 5, 3\] and \[2, 3, 5\]",
    ),
    "more windows of the pool": (
        factors(windows=(2,)) | {"pool": rows(2, 4, RANK, N)},
        r"wrong shapes.*got \[2, 2, 5, 3\] and \[2, 4, 3, 5\]",
    ),
    "one axis": (factors() | {"mix": rows(N)}, r"wrong shapes.*got \[5\] and"),
    "no tokens": (
        {"heads": np.arange(2), "mix": np.zeros((2, 0, RANK)), "pool": np.zeros((2, RANK, 0))},
        r"wrong shapes.*got \[2, 0, 3\] and \[2, 3, 0\]",
    ),
    "fewer heads": (factors() | {"heads": np.arange(3)}, r"expected \[3, N, 3\].*got \[2, 5, 3\]"),
    "no heads": (factors(0), r"mixes of .*expected a non-empty floating-point array"),
    "a head twice": (factors() | {"heads": np.array([4, 4])}, r"rank3\.heads; expected distinct integers \[G\]"),
    "no mix": (without("mix"), r"rank3 is incomplete; expected heads, either mix or mix_codes.*got heads, pool"),
    "no pool": (without("pool"), r"rank3 is incomplete; .*got heads, mix"),
    "no list of heads": (without("heads"), r"rank3 is incomplete; .*got mix, pool"),
    "mix and its codes": (
        factors() | {"mix_codes": codes(2, N, RANK)},
        r"rank3 is incomplete; .*got heads, mix, mix_codes, pool",
    ),
    "a mask": (factors() | {"mask": np.ones((2, N), np.bool_)}, r"unknown array blocks\.3\.attn\.rank3\.mask"),
}


@pytest.mark.parametrize(("parts", "message"), BAD.values(), ids=BAD.keys())
def test_factors_that_mean_nothing_are_refused_by_name(file: Path, parts: Arrays, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as err:
        read_maps(write(file, named(parts)), 4, "squared")
    assert f"{file}: " in str(err.value) and f"{PATH}.rank3" in str(err.value)


def test_a_rank_above_the_tokens_is_refused(file: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"rank6: the rank is above the tokens; expected a rank in 1…5, .*got 6\. .*whole map"
    ):
        read_maps(write(file, named(factors(rank=6), 6)), 4, "squared")
    ((got,),) = read_maps(write(file, named(factors(rank=5), 5)), 4, "squared").factors.values()
    assert got.rank == 5


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (maps_of(1), r"head 1 is frozen twice; .*got 1 in \.heads and in \.rank3\.heads\. Leave"),
        (named(factors(1, 4), 4), r"head 0 is frozen twice; .*got 0 in \.rank3\.heads and in \.rank4\.heads"),
    ],
    ids=["in maps", "in two ranks"],
)
def test_a_head_is_frozen_once(file: Path, other: Arrays, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_maps(write(file, named(factors()) | other), 4, "squared")


@pytest.mark.parametrize("rank", ["0", "04", "", "-1", "two", "1000000"])
def test_names_without_a_rank_are_refused(file: Path, rank: str) -> None:
    with pytest.raises(CheckpointError, match=rf"unknown array {PATH}\.rank{rank}\..*<r>\.heads, \.mix, .*from 1 on"):
        read_maps(write(file, named(factors(), rank)), 4, "squared")
