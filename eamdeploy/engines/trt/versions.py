"""What each generation of TensorRT can do: one table, asked by the builder, the linter and the graph's flavour.

Nothing here imports tensorrt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from eamdeploy.errors import ConfigError

_SPELLING = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:[.+a-z-].*)?", re.ASCII)


@dataclass(frozen=True, order=True)
class TrtVersion:
    """A version of TensorRT, as exact as it was given.

    Attributes:
        parts: two to four numbers, e.g. `(8, 6)` or `(10, 3, 0, 30)`.
    """

    parts: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> TrtVersion:
        """The version that `text` spells, e.g. `8.6`, `10.3.0.30` or `8.6.0.post12.dev1` (the suffix is dropped).

        Raises:
            ConfigError: it spells none.
        """
        found = _SPELLING.fullmatch(text.strip())
        if found is None:
            raise ConfigError(
                "no version of TensorRT", expected="numbers like 8.6 or 10.3.0", got=text, hint="Give at least two."
            )
        return cls(tuple(int(part) for part in found.groups() if part is not None))

    @property
    def major(self) -> int:
        return self.parts[0]

    def reaches(self, *since: int) -> bool:
        """Whether what came with version `since` is in this one; `8.5` stands for its last release, 8.5.3."""
        return self.parts >= since[: len(self.parts)]

    def __str__(self) -> str:
        return ".".join(map(str, self.parts))


@dataclass(frozen=True)
class Capabilities:
    """What a generation of TensorRT has.

    The ONNX parser:
        max_opset: newest operator set it knows.
        layer_normalization, gelu, attention: whether it knows these operators.
        int8_constants: INT8 initializers in front of DequantizeLinear.
        integer_maps: such a constant builds as a frozen map in FP16 too. On an H100 without cuBLAS, 8.6.0 built it in
            FP32 alone ("Assertion params.weights.type() != DataType::kINT8 failed"; docs/results/gpu.md). 10 and
            later were not tried.
        expanded_tokens: joins tokens with one that was repeated for as many images as another tensor has. 8.6.0 refused
            it ("error while computing output extent"). 10 and later were not tried.
        optional_zero_point: DequantizeLinear with two inputs.
        half_scales: FP16 and BF16 scales (from opset 19), not FP32 alone.
        int4: INT4 constants, symmetric, in blocks (from opset 21).
        int4_any_rank: … of other than two axes.
        int64: its own type, not INT32 in disguise.

    The network and the builder's configuration:
        explicit_batch: whether the network needs that flag, ignores it, or does not know it.
        strongly_typed: whether types in the ONNX file are hints, decide if asked for, or always decide.
        precision_flags: FP16 and INT8 builder flags; `bf16_flag`: BF16.
        layer_precision: precision of single layers, OBEY/PREFER_PRECISION_CONSTRAINTS.
        version_compatible: VERSION_COMPATIBLE, hardware_compatibility_level and builder_optimization_level.

    The engine:
        device_memory: the engine's attribute that tells the bytes it needs on the device.
    """

    max_opset: int
    layer_normalization: bool = False
    gelu: bool = False
    attention: bool = False
    int8_constants: bool = False
    integer_maps: bool = False
    expanded_tokens: bool = False
    optional_zero_point: bool = False
    half_scales: bool = False
    int4: bool = False
    int4_any_rank: bool = False
    int64: bool = False
    explicit_batch: Literal["required", "ignored", "gone"] = "required"
    strongly_typed: Literal["never", "optional", "always"] = "never"
    precision_flags: bool = True
    bf16_flag: bool = False
    layer_precision: bool = True
    version_compatible: bool = False
    device_memory: Literal["device_memory_size", "device_memory_size_v2"] = "device_memory_size"


OLDEST = (8, 5)

# Since when; a line keeps what it does not name. Source: docs/tensorrt.md (NVIDIA's headers, changelogs and library).
_CHANGES: tuple[tuple[tuple[int, ...], dict[str, object]], ...] = (
    ((8, 5, 3), {"int8_constants": True}),
    ((8, 6), {"layer_normalization": True, "version_compatible": True}),
    (
        (10, 0),
        {
            "max_opset": 20,
            "gelu": True,
            "integer_maps": True,
            "expanded_tokens": True,
            "optional_zero_point": True,
            "half_scales": True,
            "int4": True,
            "int64": True,
            "explicit_batch": "ignored",
            "strongly_typed": "optional",
            "bf16_flag": True,
        },
    ),
    ((10, 1), {"device_memory": "device_memory_size_v2"}),
    ((10, 4), {"int4_any_rank": True}),
    ((10, 14), {"attention": True, "max_opset": 23}),
    ((10, 15), {"max_opset": 24}),
    (
        (11, 0),
        {
            "explicit_batch": "gone",
            "strongly_typed": "always",
            "precision_flags": False,
            "bf16_flag": False,
            "layer_precision": False,
        },
    ),
)


def capabilities(version: TrtVersion) -> Capabilities:
    """What `version` has.

    Raises:
        ConfigError: it is older than 8.5, the TensorRT of JetPack 5.
    """
    if not version.reaches(*OLDEST):
        raise ConfigError(
            f"TensorRT {version} is not supported",
            expected="8.5 or newer",
            got=version,
            hint="8.5.2 comes with JetPack 5.1, 8.6.2 with JetPack 6.0, 10.3 with JetPack 6.1.",
        )
    result = Capabilities(max_opset=17)
    for since, changes in _CHANGES:
        if version.reaches(*since):
            result = replace(result, **changes)  # type: ignore[arg-type]
    return result
