"""What the builder is asked, for every generation and option, without TensorRT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eamdeploy.engines.trt.request import BatchRange, BuilderRequest, ModelFacts, TrtOptions, make_request
from eamdeploy.engines.trt.versions import TrtVersion
from eamdeploy.errors import ConfigError

FACTS = ModelFacts("image", (None, 3, 8, 8), (("Conv", "stem"),), dequantizes=True, quantizes=False)
FIXED = replace(FACTS, input_shape=(2, 3, 8, 8))
FP16 = TrtOptions(precision="fp16")


def ask(version: str, options: TrtOptions = TrtOptions(), facts: ModelFacts = FACTS) -> BuilderRequest:  # noqa: B008
    return make_request(TrtVersion.parse(version), options, facts, [])


@pytest.mark.parametrize(
    ("version", "network", "flags"),
    [
        ("8.5.2", ["EXPLICIT_BATCH"], ["FP16", "INT8"]),
        ("8.6", ["EXPLICIT_BATCH"], ["FP16", "INT8"]),
        ("10.3", [], ["FP16", "INT8"]),
        ("10.16", [], ["FP16", "INT8"]),
        ("11.4", [], []),
    ],
)
def test_fp16_is_flags_and_layers_below_11_and_the_models_types_from_11(
    version: str, network: list[str], flags: list[str]
) -> None:
    request = ask(version, FP16)
    assert (request.network_flags, request.set_flags, request.cleared_flags) == (network, flags, [])
    assert request.strongly_typed is (version == "11.4")
    assert request.fp32_layers == []
    kept = ask(version, replace(FP16, keep_fp32="norm-softmax"))
    assert kept.fp32_layers == ([] if version == "11.4" else ["normalization", "softmax"])
    assert kept.set_flags == [*flags, *([] if version == "11.4" else ["OBEY_PRECISION_CONSTRAINTS"])]


def test_fp32_engine_computes_no_products_in_tf32() -> None:
    for version in ("8.6", "10.3", "11.4"):
        request = ask(version)
        assert request.cleared_flags == ["TF32"] and request.fp32_layers == []
        assert request.set_flags == ([] if version == "11.4" else ["INT8"])


def test_int8_flag_follows_the_models_dequantize_nodes() -> None:
    assert ask("10.3", FP16, replace(FACTS, dequantizes=False)).set_flags == ["FP16"]


@pytest.mark.parametrize(
    ("keep", "layers", "obey"),
    [("norm-softmax", ["normalization", "softmax"], True), ("norm", ["normalization"], True), ("none", [], False)],
)
def test_what_stays_fp32_can_be_chosen(keep: str, layers: list[str], obey: bool) -> None:
    request = ask("8.6", TrtOptions(precision="fp16", keep_fp32=keep))  # type: ignore[arg-type]
    assert request.fp32_layers == layers and request.settings()["keep_fp32"] == keep
    assert ("OBEY_PRECISION_CONSTRAINTS" in request.set_flags) is obey


@pytest.mark.parametrize(("decomposed", "kept", "layers"), [(True, "norm", ["normalization"]), (False, "none", [])])
def test_by_default_layer_norms_that_are_spelled_out_stay_fp32(decomposed: bool, kept: str, layers: list[str]) -> None:
    facts = replace(FACTS, decomposed_norms=decomposed)
    for version in ("8.5", "8.6", "10.3"):
        request = ask(version, FP16, facts)
        assert (request.keep_fp32, request.fp32_layers) == (kept, layers)
    assert (ask("11.4", FP16, facts).keep_fp32, ask("11.4", FP16, facts).fp32_layers) == (kept, [])
    assert ask("8.6", TrtOptions(), facts).keep_fp32 is None


def test_bf16_is_for_10_alone() -> None:
    bf16 = TrtOptions(precision="bf16")
    assert ask("10.3", bf16).set_flags == ["BF16", "INT8"]
    for version in ("8.6", "11.4"):
        with pytest.raises(ConfigError, match=rf"TensorRT {version} can't make a BF16.*--fp16"):
            ask(version, bf16)


def test_int8_needs_quantized_activations() -> None:
    with pytest.raises(ConfigError, match=r"--int8 needs a model.*expected QuantizeLinear.*got none"):
        ask("10.3", TrtOptions(int8=True))
    request = ask("10.3", TrtOptions(int8=True, precision="fp16"), replace(FACTS, quantizes=True))
    assert request.int8 and "INT8" in request.set_flags and "FP16" in request.set_flags


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (TrtOptions(version_compatible=True), "--version-compatible"),
        (TrtOptions(hardware_compatible=True), "--hardware-compatible"),
        (TrtOptions(builder_level=0), "--builder-level"),
    ],
)
def test_options_that_came_with_8_6(options: TrtOptions, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} can't be used.*8\.6.*8\.5\.2"):
        ask("8.5.2", options)
    request = ask("8.6", options)
    assert request.version_compatible is options.version_compatible
    assert request.hardware_compatibility_level == ("AMPERE_PLUS" if options.hardware_compatible else None)
    assert request.builder_optimization_level == options.builder_level


@pytest.mark.parametrize(
    ("asked", "batch"),
    [
        ((None, None, None), (1, 1, 8)),
        ((None, 4, None), (1, 4, 8)),
        ((None, 32, None), (1, 32, 32)),
        ((2, None, None), (2, 2, 8)),
        ((None, None, 2), (1, 1, 2)),
        ((2, 3, 4), (2, 3, 4)),
    ],
)
def test_batch_range_of_a_dynamic_model(
    asked: tuple[int | None, int | None, int | None], batch: tuple[int, int, int]
) -> None:
    request = ask("10.3", TrtOptions(min_batch=asked[0], opt_batch=asked[1], max_batch=asked[2]))
    assert request.batch == BatchRange(min=batch[0], opt=batch[1], max=batch[2])
    assert request.shapes == {"image": [[size, 3, 8, 8] for size in batch]}


@pytest.mark.parametrize("asked", [(4, 2, None), (None, 4, 2), (9, None, 4)])
def test_batch_sizes_out_of_order_are_refused(asked: tuple[int | None, int | None, int | None]) -> None:
    with pytest.raises(ConfigError, match="min <= opt <= max"):
        ask("10.3", TrtOptions(min_batch=asked[0], opt_batch=asked[1], max_batch=asked[2]))


def test_fixed_batch_has_no_profile_and_takes_no_range() -> None:
    request = ask("10.3", facts=FIXED)
    assert request.batch is None and request.shapes == {}
    with pytest.raises(ConfigError, match=r"--max-batch need a model with a dynamic batch.*fixed batch of 2"):
        ask("10.3", TrtOptions(max_batch=4), FIXED)


@pytest.mark.parametrize(
    ("options", "name"), [({"builder_level": 6}, "builder-level"), ({"workspace_bytes": 0}, "work")]
)
def test_numbers_out_of_range_are_refused(options: dict[str, int], name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name}"):
        ask("10.3", TrtOptions(**options))  # type: ignore[arg-type]


def test_version_before_8_5_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"8\.2 is not supported"):
        ask("8.2")


def test_request_is_json_and_its_settings_are_flat_text_without_what_is_empty() -> None:
    options = TrtOptions(precision="fp16", workspace_bytes=1 << 30, timing_cache=Path("t.cache"), cuda_graph=True)
    request = ask("8.6", options, replace(FACTS, decomposed_norms=True))
    assert BuilderRequest.parse(request.model_dump_json(), "test") == request
    assert request.settings() == {
        "precision": "fp16",
        "keep_fp32": "norm",
        "network_flags": "EXPLICIT_BATCH",
        "set_flags": "FP16,INT8,OBEY_PRECISION_CONSTRAINTS",
        "fp32_layers": "normalization",
        "shapes.image": "[[1, 3, 8, 8], [1, 3, 8, 8], [8, 3, 8, 8]]",
        "memory_pools.WORKSPACE": str(1 << 30),
        "profiling_verbosity": "DETAILED",
        "cuda_graph": "True",
    }
