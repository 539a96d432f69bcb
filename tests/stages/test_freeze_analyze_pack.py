from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from head_costs import sensitivity
from notebook import Notebook
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from tiny_models import (
    FAMILY,
    KWARGS,
    NAME,
    SWIN_FAMILY,
    SWIN_KWARGS,
    SWIN_NAME,
    SWIN_PATHS,
    TOKENS,
    draw_pictures,
    make_member,
    make_model,
    save_weights,
)

from eamdeploy import analyze, freeze, pack
from eamdeploy.eam import checkpoint as checkpoints
from eamdeploy.eam.analysis import Analysis
from eamdeploy.eam.options import FreezeOptions
from eamdeploy.eam.quantizers import quantize_rows
from eamdeploy.eam.records import FrozenMaps
from eamdeploy.eam.scores import score_pieces
from eamdeploy.eam.selection import Selection
from eamdeploy.errors import CheckpointError, ConfigError
from eamdeploy.host.attention import attention_sites, tapped_maps
from eamdeploy.host.calibrate import as_tensors, collect_statistics
from eamdeploy.host.fisher import fisher_sensitivity
from eamdeploy.host.means import mean_maps as means_of
from eamdeploy.host.model import ModelSpec, load_model
from eamdeploy.host.reference import load_reference
from eamdeploy.host.scoring import PieceScores
from eamdeploy.host.sites import window_maps
from eamdeploy.images.folder import folder_digest
from eamdeploy.images.options import PreprocessingOverrides
from eamdeploy.images.source import ImageSource
from eamdeploy.observer import SILENT
from eamdeploy.stages.freeze import read_shares
from eamdeploy.vocabulary import Granularity, WindowMaps

FAST = FreezeOptions(sparsity=0.5, score="row-entropy")
PATHS = ["blocks.0.attn", "blocks.1.attn"]


@pytest.fixture
def spec(tiny_weights: Path) -> ModelSpec:
    return ModelSpec(NAME, str(tiny_weights), KWARGS)


@pytest.fixture
def source(pictures: Path) -> ImageSource:
    return ImageSource(pictures)


def input_batches(spec: ModelSpec, source: ImageSource) -> tuple[Any, list[torch.Tensor]]:
    """The model of `spec` and the images of `source` as its input."""
    from eamdeploy.host.model import preprocessing_of
    from eamdeploy.images.options import TIMM_PREPROCESSING

    model = load_model(spec)
    how = preprocessing_of(model, TIMM_PREPROCESSING)
    return model, list(as_tensors(source.batches(source.open(), how, 16, SILENT), how))


def mean_maps(spec: ModelSpec, source: ImageSource) -> dict[str, NDArray[np.float64]]:
    """The mean maps over the images by module path, float64 [H, N, N]."""
    model, batches = input_batches(spec, source)
    maps: dict[str, list[torch.Tensor]] = {path: [] for path in PATHS}
    with (
        torch.inference_mode(),
        tapped_maps(model, attention_sites(model), lambda path, batch: maps[path].append(batch)),
    ):
        for batch in batches:
            model(batch)
    return {path: torch.cat(parts).double().mean(dim=0).numpy() for path, parts in maps.items()}


# --- freeze ----------------------------------------------------------------------------------------------------------


def test_checkpoint_holds_weights_provenance_and_the_lowest_scores(
    spec: ModelSpec, source: ImageSource, tiny_weights: Path, tmp_path: Path
) -> None:
    names = [f"class {index}" for index in range(10)]
    header = freeze(spec, source, tmp_path / "x.eam.safetensors", FAST, class_names=names)
    loaded = checkpoints.load(tmp_path / "x.eam.safetensors")
    assert loaded.header == header
    weights = load_file(tiny_weights)
    assert loaded.weights.keys() == weights.keys()
    assert all(np.array_equal(loaded.weights[key], weights[key].numpy()) for key in weights)
    assert (header.timm_model, header.timm_kwargs, header.weights) == (NAME, KWARGS, "tiny.safetensors")
    assert (header.num_classes, header.class_names) == (10, names)
    assert (header.preprocessing.size, header.preprocessing.mean) == ((32, 32), (0.5, 0.5, 0.5))
    assert {path: (shape.heads, shape.tokens) for path, shape in header.attention.items()} == dict.fromkeys(
        PATHS, (3, TOKENS)
    )
    assert header.calibration is not None
    assert (header.calibration.n_images, header.calibration.source) == (24, "pictures")
    assert header.calibration.digest == folder_digest(source.open())
    assert {"eamdeploy", "torch", "timm", "numpy", "python"} <= header.versions.keys()
    freezing = header.freezing
    assert (freezing.bits, freezing.quantizer, freezing.score) == (4, "squared", "row-entropy")
    assert (freezing.sparsity_asked, freezing.sparsity) == (0.5, 0.5)
    ranked = sorted((value, path, head) for path in PATHS for head, value in enumerate(freezing.scores[path]))
    frozen = {(path, head) for path, heads in freezing.heads.items() for head in heads}
    assert frozen == {(path, head) for _, path, head in ranked[:3]}


@pytest.mark.parametrize("quantizer", ["squared", "uniform"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_frozen_maps_are_the_quantized_means(
    spec: ModelSpec, source: ImageSource, tmp_path: Path, bits: Any, quantizer: Any
) -> None:
    options = replace(FAST, bits=bits, quantizer=quantizer)
    freeze(spec, source, tmp_path / "x.eam.safetensors", options)
    frozen = checkpoints.load(tmp_path / "x.eam.safetensors").frozen
    means = mean_maps(spec, source)
    assert sum(len(item.heads) for item in frozen.values()) == 3
    for path, item in frozen.items():
        wanted = means[path][item.heads]
        maps = item.maps(quantizer)
        np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)
        codes, _ = quantize_rows(wanted, bits, quantizer)
        # the two means are summed in different orders, so a value on a boundary may fall to either side
        assert np.mean(codes != item.codes) < 0.01
        assert np.abs(maps - wanted).max() < {2: 0.15, 3: 0.08, 4: 0.04, 8: 0.002}[bits]


@pytest.mark.parametrize(("sparsity", "heads"), [(0.0, 0), (0.16, 0), (0.17, 1), (0.5, 3), (0.99, 5), (1.0, 6)])
def test_as_many_heads_as_the_sparsity_allows(
    spec: ModelSpec, source: ImageSource, tmp_path: Path, sparsity: float, heads: int
) -> None:
    output = tmp_path / "x.eam.safetensors"
    header = freeze(spec, replace(source, limit=2), output, replace(FAST, sparsity=sparsity))
    loaded = checkpoints.load(output)
    assert sum(map(len, header.freezing.heads.values())) == heads
    assert header.freezing.sparsity == pytest.approx(heads / 6)
    assert set(loaded.frozen) == set(header.freezing.heads)


def test_sensitivity_is_the_default_and_measured_on_the_quantized_maps(
    spec: ModelSpec, source: ImageSource, tmp_path: Path
) -> None:
    options = FreezeOptions(bits=2)
    assert options.score == "sensitivity"
    header = freeze(spec, source, tmp_path / "x.eam.safetensors", options)
    model, batches = input_batches(spec, source)
    sites = attention_sites(model)
    statistics = collect_statistics(model, sites, batches, bins=2, spacing="uniform", on_images=lambda _: None)
    maps = {}
    for path, (module,) in statistics.items():
        codes, scales = quantize_rows(module.mean(), 2, "squared")
        maps[path] = FrozenMaps(np.arange(3), codes, scales).maps("squared")
    wanted = sensitivity(model, sites, maps, batches, 24, lambda *_: None)
    assert header.freezing.scores == {path: pytest.approx(values.tolist()) for path, values in wanted.items()}


def test_score_images_bounds_the_images_behind_sensitivity(
    spec: ModelSpec, source: ImageSource, tmp_path: Path
) -> None:
    scores, per_image = [], []
    for limit in (None, 5):
        notebook = Notebook()
        options = FreezeOptions(score_images=limit)
        header = freeze(spec, source, tmp_path / "x.eam.safetensors", options, observer=notebook)
        assert header.calibration is not None and header.calibration.n_images == 24
        scores.append(header.freezing.scores)
        (note,) = notebook.notes
        drawn = int(re.fullmatch(r"sensitivity of 6 heads on (\d+) images: about \d+ s", note)[1])  # type: ignore[index]
        assert drawn == 24 if limit is None else 3 <= drawn <= 5  # one may be drawn twice
        assert notebook.steps["attention maps"] == [(16, 24), (24, 24)]
        per_image.append(tuple(units / drawn for units in notebook.steps["sensitivity"][-1]))
    assert per_image == [(2 + 3 * 2 + 3 * 1,) * 2] * 2
    assert scores[0] != scores[1]


@pytest.mark.parametrize(("granularity", "sparsity"), [("head", 0.5), ("row", 0.8), ("head", 0.0)])
def test_the_cost_of_the_frozen_set_is_measured_on_all_calibration_images(
    spec: ModelSpec, source: ImageSource, tmp_path: Path, granularity: Granularity, sparsity: float
) -> None:
    path = tmp_path / "x.eam.safetensors"
    header = freeze(spec, source, path, FreezeOptions(sparsity, granularity, score_images=4))
    _, batches = input_batches(spec, source)
    loaded = checkpoints.load(path)
    live, frozen = (load_reference(loaded, frozen=kind, where="x").model for kind in (False, True))
    with torch.inference_mode():
        p, q = (torch.cat([model(batch) for batch in batches]).double().log_softmax(-1) for model in (live, frozen))
    cost = header.freezing.cost
    assert cost is not None and cost.n_images == 24
    assert cost.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4, abs=1e-12)
    assert cost.agreement == pytest.approx(100 * float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert (cost.kl > 1e-4) == (sparsity > 0)


def test_a_swin_freezes_what_costs_least_for_each_entry(tmp_path: Path, pictures: Path) -> None:
    """A head of the first stage has four times the entries of one of the second."""
    model = make_model(SWIN_NAME)
    spec = ModelSpec(SWIN_NAME, str(save_weights(model, tmp_path / "swin.safetensors")), SWIN_KWARGS)
    header = freeze(spec, ImageSource(pictures), tmp_path / "x.eam.safetensors", FreezeOptions(0.4))
    entries = {path: shape.entries_per_head for path, shape in header.attention.items()}
    assert set(entries.values()) == {16 * 16, 4 * 16 * 16}
    total = sum(entries[path] * shape.heads for path, shape in header.attention.items())
    frozen = sum(entries[path] * len(heads) for path, heads in header.freezing.heads.items())
    assert header.freezing.sparsity == frozen / total
    live = [path for path, shape in header.attention.items() if len(header.freezing.heads.get(path, [])) < shape.heads]
    assert all(frozen + entries[path] > 0.4 * total for path in live), "something still fits"


@pytest.mark.parametrize("score", ["entropy", "row-entropy", "variance", "random"])
def test_every_score_ranks_the_heads(spec: ModelSpec, source: ImageSource, tmp_path: Path, score: Any) -> None:
    options = FreezeOptions(sparsity=0.34, score=score, bins=8, spacing="squared", seed=5)
    header = freeze(spec, source, tmp_path / "x.eam.safetensors", options)
    values = header.freezing.scores
    frozen = [values[path][head] for path, heads in header.freezing.heads.items() for head in heads]
    everything = sorted(value for path in PATHS for value in values[path])
    assert len(set(everything)) == 6
    assert sorted(frozen) == everything[:2]


def test_the_same_input_gives_the_same_bytes_and_another_half_another_checkpoint(
    spec: ModelSpec, source: ImageSource, tmp_path: Path
) -> None:
    files = []
    for index, split in enumerate(("even", "even", "odd")):
        files.append(tmp_path / f"{index}.eam.safetensors")
        freeze(spec, replace(source, split=split), files[-1], FAST)  # type: ignore[arg-type]
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other
    digests = [checkpoints.load(file).header.calibration for file in files]
    assert digests[0] is not None and digests[2] is not None
    assert digests[0].n_images == digests[2].n_images == 12 and digests[0].digest != digests[2].digest


def test_everything_from_random_weights_says_so(source: ImageSource, tmp_path: Path) -> None:
    random = ModelSpec(NAME, "random", KWARGS, seed=2)
    assert freeze(random, source, tmp_path / "x.eam.safetensors", FAST).weights == "random"
    assert analyze(random, source, FAST).weights == "random"
    assert checkpoints.load(tmp_path / "x.eam.safetensors").header.weights == "random"


def test_bad_picture_is_an_error_or_named_counted_and_left_out(spec: ModelSpec, tmp_path: Path) -> None:
    files = draw_pictures(tmp_path / "some", 6)
    files[2].write_bytes(files[2].read_bytes()[:60])
    output = tmp_path / "x.eam.safetensors"
    with pytest.raises(ConfigError, match=r"cannot use image \S*some/002\.png: .*--skip-bad"):
        freeze(spec, ImageSource(tmp_path / "some"), output, FAST)
    assert not output.exists()
    notebook = Notebook()
    header = freeze(spec, ImageSource(tmp_path / "some", skip_bad=True), output, FAST, observer=notebook)
    assert header.calibration is not None and header.calibration.n_images == 5
    (note,) = notebook.notes
    assert note.startswith("skipped 002.png: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (replace(FAST, sparsity=1.01), r"sparsity; expected a number in \[0, 1\]; got 1\.01"),
        (replace(FAST, sparsity=-0.1), r"sparsity; expected a number in \[0, 1\]; got -0\.1"),
        (replace(FAST, sparsity=float("nan")), r"sparsity; expected a number in \[0, 1\]; got nan"),
        (replace(FAST, score="beauty"), "unknown score; expected one of sensitivity.*; got beauty"),  # type: ignore[arg-type]
        (replace(FAST, score_images=0), r"number of images; expected at least 1; got 0"),
        (replace(FAST, bits=5), r"width of codes; expected bits of \(2, 3, 4, 8\); got 5"),  # type: ignore[arg-type]
        (replace(FAST, granularity="column"), "unknown granularity; expected one of head, row, entry; got column"),  # type: ignore[arg-type]
        (replace(FAST, window_maps="all"), "unknown window maps; expected one of shared, class, window; got all"),  # type: ignore[arg-type]
        (replace(FAST, granularity="entry"), "row-entropy cannot rank entries; expected sensitivity, entropy"),
        (replace(FAST, quantizer="cubed"), "unknown quantizer; expected one of uniform, squared; got cubed"),  # type: ignore[arg-type]
    ],
)
def test_bad_options_fail_before_anything_is_read(
    source: ImageSource, tmp_path: Path, options: FreezeOptions, message: str
) -> None:
    unread = ModelSpec(NAME, str(tmp_path / "missing.safetensors"), KWARGS)
    with pytest.raises(ConfigError, match=message):
        freeze(unread, source, tmp_path / "x.eam.safetensors", options)


def test_output_that_cannot_be_written_fails_before_the_images_are_read(spec: ModelSpec, tmp_path: Path) -> None:
    nowhere = ImageSource(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"cannot write .*x\.eam.*; expected an existing folder"):
        freeze(spec, nowhere, tmp_path / "no" / "x.eam.safetensors", FAST)
    with pytest.raises(ConfigError, match=r"cannot write .*; got an existing folder"):
        pack(spec, {}, tmp_path, bits=4, quantizer="squared")


def test_output_never_replaces_the_weights(tiny_weights: Path, source: ImageSource, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(tiny_weights.read_bytes())
    spec = ModelSpec(NAME, str(weights), KWARGS)
    with pytest.raises(ConfigError, match=r"w\.safetensors would replace the input"):
        freeze(spec, source, weights, FAST)
    with pytest.raises(ConfigError, match=r"w\.safetensors would replace the input"):
        pack(spec, {}, weights, bits=4, quantizer="squared")
    assert weights.read_bytes() == tiny_weights.read_bytes()


def test_wrong_number_of_class_names_fails_before_the_images_are_read(spec: ModelSpec, tmp_path: Path) -> None:
    nowhere = ImageSource(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"class names.*expected 10 names; got 2"):
        freeze(spec, nowhere, tmp_path / "x.eam.safetensors", FAST, class_names=["a", "b"])
    with pytest.raises(ConfigError, match=r"class names.*expected 10 names; got 2"):
        pack(spec, {}, tmp_path / "x.eam.safetensors", bits=4, quantizer="squared", class_names=["a", "b"])


def test_pictures_of_another_shape_and_mode_are_fine(spec: ModelSpec, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "some", 2)
    Image.new("L", (70, 20), 99).save(tmp_path / "some" / "gray.png")
    header = freeze(spec, ImageSource(tmp_path / "some"), tmp_path / "x.eam.safetensors", FAST)
    assert header.calibration is not None and header.calibration.n_images == 3


# --- analyze ---------------------------------------------------------------------------------------------------------


def test_analysis_has_every_score_and_what_freeze_would_take(
    spec: ModelSpec, source: ImageSource, tmp_path: Path
) -> None:
    options = FreezeOptions(sparsity=0.5, score="sensitivity", score_images=4)
    result = analyze(spec, source, options)
    header = freeze(spec, source, tmp_path / "x.eam.safetensors", options)
    assert set(result.scores) == {"sensitivity", "entropy", "row-entropy", "variance"}
    assert all([len(values[path]) for path in PATHS] == [3, 3] for values in result.scores.values())
    assert result.scores["sensitivity"] == header.freezing.scores
    assert (result.frozen, result.sparsity) == (header.freezing.heads, header.freezing.sparsity)
    assert (result.calibration, result.preprocessing) == (header.calibration, header.preprocessing)
    assert Analysis.parse(result.model_dump_json(), "analysis") == result


@pytest.mark.parametrize("granularity", ["row", "entry"])
def test_analysis_of_rows_and_entries_gives_means_of_heads_and_frozen_shares(
    spec: ModelSpec, source: ImageSource, tmp_path: Path, granularity: Granularity
) -> None:
    options = FreezeOptions(sparsity=0.3, score="variance", granularity=granularity)
    result = analyze(spec, source, options)
    header = freeze(spec, source, tmp_path / "x.eam.safetensors", options)
    heads = analyze(spec, source, replace(options, granularity="head"))
    for path, values in heads.scores["variance"].items():
        np.testing.assert_allclose(result.scores["variance"][path], values, rtol=1e-9)
    assert (result.granularity, result.window_maps) == (granularity, None)
    assert (result.frozen, result.scores["variance"]) == (header.freezing.heads, header.freezing.scores)
    assert result.shares == read_shares(tmp_path / "x.eam.safetensors")
    assert sum(sum(shares) for shares in result.shares.values()) / 6 == pytest.approx(result.sparsity)
    assert set(heads.shares) == set(heads.frozen) and {1.0} == {x for shares in heads.shares.values() for x in shares}


def test_bins_and_spacing_reach_the_entropy_and_nothing_else(spec: ModelSpec, source: ImageSource) -> None:
    options = FreezeOptions(score="entropy")
    plain = analyze(spec, source, options).scores
    for changed in (replace(options, bins=4), replace(options, spacing="squared")):
        scores = analyze(spec, source, changed).scores
        assert scores["entropy"] != plain["entropy"]
        assert {**scores, "entropy": None} == {**plain, "entropy": None}


def test_overrides_reach_preprocessing_and_maps(spec: ModelSpec, source: ImageSource) -> None:
    plain = analyze(spec, source, FAST)
    changed = analyze(spec, source, FAST, overrides=PreprocessingOverrides(mean=(0, 0, 0), crop_pct=1.0))
    assert (changed.preprocessing.mean, changed.preprocessing.crop_pct) == ((0, 0, 0), 1.0)
    assert changed.scores != plain.scores


# --- pack ------------------------------------------------------------------------------------------------------------


def some_maps(modules: dict[str, list[int]], tokens: int = TOKENS) -> dict[str, FrozenMaps]:
    rng = np.random.default_rng(0)
    packed = {}
    for path, heads in modules.items():
        maps = rng.dirichlet(np.full(tokens, 0.3), (len(heads), tokens))
        packed[path] = FrozenMaps(np.array(heads), *quantize_rows(maps, 4, "squared"))
    return packed


def test_pack_keeps_given_maps_as_they_are(spec: ModelSpec, tmp_path: Path) -> None:
    maps = some_maps({"blocks.1.attn": [0, 2]})
    header = pack(spec, maps, tmp_path / "x.eam.safetensors", bits=4, quantizer="squared")
    loaded = checkpoints.load(tmp_path / "x.eam.safetensors")
    assert loaded.header == header
    assert (header.freezing.score, header.freezing.sparsity_asked, header.calibration) == ("given", None, None)
    assert header.freezing.sparsity == pytest.approx(2 / 6)
    assert header.freezing.heads == {"blocks.1.attn": [0, 2]}
    np.testing.assert_array_equal(loaded.frozen["blocks.1.attn"].codes, maps["blocks.1.attn"].codes)
    np.testing.assert_array_equal(loaded.frozen["blocks.1.attn"].scales, maps["blocks.1.attn"].scales)


@pytest.mark.parametrize(
    ("maps", "kind", "message"),
    [
        (some_maps({"blocks.2.attn": [0]}), ConfigError, r"no attention module blocks\.2\.attn; .*blocks\.1\.attn"),
        (some_maps({"blocks.0.attn": [3]}), CheckpointError, r"blocks\.0\.attn\.heads; .*in 0…2; got \[3\]"),
        (some_maps({"blocks.0.attn": [1]}, tokens=16), CheckpointError, r"\[1, 17, 17\]; got uint8 \[1, 16, 16\]"),
    ],
    ids=["module", "head", "tokens"],
)
def test_maps_that_do_not_fit_the_model_are_refused(
    spec: ModelSpec, tmp_path: Path, maps: dict[str, FrozenMaps], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        pack(spec, maps, tmp_path / "x.eam.safetensors", bits=4, quantizer="squared")
    assert list(tmp_path.iterdir()) == []


# --- rows and entries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["sensitivity", "entropy", "variance", "random"])
@pytest.mark.parametrize("granularity", ["row", "entry"])
def test_the_lowest_scoring_pieces_are_frozen_to_their_quantized_means(
    spec: ModelSpec, source: ImageSource, tmp_path: Path, granularity: Granularity, score: Any
) -> None:
    options = FreezeOptions(sparsity=0.35, granularity=granularity, score=score, bits=8, seed=3)
    header = freeze(spec, source, tmp_path / "x.eam.safetensors", options)
    loaded = checkpoints.load(tmp_path / "x.eam.safetensors")
    per_map = TOKENS if granularity == "row" else TOKENS**2
    pieces = {path: np.zeros((3, *[TOKENS] * (1 if granularity == "row" else 2)), np.bool_) for path in PATHS}
    means = mean_maps(spec, source)
    for path, item in loaded.frozen.items():
        assert item.mask is not None
        pieces[path][item.heads] = item.mask
        error = np.abs(item.maps("squared") - means[path][item.heads])[item.frozen()]
        assert error.max() < 0.004
    assert sum(int(each.sum()) for each in pieces.values()) == int(0.35 * 6 * per_map)
    assert header.freezing.sparsity == int(0.35 * 6 * per_map) / (6 * per_map)
    assert header.freezing.granularity == granularity and header.freezing.window_maps is None
    model, batches = input_batches(spec, source)
    sites = attention_sites(model)
    statistics = collect_statistics(model, sites, batches, bins=16, spacing="uniform", on_images=lambda _: None)
    if score == "sensitivity":
        means = {site.path: means_of(site, statistics[site.path]) for site in sites}
        scores = fisher_sensitivity(model, sites, means, batches, granularity, lambda _: None, seed=3)
    else:
        scores = score_pieces(statistics, score, granularity, seed=3)
    frozen_scores, live_scores = (
        np.concatenate([scores[path][pieces[path] == frozen] for path in PATHS]) for frozen in (True, False)
    )
    assert frozen_scores.max() <= live_scores.min() * (1 + 1e-4)
    for path, values in header.freezing.scores.items():
        np.testing.assert_allclose(values, scores[path].reshape(3, -1).mean(axis=1), rtol=1e-4)


def test_rows_that_only_the_class_token_outlives_are_free(spec: ModelSpec, source: ImageSource, tmp_path: Path) -> None:
    options = FreezeOptions(sparsity=0.47, granularity="row", score_images=8)  # 16 of 17 rows of half of the heads
    freeze(spec, source, tmp_path / "x.eam.safetensors", options)
    loaded = checkpoints.load(tmp_path / "x.eam.safetensors")
    assert set(loaded.frozen) == {"blocks.1.attn"}
    models = [load_reference(loaded, frozen=frozen, where="x").model for frozen in (True, False)]
    _, batches = input_batches(spec, source)
    with torch.inference_mode():
        torch.testing.assert_close(models[0](batches[0]), models[1](batches[0]), atol=1e-6, rtol=0)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def swin(tmp_path: Path) -> ModelSpec:
    weights = save_weights(make_model(SWIN_NAME), tmp_path / "swin.safetensors")
    return ModelSpec(SWIN_NAME, str(weights), SWIN_KWARGS)


@pytest.mark.parametrize("granularity", ["head", "row", "entry"])
@pytest.mark.parametrize("mode", ["shared", "class", "window"])
def test_windows_share_frozen_maps_as_asked(
    swin: ModelSpec, source: ImageSource, tmp_path: Path, mode: WindowMaps, granularity: Granularity
) -> None:
    output = tmp_path / "x.eam.safetensors"
    options = FreezeOptions(sparsity=0.6, score="variance", bits=8, granularity=granularity, window_maps=mode)
    header = freeze(swin, replace(source, limit=6), output, options)
    loaded = checkpoints.load(output)
    assert (header.freezing.window_maps, header.freezing.granularity) == (mode, granularity)
    model, batches = input_batches(swin, replace(source, limit=6))
    maps: dict[str, list[torch.Tensor]] = {path: [] for path in SWIN_PATHS}
    sites = attention_sites(model)
    with torch.inference_mode(), tapped_maps(model, sites, lambda path, batch: maps[path].append(batch)):
        for batch in batches:
            model(batch)
    entries = 0
    for site in sites:
        used = window_maps(site, mode)
        assert used is not None and header.attention[site.path].windows == list(used)
        item = loaded.frozen.get(site.path)
        if item is None:
            continue
        by_image = torch.cat(maps[site.path]).view(6, site.n_windows, site.heads, site.tokens, site.tokens)
        for number in set(used):
            windows = [window for window, each in enumerate(used) if each == number]
            mean = by_image[:, windows].double().mean(dim=(0, 1)).numpy()[item.heads]
            frozen = item.frozen()
            error = np.abs(item.maps("squared")[:, number] - mean)[frozen]
            assert error.max() < 0.004
        entries += item.frozen_entries * site.n_windows
    assert entries / (16**2 * (2 * 4 + 2 * 4 + 4 + 4)) == header.freezing.sparsity <= 0.6
    live, changed = (load_reference(loaded, frozen=frozen, where="x").model for frozen in (False, True))
    with torch.inference_mode():
        assert torch.equal(live(batches[0]), model(batches[0]))
        assert not torch.allclose(changed(batches[0]), live(batches[0]), atol=1e-3)


def test_every_window_map_differs_but_shares_its_mask(swin: ModelSpec, source: ImageSource, tmp_path: Path) -> None:
    options = FreezeOptions(sparsity=1, score="random", bits=8, window_maps="class")
    freeze(swin, replace(source, limit=4), tmp_path / "x.eam.safetensors", options)
    maps = checkpoints.load(tmp_path / "x.eam.safetensors").frozen["layers.0.blocks.1.attn"].maps("squared")
    assert maps.shape == (2, 4, 16, 16)
    assert all(np.abs(maps[:, i] - maps[:, j]).max() > 0.1 for i in range(4) for j in range(i))
    masks = make_model(SWIN_NAME).layers[0].blocks[1].attn_mask.numpy() != 0
    assert all((maps[:, i][:, masks[i]] == 0).all() for i in range(4)), "a frozen map never looks where its class can't"


def test_images_and_not_windows_are_counted(swin: ModelSpec, source: ImageSource, tmp_path: Path) -> None:
    for mode in ("shared", "class", "window"):
        options = FreezeOptions(score="entropy", window_maps=mode)
        result = analyze(swin, replace(source, limit=5), options)
        assert (result.calibration.n_images, result.window_maps) == (5, mode)
        assert [len(values) for values in result.scores["entropy"].values()] == [2, 2, 4, 4]


@pytest.mark.parametrize("granularity", ["head", "row", "entry"])
@pytest.mark.parametrize("mode", ["shared", "class", "window"])
def test_pack_finds_out_granularity_and_window_maps(
    swin: ModelSpec, source: ImageSource, tmp_path: Path, mode: WindowMaps, granularity: Granularity
) -> None:
    options = FreezeOptions(sparsity=0.9, score="random", granularity=granularity, window_maps=mode)
    frozen = freeze(swin, replace(source, limit=2), tmp_path / "a.eam.safetensors", options)
    maps = checkpoints.load(tmp_path / "a.eam.safetensors").frozen
    packed = pack(swin, maps, tmp_path / "b.eam.safetensors", bits=4, quantizer="squared")
    for name in ("granularity", "window_maps", "sparsity", "heads"):
        assert getattr(packed.freezing, name) == getattr(frozen.freezing, name)
    assert packed.attention == frozen.attention
    again = checkpoints.load(tmp_path / "b.eam.safetensors").frozen
    for path, item in maps.items():
        np.testing.assert_array_equal(again[path].maps("squared"), item.maps("squared"))
        np.testing.assert_array_equal(again[path].frozen(), item.frozen())


# --- every kind of model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*FAMILY, *SWIN_FAMILY])
def test_every_kind_of_model_freezes_and_comes_back(kind: str, source: ImageSource, tmp_path: Path) -> None:
    name, changes = {**FAMILY, **SWIN_FAMILY}[kind]
    base = KWARGS if kind in FAMILY else SWIN_KWARGS
    model = make_member(kind)
    weights = save_weights(model, tmp_path / "w.safetensors")
    output = tmp_path / "x.eam.safetensors"
    header = freeze(ModelSpec(name, str(weights), {**base, **changes}), replace(source, limit=3), output, FAST)
    loaded = checkpoints.load(output)
    live = load_reference(loaded, frozen=False, where="x").model
    frozen = load_reference(loaded, frozen=True, where="x").model
    shape = (2, 3, *header.preprocessing.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(live(images), model(images))
        assert not torch.allclose(frozen(images), live(images), atol=1e-3)


def test_of_two_proposed_sets_the_one_that_costs_less_is_frozen(
    spec: ModelSpec, source: ImageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever order the sets come in; and the analysis says the same."""
    proposed = [
        Selection({"blocks.0.attn": np.array([True, True, False])}, 1 / 3, 0.4),
        Selection({"blocks.1.attn": np.array([False, True, True])}, 1 / 3, 0.4),
    ]
    options, costs = FreezeOptions(0.4), {}
    for index, order in enumerate((proposed[:1], proposed[1:], proposed, proposed[::-1])):
        monkeypatch.setattr(PieceScores, "selections", lambda *_, order=order: order)
        freezing = freeze(spec, source, tmp_path / "x.eam.safetensors", options).freezing
        assert freezing.cost is not None
        costs[index] = (freezing.cost.kl, freezing.heads)
        assert analyze(spec, source, options).frozen == freezing.heads
    assert costs[0][0] != costs[1][0]
    assert costs[2] == costs[3] == min(costs[0], costs[1])
