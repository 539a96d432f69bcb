from __future__ import annotations

from dataclasses import fields, replace

import pytest

from eamdeploy.engines.trt.versions import Capabilities, TrtVersion, capabilities
from eamdeploy.errors import ConfigError


def of(text: str) -> TrtVersion:
    return TrtVersion.parse(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("8.6", (8, 6)),
        (" 10.3.0\n", (10, 3, 0)),
        ("10.3.0.30", (10, 3, 0, 30)),
        ("8.6.0.post12.dev1", (8, 6, 0)),
        ("8.6.2.3-1+cuda12.2", (8, 6, 2, 3)),
        ("11.4.0rc1", (11, 4, 0)),
    ],
)
def test_versions_are_read_as_exact_as_they_are_given(text: str, parts: tuple[int, ...]) -> None:
    assert of(text).parts == parts
    assert str(of(text)) == ".".join(map(str, parts))
    assert of(text).major == parts[0]


@pytest.mark.parametrize("text", ["", "8", "eight", "v8.6", "8.x", "8.", ".6", "-8.6", "8,6", "٨.٦"])
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no version of TensorRT.*numbers like 8\.6"):
        of(text)


def test_versions_have_an_order() -> None:
    spelled = ["8.5", "8.5.2", "8.5.2.2", "8.5.3", "8.6", "10.0", "10.3", "10.14", "11.4.1"]
    assert sorted(map(of, reversed(spelled))) == [of(text) for text in spelled]
    assert of("8.6") == of("8.6") and len({of("8.6"), of("8.6"), of("8.6.0")}) == 2


@pytest.mark.parametrize(
    ("text", "since", "reached"),
    [
        ("8.5", (8, 5, 3), True),  # its last release
        ("8.5.2", (8, 5, 3), False),
        ("8.5.3", (8, 5, 3), True),
        ("8.6", (8, 5, 3), True),
        ("8.6.0", (8, 6), True),
        ("10.3", (10, 14), False),
        ("11.0", (10, 14), True),
        ("8.4.9", (8, 5), False),
    ],
)
def test_what_came_with_a_version_is_in_later_ones(text: str, since: tuple[int, ...], reached: bool) -> None:
    assert of(text).reaches(*since) is reached


OLD = Capabilities(max_opset=17)
V8_6 = replace(OLD, int8_constants=True, layer_normalization=True, version_compatible=True)
V10_0 = replace(
    V8_6,
    max_opset=20,
    gelu=True,
    integer_maps=True,
    expanded_tokens=True,
    optional_zero_point=True,
    half_scales=True,
    int4=True,
    int64=True,
    explicit_batch="ignored",
    strongly_typed="optional",
    bf16_flag=True,
)
V10_3 = replace(V10_0, device_memory="device_memory_size_v2")
V10_16 = replace(V10_3, int4_any_rank=True, attention=True, max_opset=24)
V11 = replace(
    V10_16,
    explicit_batch="gone",
    strongly_typed="always",
    precision_flags=False,
    bf16_flag=False,
    layer_precision=False,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.5.2.2", OLD),
        ("8.5", replace(OLD, int8_constants=True)),
        ("8.6", V8_6),
        ("8.6.2.3", V8_6),
        ("10.0", V10_0),
        ("10.3", V10_3),
        ("10.3.0.30", V10_3),
        ("10.14", replace(V10_16, max_opset=23)),
        ("10.16.2", V10_16),
        ("11.0", V11),
        ("11.4", V11),
    ],
)
def test_every_generation_can_what_nvidia_says(text: str, expected: Capabilities) -> None:
    """The rows of docs/tensorrt.md, and what 8.6.0 could not on a GPU."""
    assert capabilities(of(text)) == expected


@pytest.mark.parametrize("text", ["8.4", "8.4.3", "8.2.1", "7.1"])
def test_before_8_5_nothing_is_supported(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"TensorRT {text} is not supported.*8\.5 or newer.*JetPack 5\.1"):
        capabilities(of(text))


def test_every_capability_differs_somewhere() -> None:
    known = [capabilities(of(text)) for text in ("8.5.2", "8.5", "8.6", "10.0", "10.3", "10.16", "11.4")]
    for field in fields(Capabilities):
        assert len({getattr(each, field.name) for each in known}) > 1, field.name
