"""The forms of an exported model that ONNX Runtime may run; which are worth trying against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Int8 = Literal["dynamic", "static"]

# A session that folds Q/DQ into constants would leave nothing in INT8.
_KEEP_QDQ: Mapping[str, str] = MappingProxyType({"session.disable_quant_qdq": "0"})


@dataclass(frozen=True)
class OrtForm:
    """How a model is specialised to ONNX Runtime; with the defaults it stays the exported file, byte for byte.

    Attributes:
        fused_attention: live attention is an operator of ONNX Runtime's own, see `passes.fused_attention`.
        int8: linear layers are INT8, with activations quantized as they come (see `ort_int8`), or by ranges from
            calibration (see `passes.quantize_products`), and then products of attention that are not fused too.
    """

    fused_attention: bool = False
    int8: Int8 | None = None

    @property
    def name(self) -> str:
        parts = [*(["fused attention"] if self.fused_attention else []), *([f"{self.int8} INT8"] if self.int8 else [])]
        return ", ".join(parts) or "as exported"

    @property
    def settings(self) -> Mapping[str, str]:
        """Session settings that differ from an engine's others."""
        return _KEEP_QDQ if self.int8 == "static" else MappingProxyType({})


AS_EXPORTED = OrtForm()


def candidates(*, int8: bool, calibrated: bool) -> list[OrtForm]:
    """The forms that can be fastest somewhere, the plainest first.

    Args:
        calibrated: there are images to calibrate with.
    """
    kinds: list[Int8 | None] = [None] if not int8 else ["dynamic", "static"] if calibrated else ["dynamic"]
    return [OrtForm(fused, kind) for kind in kinds for fused in (False, True)]
