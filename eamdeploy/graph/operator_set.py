"""Which version of ONNX's own operators a model uses."""

from __future__ import annotations

from typing import Final

import onnx

STANDARD_DOMAINS: Final = ("", "ai.onnx")
"""The two names of ONNX's own operators."""


def operator_set(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that `model` imports; 1 where it imports none, as files before IR 3 do.

    Source: the ONNX specification, IR.md, "Operator sets".
    """
    return next((int(item.version) for item in model.opset_import if item.domain in STANDARD_DOMAINS), 1)
