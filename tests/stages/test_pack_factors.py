"""`pack` with heads of low rank: from a file of maps and factors to a checkpoint and a proved graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import RunCli, only_error
from rank_models import Arrays, low_rank, packed, whole
from tiny_models import KWARGS, NAME, SWIN_KWARGS, SWIN_NAME, SWIN_PATHS, TOKENS, make_model, save_weights

from eamdeploy import export, freeze, pack
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.records import FrozenFactors
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.host.maps_file import read_maps
from eamdeploy.host.model import ModelSpec
from eamdeploy.host.reference import load_reference
from eamdeploy.images.source import ImageSource
from eamdeploy.vocabulary import WindowMaps


@pytest.fixture
def spec(tiny_weights: Path) -> ModelSpec:
    return ModelSpec(NAME, str(tiny_weights), KWARGS)


@pytest.fixture
def swin(tmp_path: Path) -> ModelSpec:
    weights = save_weights(make_model(SWIN_NAME), tmp_path / "swin.safetensors")
    return ModelSpec(SWIN_NAME, str(weights), SWIN_KWARGS)


def test_the_header_says_kinds_and_sparsity(spec: ModelSpec, tmp_path: Path) -> None:
    """One module with a live head, a map and a rank; one of two ranks alone."""
    output = tmp_path / "x.eam.safetensors"
    arrays = whole("blocks.0.attn", [2]) | low_rank("blocks.0.attn", [0], 4)
    arrays |= low_rank("blocks.1.attn", [0, 2], 1) | low_rank("blocks.1.attn", [1], 3)
    header = packed(spec, arrays, output)
    loaded = checkpoints.load(output)
    freezing = loaded.header.freezing
    assert loaded.header == header and header.calibration is None
    assert freezing.heads == {"blocks.0.attn": [0, 2], "blocks.1.attn": [0, 1, 2]}
    assert freezing.ranks == {"blocks.0.attn": [4, None], "blocks.1.attn": [1, 3, 1]}
    assert freezing.sparsity == pytest.approx(5 / 6) and freezing.low_rank == {1: 2, 3: 1, 4: 1}
    assert (freezing.granularity, freezing.window_maps, freezing.score) == ("head", None, "given")
    (one, three) = loaded.factors["blocks.1.attn"]
    assert [g.heads.tolist() for g in (one, three)] == [[0, 2], [1]]
    error = one.maps("squared") - arrays["blocks.1.attn.rank1.mix"] @ arrays["blocks.1.attn.rank1.pool"]
    assert np.abs(error).max() < 0.02


@pytest.mark.parametrize(
    "arrays",
    [low_rank("blocks.1.attn", [1], 2), whole("blocks.0.attn", [0]) | low_rank("blocks.1.attn", [1], 2)],
    ids=["factors alone", "maps in another module"],
)
def test_the_reference_forward_uses_the_factors(spec: ModelSpec, tmp_path: Path, arrays: Arrays) -> None:
    """A whole map with the factors' product gives the same logits, and live heads others."""
    output = tmp_path / "x.eam.safetensors"
    packed(spec, arrays, output)
    loaded = checkpoints.load(output)
    (group,) = loaded.factors["blocks.1.attn"]
    product = {key: value for key, value in arrays.items() if ".rank" not in key}
    product |= {"blocks.1.attn.heads": np.array([1]), "blocks.1.attn.maps": group.maps("squared")}
    file = tmp_path / "product.npz"
    np.savez(file, **product)  # type: ignore[arg-type]
    pack(spec, read_maps(file, 8, "squared").maps, tmp_path / "y.eam.safetensors", bits=8, quantizer="squared")
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    models = [
        load_reference(loaded, frozen=True, where="x").model,
        load_reference(checkpoints.load(tmp_path / "y.eam.safetensors"), frozen=True, where="y").model,
        load_reference(loaded, frozen=False, where="x").model,
    ]
    with torch.inference_mode():
        factors, maps, live = (model(images).numpy() for model in models)
    assert np.abs(factors - maps).max() < 0.1 * np.abs(factors - live).max()


@pytest.mark.parametrize("mode", ["shared", "class", "window"])
def test_what_freeze_made_comes_back(swin: ModelSpec, pictures: Path, tmp_path: Path, mode: WindowMaps) -> None:
    options = FreezeOptions(sparsity=0.9, score="random", window_maps=mode, rank="3")
    frozen = freeze(swin, ImageSource(pictures, limit=2), tmp_path / "a.eam.safetensors", options)
    given = checkpoints.load(tmp_path / "a.eam.safetensors")
    output = tmp_path / "b.eam.safetensors"
    made = pack(swin, given.frozen, output, bits=4, quantizer="squared", factors=given.factors)
    for name in ("granularity", "window_maps", "sparsity", "heads", "ranks"):
        assert getattr(made.freezing, name) == getattr(frozen.freezing, name)
    assert made.attention == frozen.attention
    for path, groups in checkpoints.load(output).factors.items():
        for one, other in zip(groups, given.factors[path], strict=True):
            np.testing.assert_array_equal(one.maps("squared"), other.maps("squared"))


def swin_arrays(windows: tuple[int, ...]) -> Arrays:
    """A map beside a rank in the shifted module, and a module of low rank alone, 16 tokens each."""
    shifted, last = SWIN_PATHS[1], SWIN_PATHS[3]
    one = (1,) if windows else ()
    arrays = whole(shifted, [0], 16, windows) | low_rank(shifted, [1], 3, 16, windows)
    return arrays | low_rank(last, [0, 1, 2, 3], 2, 16, one)


@pytest.mark.parametrize(
    ("windows", "mode"), [((), "shared"), ((1,), "shared"), ((4,), "class")], ids=["no axis", "one", "by class"]
)
def test_a_packed_swin_is_exported_and_proved(
    swin: ModelSpec, pictures: Path, tmp_path: Path, windows: tuple[int, ...], mode: WindowMaps
) -> None:
    output = tmp_path / "x.eam.safetensors"
    header = packed(swin, swin_arrays(windows), output)
    assert header.freezing.window_maps == mode
    assert header.freezing.heads == {SWIN_PATHS[1]: [0, 1], SWIN_PATHS[3]: [0, 1, 2, 3]}
    assert header.freezing.ranks == {SWIN_PATHS[1]: [None, 3], SWIN_PATHS[3]: [2, 2, 2, 2]}
    assert header.freezing.sparsity == pytest.approx((4 * 2 + 4) / (4 * 2 + 4 * 2 + 4 + 4))
    done = export(output, tmp_path / "x.onnx", images=ImageSource(pictures, limit=4))
    assert done.frozen.parity.passed


def test_modules_that_share_windows_in_two_ways_are_refused(swin: ModelSpec, tmp_path: Path) -> None:
    shifted = SWIN_PATHS[1]
    arrays = whole(shifted, [0], 16, (4,)) | low_rank(shifted, [1], 3, 16)
    with pytest.raises(ConfigError, match=r"each head with rank 3 of layers\.0\.blocks\.1\.attn .*got 1"):
        packed(swin, arrays, tmp_path / "x.eam.safetensors")


@pytest.mark.parametrize(
    ("arrays", "kind", "message"),
    [
        (low_rank("blocks.2.attn", [0], 2), ConfigError, r"no attention module blocks\.2\.attn; .*blocks\.1\.attn"),
        (
            low_rank("blocks.0.attn", [3], 2),
            CheckpointError,
            r"blocks\.0\.attn\.rank2\.heads; expected strictly ascending head indices in 0…2; got \[3\]",
        ),
        (
            low_rank("blocks.0.attn", [1], 2, tokens=16),
            CheckpointError,
            r"rank2\.mix_codes has the wrong dtype or shape; expected uint8 \[1, 17, 2\]; got uint8 \[1, 16, 2\]",
        ),
        (
            low_rank("blocks.0.attn", [1], 2, windows=(4,)),
            CheckpointError,
            r"rank2\.mix_codes.*expected uint8 \[1, 17, 2\]; got uint8 \[1, 4, 17, 2\]",
        ),
        (
            whole("blocks.0.attn", [0])
            | {"blocks.0.attn.mask": np.ones((1, TOKENS), np.bool_)}
            | low_rank("blocks.1.attn", [1], 2),
            ConfigError,
            r"maps of blocks\.0\.attn are frozen by row, and blocks\.1\.attn has heads of low rank; expected no mask",
        ),
    ],
    ids=["module", "head", "tokens", "windows", "mask"],
)
def test_factors_that_do_not_fit_the_model_are_refused(
    spec: ModelSpec, tmp_path: Path, arrays: Arrays, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        packed(spec, arrays, tmp_path / "x.eam.safetensors")
    assert not (tmp_path / "x.eam.safetensors").exists()


def test_factors_given_as_arrays_are_checked_too(spec: ModelSpec, tmp_path: Path) -> None:
    """`pack` is a function: whoever calls it may have read no file."""
    np.savez(tmp_path / "maps.npz", **low_rank("blocks.0.attn", [1], 2))  # type: ignore[arg-type]
    (group,) = read_maps(tmp_path / "maps.npz", 4, "squared").factors["blocks.0.attn"]
    wrong: dict[str, tuple[tuple[FrozenFactors, ...], str]] = {
        "twice": ((group, replace(group)), r"ranks; expected at least one, each once, ascending; got \[2, 2\]"),
        "sums": ((replace(group, mix_scales=group.mix_scales * 2),), r"rank2\.mix: 17 of 17 rows do not sum to 1"),
    }
    for groups, message in wrong.values():
        with pytest.raises(CheckpointError, match=message):
            pack(spec, {}, tmp_path / "x", bits=4, quantizer="squared", factors={"blocks.0.attn": groups})


def test_the_command_line_packs_factors(run_cli: RunCli, tiny_weights: Path, tmp_path: Path) -> None:
    kwargs = [f"--model-kwargs={name}={value}" for name, value in KWARGS.items()]
    file, output = tmp_path / "maps.npz", tmp_path / "x.eam.safetensors"
    np.savez(file, **whole("blocks.0.attn", [2]), **low_rank("blocks.0.attn", [0], 4))  # type: ignore[arg-type]
    words = ("pack", "--model", NAME, "--weights", tiny_weights, *kwargs, "--maps", file, "-o", output)
    made = run_cli(*words)
    assert made.code == 0, made.err
    assert "0*r4" in made.out and "2 of 6 heads (1 with rank 4)" in made.out
    np.savez(file, **whole("blocks.0.attn", [0]), **low_rank("blocks.0.attn", [0], 4))  # type: ignore[arg-type]
    assert "head 0 is frozen twice" in only_error(run_cli(*words), 2)
