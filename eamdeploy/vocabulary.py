"""The words that the command line, the configuration file, records and functions share.

Each word has its values, what they mean, and the type that checks them. A default stands in the record of options that
has the word as a field.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

Granularity: TypeAlias = Literal["head", "row", "entry"]
"""What is frozen as one piece: a head's whole map, the row of one query, or one entry of a row."""

WindowMaps: TypeAlias = Literal["shared", "class", "window"]
"""Which windows of a Swin share a frozen map: all of them, those with the same shift mask, or none."""

Score: TypeAlias = Literal["sensitivity", "entropy", "row-entropy", "variance", "random"]
"""What freezing is chosen by; the pieces with the lowest score for each entry are frozen first.

- `sensitivity`: KL divergence of the logits with the piece frozen, in nats; estimated for rows and entries
- `entropy`: entropy of the histogram of each entry over the images, in nats (arXiv 2508.16311)
- `row-entropy`: entropy of each row as a distribution over the keys, in nats
- `variance`: variance of each entry over the images
- `random`: a seeded number, to compare with
"""

MapScore: TypeAlias = Literal["entropy", "row-entropy", "variance", "random"]
"""The scores that follow from the statistics of the maps alone."""

Bits: TypeAlias = Literal[2, 3, 4, 8]
"""Bits of a code of a frozen map."""

Quantizer: TypeAlias = Literal["uniform", "squared"]
"""What a code of a frozen map stands for: scale · code, or scale · code²."""

Spacing: TypeAlias = Literal["uniform", "squared"]
"""Where the edges of a histogram's n bins lie: at i/n, or at (i/n)²."""

RecoveryMethod: TypeAlias = Literal["solve", "distill"]
"""How a frozen model recovers.

- `solve`: linear layers in closed form, layer by layer
- `distill`: weights and frozen maps are trained to give what the unfrozen model gives
"""

TrainingDevice: TypeAlias = Literal["auto", "cpu", "cuda"]
"""Where a frozen model is trained; `auto` is a GPU where there is one."""

Precision: TypeAlias = Literal["fp32", "fp16", "bf16"]
"""The lowest floating-point type that an engine may compute in."""

Int8: TypeAlias = Literal["dynamic", "static"]
"""How activations become INT8: by each image's own range, or by ranges from calibration images."""

CalibrationMethod: TypeAlias = Literal["percentile", "minmax", "entropy"]
"""How the range of an activation follows from its values over the calibration images."""

ProviderName: TypeAlias = Literal["cpu", "openvino", "cuda", "tensorrt", "xnnpack", "acl"]
"""Execution providers of ONNX Runtime, as the command line and manifests name them."""

Backend: TypeAlias = Literal["ort", "trt"]
"""What runs an engine: ONNX Runtime or TensorRT."""

Exporter: TypeAlias = Literal["auto", "dynamo", "torchscript"]
"""Which of torch's exporters makes the stock graph; `auto` takes the first that can."""

OptionalPass: TypeAlias = Literal[
    "static_shapes",
    "gather_tokens",
    "window_order",
    "merge_gathers",
    "merge_reshapes",
    "add_position",
    "fold_layer_scale",
    "zero_mask",
    "canonical_attention",
    "scale_into_query",
    "drop_key_bias",
    "fold_value_bias",
    "class_token_only",
    "fusable_gelu",
]
"""The passes that `--without` may leave out, in the order of `passes.rewrites`, which a machine
that only prints the command line's help cannot import; a test compares."""

Split: TypeAlias = Literal["all", "even", "odd"]
"""Which files of a folder count: all, or those at even or at odd positions when sorted."""

ClassOrder: TypeAlias = Literal["names", "natural", "letters", "numbers"]
"""How the names of class folders become classes: by the model's class names, sorted as timm does (`natural`), sorted as
torchvision does (`letters`), or as the numbers that they are."""

MIN_OPSET: Final = 16
MAX_OPSET: Final = 22
"""The oldest and the newest of ONNX's operator sets that a checkpoint is exported in."""

DEFAULT_OPSET: Final = 17
"""The operator set of an export that asks for none."""

OPSET_WITHOUT_LAYER_NORMALIZATION: Final = 16
"""The same for a TensorRT that does not know LayerNormalization, which is an operator from 17 on."""

GRANULARITIES: Final[tuple[Granularity, ...]] = get_args(Granularity)
WINDOW_MAPS: Final[tuple[WindowMaps, ...]] = get_args(WindowMaps)
SCORES: Final[tuple[Score, ...]] = get_args(Score)
MAP_SCORES: Final[tuple[MapScore, ...]] = get_args(MapScore)
BITS: Final[tuple[Bits, ...]] = get_args(Bits)
QUANTIZERS: Final[tuple[Quantizer, ...]] = get_args(Quantizer)
TRAINING_DEVICES: Final[tuple[TrainingDevice, ...]] = get_args(TrainingDevice)
RECOVERY_METHODS: Final[tuple[RecoveryMethod, ...]] = get_args(RecoveryMethod)
SPACINGS: Final[tuple[Spacing, ...]] = get_args(Spacing)
PROVIDER_NAMES: Final[tuple[ProviderName, ...]] = get_args(ProviderName)
OPTIONAL_PASSES: Final[tuple[OptionalPass, ...]] = get_args(OptionalPass)
CLASS_ORDERS: Final[tuple[ClassOrder, ...]] = get_args(ClassOrder)
